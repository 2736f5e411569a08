"""Training methods by name: how each makes its optimizer, and the rate it uses if none is given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn
from torch.optim import Optimizer

from replica_newton.optim import ReplicaNewton
from replica_newton.optim.replica_newton import Rule
from replica_newton.spread import LocalStep, RandomDirections
from replica_newton.topology import Topology
from replica_newton.topology.estimate import Kind
from replica_newton.topology.simulated import Data

EVERYWHERE = get_args(Kind)
Make = Callable[[Iterable[nn.Parameter], float, Topology], Optimizer]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        description: what it does, in a few words.
        learning_rate: used where none is given: of the rates tried on MNIST (docs/results.md), the best at which no
            run diverged, whatever M.
        parts_replicas: whether replicas stand at different parameters; where they do not, their number changes
            nothing and the method is run with one.
        make: optimizer of (parameters, rate, topology).
        topologies: where its replicas can live.
    """

    description: str
    learning_rate: float
    parts_replicas: bool
    make: Make
    topologies: tuple[Kind, ...] = ("simulated",)


def _replica_newton(
    rule: Rule, spread: type[LocalStep | RandomDirections], secant_data: Data, *, damping: float = 0.0
) -> Make:
    def make(parameters: Iterable[nn.Parameter], rate: float, topology: Topology) -> Optimizer:
        return ReplicaNewton(
            parameters,
            rate,
            rule=rule,
            topology=topology,
            spread=spread(),
            secant_data=secant_data,
            damping=damping,
        )

    return make


METHODS: dict[str, Method] = {
    "sgd": Method("stochastic gradient descent", 0.3, False, lambda w, rate, _: torch.optim.SGD(w, rate)),
    "momentum": Method("SGD with momentum 0.9", 0.03, False, lambda w, rate, _: torch.optim.SGD(w, rate, momentum=0.9)),
    "adam": Method("Adam", 0.01, False, lambda w, rate, _: torch.optim.Adam(w, rate)),
    "paper": Method(
        "the paper's step, secants on every replica's own shard",
        0.05,
        True,
        _replica_newton("paper", LocalStep, "own"),
        EVERYWHERE,
    ),
    "paper-common": Method(
        "the paper's step, secants on one common shard",
        0.1,
        True,
        _replica_newton("paper", LocalStep, "common"),
        EVERYWHERE,
    ),
    "paper-random": Method(
        "control: as paper-common, replicas displaced in random directions",
        0.1,
        True,
        _replica_newton("paper", RandomDirections, "common"),
        EVERYWHERE,
    ),
    # With a damping of 1 no direction is stepped along faster than by SGD at the same rate, however flat it looks.
    "saddle-free": Method(
        "1/(1 + |θ|) with Ritz values θ in place of the paper's 1/σ, secants on one common shard",
        0.1,
        True,
        _replica_newton("saddle-free", LocalStep, "common", damping=1.0),
        EVERYWHERE,
    ),
    "metric": Method(
        "steps of unit size in a Kronecker metric, at a rate from the size of the weights, times LEARNING_RATE",
        1.0,
        False,
        lambda w, rate, topology: ReplicaNewton(w, rate, rule="metric", topology=topology),
        EVERYWHERE,
    ),
}
