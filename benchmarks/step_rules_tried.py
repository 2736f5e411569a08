"""The rules that `step_rules.py` compares: the untuned step, what was tried beside it, and peers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from step_rules_placebo import RandomProbes
from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton import PairedProbes, ReplicaNewton, Simulated
from replica_newton.benchmark.optimizers import UnfittedMetric, WithoutFall
from replica_newton.optim.metric import Metric, MetricName
from replica_newton.optim.metric_step import MetricStep
from replica_newton.optim.rate import SHARE, DistanceRate

PROBE_EVERY = 10
SHARDS = 8
TARGET = 1.5


class Measures(Protocol):
    """What a rule may ask of the trainer."""

    shards: list[Tensor]

    def slopes(self, indices: Tensor, *, counted: bool) -> tuple[float, float] | None:
        """Slopes down the last step, before and after it, on this batch."""
        ...


Schedule = Literal["cosine", "root", "own"]
Adapt = Callable[[Measures, int, Tensor, float], float]


@dataclass(frozen=True)
class Rule:
    """A way to step.

    Attributes:
        description: in a few words.
        rates: that are tried; of the untuned ones the share of the distance, which is no option of the optimizer.
        make: optimizer of (parameters, rate).
        untuned: whether only the first rate counts.
        relative: whether the optimizer's lr is 1 whatever the rate.
        adapt: makes what multiplies the rate at every step.
        probes: whether `adapt` spends gradients.
        shards: parts of the batch whose gradients are kept.
        schedule: how the rate falls: along half a cosine of the budget; up to step 20 and down like 1/√t; by itself.
        averaged: whether it is evaluated at the average over the last ninth of all steps.
        every_seed: whether it is worth all seeds.
    """

    description: str
    rates: tuple[float, ...]
    make: Callable[[Iterable[nn.Parameter], float], Optimizer]
    untuned: bool = False
    relative: bool = False
    adapt: Callable[[], Adapt] | None = None
    probes: bool = False
    shards: int = 1
    schedule: Schedule = "cosine"
    averaged: bool = False
    every_seed: bool = True


def _ours(
    metric: Callable[[], Metric] = Metric, rate: Callable[..., DistanceRate] = WithoutFall
) -> Callable[[Iterable[nn.Parameter], float], Optimizer]:
    def make(parameters: Iterable[nn.Parameter], share: float) -> Optimizer:
        optimizer = ReplicaNewton(parameters, rule="metric")
        optimizer.metric_step = MetricStep(metric(), rate(share=share))
        return optimizer

    return make


def _peer(name: str, **options: Any) -> Callable[[Iterable[nn.Parameter], float], Optimizer]:
    def make(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
        import pytorch_optimizer

        optimizer: Optimizer = getattr(pytorch_optimizer, name)(parameters, lr=rate, weight_decay=0.0, **options)
        return optimizer

    return make


class Steered:
    """Rate steered by paired probes on fresh data, so that a step is `TARGET` times as long as the line's minimum.

    Down the last step the slope falls from a to b, so the minimum of the parabola is at a/(a − b) of it.
    """

    def __init__(self) -> None:
        self.log, self.before, self.after = 0.0, 0.0, 0.0

    def __call__(self, measures: Measures, step: int, indices: Tensor, factor: float) -> float:
        """See `Rule`."""
        if step >= 2 * PROBE_EVERY and step % PROBE_EVERY == 0:
            pair = measures.slopes(indices, counted=True)
            if pair is not None and pair[0] != 0.0:
                scale = abs(pair[0]) + abs(pair[1])
                self.before = 0.8 * self.before + 0.2 * pair[0] / scale
                self.after = 0.8 * self.after + 0.2 * pair[1] / scale
                wanted = (1.0 - TARGET * factor) * self.before
                self.log += 0.2 * math.tanh(2.0 * (self.after - wanted))
                self.log = max(-2.0, min(2.0, self.log))
        return math.exp(self.log)


class SignalScaled:
    """Rate times the root of the signal's share in the squared mean gradient, from the spread over replicas."""

    def __init__(self) -> None:
        self.noise, self.square = 0.0, 0.0

    def __call__(self, measures: Measures, step: int, indices: Tensor, factor: float) -> float:  # noqa: ARG002
        """See `Rule`."""
        rows = torch.stack(measures.shards)
        mean = rows.mean(dim=0)
        noise = float((rows - mean).square().sum()) / (len(rows) * (len(rows) - 1))
        self.noise = 0.9 * self.noise + 0.1 * noise
        self.square = 0.9 * self.square + 0.1 * float(mean.square().sum())
        return max(1e-3, 1.0 - self.noise / self.square) ** 0.5 if self.square else 1.0


