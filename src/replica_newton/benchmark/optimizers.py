"""The methods of the benchmark by name: peers with their grids of rates, ours with one rate, and its ablations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton.benchmark.steppers import AtItsAverage, Averaging, DiagonalHessian, FreshLBFGS, Stepper
from replica_newton.benchmark.tasks import Task
from replica_newton.optim import ReplicaNewton
from replica_newton.optim.metric import Metric
from replica_newton.optim.metric_step import MetricStep
from replica_newton.optim.rate import DistanceRate
from replica_newton.optim.replica_newton import Rule
from replica_newton.spread import LocalStep, RandomDirections
from replica_newton.topology import Simulated
from replica_newton.topology.simulated import Criterion, Data
from replica_newton.training.run import RunError

Family = Literal["first-order", "second-order", "ours", "ablation"]
Make = Callable[[nn.Module, Criterion, float], Stepper]

OURS = "replica-newton"
CURVATURE_RATE = 0.1
"""Of the rules that take their curvature from replicas, which have to be given one."""
LARGE_BATCH = 1024
PRECONDITION_EVERY = 10
MUON_ADAMW_SHARE = 0.15
_LBFGS_ITERATIONS = 10
_SOPHIA_EVERY = 10


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: its name as its authors write it.
        family: peers are first-order or second-order (they precondition by more than a diagonal of squared gradients,
            or see the Hessian); "ours" has one default for all tasks; an "ablation" is a variant of it.
        rates: its grid, ascending; a single rate is not tuned.
        make: stepper of (network, criterion, rate).
        settings: what is not a default of its library.
        peer_package: whether it comes from pytorch-optimizer.
        least_batch: smallest batch it is meant for.
    """

    label: str
    family: Family
    rates: tuple[float, ...]
    make: Make
    settings: str = ""
    peer_package: bool = False
    least_batch: int = 1

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.family in {"first-order", "second-order"}

    @property
    def tuned(self) -> bool:
        """Whether its rate is chosen for every task."""
        return len(self.rates) > 1

    def applies_to(self, task: Task) -> bool:
        """Whether the task's batch is large enough.

        Args:
            task: to be trained.

        Returns:
            False where the method is left out.
        """
        return task.batch_size >= self.least_batch


def check_methods(names: list[str]) -> None:
    """Fail before anything is run.

    Args:
        names: of methods.

    Raises:
        RunError: if one is unknown, or its package is not installed.
    """
    for name in names:
        if name not in METHODS:
            raise RunError(f"the method must be one of {', '.join(METHODS)}, got {name!r}")
    missing = [name for name in names if METHODS[name].peer_package]
    if missing and find_spec("pytorch_optimizer") is None:
        raise RunError(
            f"{', '.join(missing)} need pytorch-optimizer: pip install 'replica-newton[benchmark]', or choose others "
            "by --method"
        )


def _torch(optimizer: Callable[..., Optimizer], **options: Any) -> Make:
    return lambda module, criterion, rate: Stepper(module, criterion, optimizer(module.parameters(), rate, **options))


def _peer(name: str, **options: Any) -> Make:
    """Of pytorch-optimizer, without weight decay."""
    return lambda module, criterion, rate: Stepper(module, criterion, _optimizer(name, module, rate, **options))


def _optimizer(name: str, module: nn.Module, rate: float, **options: Any) -> Optimizer:
    import pytorch_optimizer  # slow to import, and an extra

    optimizer: Optimizer = getattr(pytorch_optimizer, name)(
        module.parameters(), lr=rate, **{"weight_decay": 0.0} | options
    )
    return optimizer