def _variant(
    difference: str,
    metric: Callable[[], Metric] = Metric,
    *,
    rates: tuple[float, ...] = (SHARE,),
    averaged: bool = True,
) -> Rule:
    """The untuned step but for one thing, at one seed."""
    make = _ours(metric, DistanceRate)
    return Rule(
        f'as "metric", {difference}', rates, make, True, True, schedule="own", averaged=averaged, every_seed=False
    )


def _probing(difference: str, probes: Callable[[], PairedProbes], metric: MetricName = "kronecker") -> Rule:
    """The untuned step with Newton's along what eight replicas find, at one seed."""

    def make(parameters: Iterable[nn.Parameter], _: float) -> Optimizer:
        return ReplicaNewton(parameters, metric=metric, topology=Simulated(SHARDS), spread=probes())

    return Rule(
        f'as "metric", {difference}',
        (SHARE,),
        make,
        True,
        True,
        probes=True,
        schedule="own",
        averaged=True,
        every_seed=False,
    )


RULES: dict[str, Rule] = {
    "metric": Rule(
        '`ReplicaNewton(rule="metric")`, untuned, no schedule',
        (SHARE,),
        _ours(rate=DistanceRate),
        True,
        True,
        schedule="own",
        averaged=True,
    ),
    "soap": Rule(
        "SOAP, bases anew every 5 steps, best rate", (0.01, 0.03, 0.1), _peer("SOAP", precondition_frequency=5)
    ),
    "adam": Rule("Adam, best rate", (0.003, 0.01, 0.03), torch.optim.Adam),
    "momentum": Rule(
        "SGD, momentum 0.9, best rate", (0.03, 0.1, 0.3, 1.0), lambda w, rate: torch.optim.SGD(w, rate, momentum=0.9)
    ),
    "prodigy": Rule("Prodigy, untuned", (1.0,), _peer("Prodigy")),
    "soap-root": Rule(
        "SOAP, best rate, rising and falling as ours does, averaged",
        (0.03, 0.1, 0.3),
        _peer("SOAP", precondition_frequency=5),
        schedule="root",
        averaged=True,
        every_seed=False,
    ),
    "adam-root": Rule(
        "Adam, best rate, rising and falling as ours does, averaged",
        (0.01, 0.03, 0.1),
        torch.optim.Adam,
        schedule="root",
        averaged=True,
        every_seed=False,
    ),
    "last": _variant("at its last point", averaged=False),
    "half": _variant("half or twice the share of the distance", rates=(SHARE / 2, 2 * SHARE)),
    "unfitted": _variant("second moments as they are when bases turn, as SOAP's", UnfittedMetric),
    "slower": _variant("momentum 0.95 in place of 0.9", partial(Metric, momentum=0.95)),
    "diagonal": _variant("diagonal metric", partial(Metric, "diagonal")),
    "identity": _variant("identity metric", partial(Metric, "identity")),
    **{
        f"newton-{K}": _probing(f"`PairedProbes` every {K} steps", partial(PairedProbes, every=K))
        for K in (1, 5, 10, 20)
    },
    "newton-exact": _probing("`PairedProbes`, exact products", partial(PairedProbes, relative_step=None)),
    "newton-16": _probing("`PairedProbes` of rank 16", partial(PairedProbes, rank=16)),
    "newton-limit": _probing("`PairedProbes`, rates only lowered", partial(PairedProbes, growth=1.0)),
    "newton-tensors": _probing("`PairedProbes`, a space for every tensor", partial(PairedProbes, blocks="tensor")),
    "newton-placebo": _probing("`PairedProbes` of random directions", RandomProbes),
    "newton-diagonal": _probing("diagonal metric, `PairedProbes`", PairedProbes, "diagonal"),
    "newton-identity": _probing("identity metric, `PairedProbes`", PairedProbes, "identity"),
    "newton-identity-tensors": _probing(
        "identity metric, `PairedProbes`, a space for every tensor", partial(PairedProbes, blocks="tensor"), "identity"
    ),
    "newton-identity-placebo": _probing(
        "identity metric, `PairedProbes` of random directions", RandomProbes, "identity"
    ),
    "cosine": Rule('as "metric", 0.3 of the distance along a cosine, last point', (0.3,), _ours(), True, True),
    "share": Rule('as "cosine", best share of the distance', (0.15, 0.6, 1.2), _ours(), False, True, every_seed=False),
    "steered": Rule(
        f'as "cosine", steered by paired probes every {PROBE_EVERY} steps',
        (0.3,),
        _ours(),
        True,
        True,
        Steered,
        True,
        every_seed=False,
    ),
    "signal": Rule(
        f'as "cosine", times the root of the signal fraction, {SHARDS} replicas, twice the share',
        (0.6,),
        _ours(),
        True,
        True,
        SignalScaled,
        shards=SHARDS,
        every_seed=False,
    ),
}
"""Their order is that of the table."""