def _muon(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
    """Muon for the weights of linear layers and convolutions but the last; its AdamW for all else."""
    import pytorch_optimizer

    weights = [one.weight for one in module.modules() if isinstance(one, (nn.Linear, nn.Conv2d))][:-1]
    hidden = {id(weight) for weight in weights}
    others = [parameter for parameter in module.parameters() if id(parameter) not in hidden]
    groups = [
        {"params": weights, "lr": rate, "weight_decay": 0.0, "use_muon": True},
        {"params": others, "lr": MUON_ADAMW_SHARE * rate, "weight_decay": 0.0, "use_muon": False},
    ]
    return Stepper(module, criterion, pytorch_optimizer.Muon(groups))


def _lbfgs(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
    optimizer = torch.optim.LBFGS(module.parameters(), rate, max_iter=_LBFGS_ITERATIONS, history_size=_LBFGS_ITERATIONS)
    return FreshLBFGS(module, criterion, optimizer)


def _sophia(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
    optimizer = _optimizer("SophiaH", module, rate, update_period=_SOPHIA_EVERY)
    return DiagonalHessian(module, criterion, optimizer, every=_SOPHIA_EVERY, gaussian=True)


def _adahessian(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
    return DiagonalHessian(module, criterion, _optimizer("AdaHessian", module, rate), every=1, gaussian=False)


def _schedule_free(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
    return Averaging(module, criterion, _optimizer("ScheduleFreeAdamW", module, rate))


class UnfittedMetric(Metric):
    """The metric "kronecker" whose second moments stay as they are when a basis turns, as SOAP's do."""

    def _fit(self, state: dict[str, Any], side: str, sums: Tensor) -> None:
        """Nothing."""


class WithoutRise(DistanceRate):
    """The rate of the default that is at its longest from the first step on."""

    def __call__(self, size: float) -> float:
        """See `DistanceRate`."""
        return super().__call__(size) / min(self.steps / self.warm_up, 1.0)


class WithoutFall(DistanceRate):
    """The rate of the default that stays at its longest."""

    def __call__(self, size: float) -> float:
        """See `DistanceRate`."""
        return super().__call__(size) * math.sqrt(max(self.steps / self.warm_up, 1.0))


class WithoutGrowth(DistanceRate):
    """The rate of the default whose distance stays that of the first weights."""

    @property
    def _straight(self) -> bool:
        return False


def _metric(
    metric: Callable[[], Metric] = Metric,
    stepper: Callable[[nn.Module, Criterion, ReplicaNewton], Stepper] = AtItsAverage,
    distance_rate: Callable[[], DistanceRate] = DistanceRate,
) -> Make:
    def make(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
        optimizer = ReplicaNewton(module.parameters(), rate, rule="metric")
        optimizer.metric_step = MetricStep(metric(), distance_rate())
        return stepper(module, criterion, optimizer)

    return make


def _replicas(
    M: int,
    rule: Rule = "saddle-free",
    *,
    spread: type[LocalStep | RandomDirections] = LocalStep,
    data: Data = "common",
    damping: float = 1.0,
) -> Make:
    def make(module: nn.Module, criterion: Criterion, rate: float) -> Stepper:
        topology = Simulated(M)
        optimizer = ReplicaNewton(
            module.parameters(),
            rate,
            rule=rule,
            topology=topology,
            spread=spread(),
            secant_data=data,
            damping=damping,
        )
        return Stepper(module, criterion, optimizer, topology)

    return make


def _ablation(label: str, make: Make, rate: float = 1.0) -> Method:
    return Method(label, "ablation", (rate,), make)


_SMALL = (0.0003, 0.001, 0.003, 0.01, 0.03)
_MIDDLE = (0.003, 0.01, 0.03, 0.1, 0.3)
_LARGE = (0.01, 0.03, 0.1, 0.3, 1.0)

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", "first-order", (0.03, 0.1, 0.3, 1.0, 3.0), _torch(torch.optim.SGD)),
    "momentum": Method("SGD, momentum", "first-order", _MIDDLE, _torch(torch.optim.SGD, momentum=0.9), "momentum 0.9"),
    "adam": Method("Adam", "first-order", _SMALL, _torch(torch.optim.Adam)),
    "adamw": Method("AdamW", "first-order", _SMALL, _torch(torch.optim.AdamW), "weight decay 0.01, its default"),
    "schedule-free": Method(
        "Schedule-Free AdamW",
        "first-order",
        (0.001, 0.003, 0.01, 0.03, 0.1),
        _schedule_free,
        "no schedule; evaluated at its averaged point",
        peer_package=True,
    ),
    "prodigy": Method("Prodigy", "first-order", (0.1, 0.3, 1.0, 3.0, 10.0), _peer("Prodigy"), peer_package=True),
    "lbfgs": Method(
        "L-BFGS",
        "second-order",
        _LARGE,
        _lbfgs,
        f"{_LBFGS_ITERATIONS} iterations on every batch, pairs of that batch alone; batches ≥ {LARGE_BATCH:,} only",
        least_batch=LARGE_BATCH,
    ),
    "muon": Method(
        "Muon",
        "second-order",
        (0.001, 0.003, 0.01, 0.03, 0.1),
        _muon,
        f"for hidden weights; AdamW at {MUON_ADAMW_SHARE} of its rate for biases, embeddings and the last layer",
        peer_package=True,
    ),
    "soap": Method(
        "SOAP",
        "second-order",
        _SMALL,
        _peer("SOAP", precondition_frequency=PRECONDITION_EVERY),
        f"bases anew every {PRECONDITION_EVERY} steps",
        peer_package=True,
    ),
    "shampoo": Method(
        "Shampoo",
        "second-order",
        _MIDDLE,
        _peer("ScalableShampoo", preconditioning_compute_steps=PRECONDITION_EVERY),
        f"`ScalableShampoo`: blocks of 512, grafted on SGD; roots anew every {PRECONDITION_EVERY} steps",
        peer_package=True,
    ),
    "sophia": Method(
        "Sophia-H",
        "second-order",
        (0.01, 0.03, 0.1, 0.3, 1.0),
        _sophia,
        f"a Hessian-vector product every {_SOPHIA_EVERY} steps",
        peer_package=True,
    ),
    "adahessian": Method(
        "AdaHessian",
        "second-order",
        _MIDDLE,
        _adahessian,
        "a Hessian-vector product every step",
        peer_package=True,
    ),
    OURS: Method(
        "ReplicaNewton", "ours", (1.0,), _metric(), 'rule "metric": no rate, no schedule; evaluated at its average'
    ),
    "last-point": _ablation(
        "evaluated at its last point", _metric(stepper=lambda *parts: Stepper(*parts, scheduled=False))
    ),
    "cosine": _ablation("its rate times the peers' schedule, last point", _metric(stepper=Stepper)),
    "no-rise": _ablation("no rise of its rate over the first 20 steps", _metric(distance_rate=WithoutRise)),
    "no-fall": _ablation("no fall of its rate after 20 steps", _metric(distance_rate=WithoutFall)),
    "no-growth": _ablation("no growth of its distance", _metric(distance_rate=WithoutGrowth)),
    "unfitted": _ablation("second moments as they are when bases turn (SOAP's)", _metric(UnfittedMetric)),
    "diagonal": _ablation("diagonal metric", _metric(partial(Metric, "diagonal"))),
    "identity": _ablation("no metric (identity)", _metric(partial(Metric, "identity"))),
    "M=1": _ablation("no curvature, M = 1: SGD, rate 0.1", _torch(torch.optim.SGD), CURVATURE_RATE),
    "M=2": _ablation("saddle-free rule, M = 2, rate 0.1", _replicas(2), CURVATURE_RATE),
    "M=4": _ablation("saddle-free rule, M = 4, rate 0.1", _replicas(4), CURVATURE_RATE),
    "M=8": _ablation("saddle-free rule, M = 8, rate 0.1", _replicas(8), CURVATURE_RATE),
    "random-directions": _ablation(
        "saddle-free rule, M = 8, random directions (placebo), rate 0.1",
        _replicas(8, spread=RandomDirections),
        CURVATURE_RATE,
    ),
    "paper-common": _ablation(
        "the paper's rule, M = 8, common data, rate 0.1", _replicas(8, "paper", damping=0.0), CURVATURE_RATE
    ),
    "paper": _ablation(
        "the paper's rule, M = 8, own data, rate 0.1", _replicas(8, "paper", data="own", damping=0.0), CURVATURE_RATE
    ),
}
"""Their order is that of tables and figures. An ablation is one more line, of a variant of `OURS`."""
