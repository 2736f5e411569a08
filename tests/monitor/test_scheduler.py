"""Learning rates under a ceiling of measured sharpness."""

import copy
from itertools import pairwise

import pytest
import torch
from networks import separable_quadratic
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler

from replica_newton import CurvatureMonitor, SharpnessCeiling

CURVATURES = [50.0, 4.0, 1.0]


class Run:
    """Full-batch training on a quadratic, sharpness 50, under a ceiling."""

    def __init__(self, *, curvatures: list[float] = CURVATURES, below: bool = False, **options: float) -> None:
        self.problem = separable_quadratic(curvatures, [1.0, -2.0, 3.0])
        self.optimizer = SGD(self.problem.module.parameters(), options.pop("lr", 1.0), options.pop("momentum", 0.0))
        self.monitor = CurvatureMonitor(self.problem.module, optimizer=self.optimizer, rank=3, every=1)
        scheduler = ExponentialLR(self.optimizer, 0.95) if below else None
        self.ceiling = SharpnessCeiling(self.optimizer, self.monitor, scheduler=scheduler, **options)

    def loss(self) -> torch.Tensor:
        """Of the whole batch."""
        return self.problem.criterion(self.problem.module(*self.problem.inputs), self.problem.targets)

    def step(self) -> float:
        """The rate of this step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.monitor.observe(self.loss)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.ceiling.step()
        return float(rate)


@pytest.mark.parametrize(("momentum", "fraction"), [(0.0, 0.5), (0.9, 0.5), (0.0, 1.0)])
def test_the_rate_warms_up_to_the_fraction_of_the_stable_one(momentum: float, fraction: float):
    run = Run(momentum=momentum, fraction=fraction, start=1e-3, growth=1.2)
    rates = [run.step() for _ in range(60)]
    assert rates[:3] == [1e-3] * 3  # no sharpness before the third probe
    assert all(after <= 1.2 * before * (1 + 1e-12) for before, after in pairwise(rates))
    assert rates[-1] == pytest.approx(fraction * 2.0 * (1.0 + momentum) / 50.0, rel=1e-3)
    assert run.monitor.last.stability_ratio <= fraction * 1.01


def test_a_rate_that_diverges_converges_under_the_ceiling():
    run = Run(lr=1.0)
    first = run.loss().item()
    for _ in range(200):
        run.step()
    assert run.loss().item() < 1e-3 * first


@pytest.mark.parametrize("curvatures", [CURVATURES, [0.5, 0.2, 0.1]], ids=["binding", "idle"])
def test_the_schedule_below_goes_on_as_if_alone(curvatures: list[float]):
    """Though it multiplies the rate that it finds."""
    run = Run(curvatures=curvatures, below=True, start=1.0, growth=1e9)
    rates = [run.step() for _ in range(100)]
    expected = [min(0.95**step, 1.0 / max(curvatures)) for step in range(100)]
    assert rates[20:] == pytest.approx(expected[20:], rel=2e-3)


def test_a_schedule_that_ends_at_zero_ends_at_zero():
    run = Run()
    run.ceiling = SharpnessCeiling(run.optimizer, run.monitor, scheduler=CosineAnnealingLR(run.optimizer, T_max=20))
    assert [run.step() for _ in range(21)][-1] == 0.0


def test_a_loaded_state_goes_on_alike():
    run = Run(below=True)
    for _ in range(10):
        run.step()
    resumed = Run(below=True)
    resumed.problem.module.load_state_dict(run.problem.module.state_dict())
    for name in ("optimizer", "monitor", "ceiling"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(run, name).state_dict()))
    assert [resumed.step() for _ in range(10)] == [run.step() for _ in range(10)]
    with pytest.raises(ValueError, match="the state must be that of a ceiling over the same kind of scheduler"):
        Run().ceiling.load_state_dict(run.ceiling.state_dict())


class Unknown(SGD):
    """Known to nobody."""


def parts(build: type[Optimizer] = SGD) -> tuple[nn.Module, Optimizer, CurvatureMonitor]:
    module = nn.Linear(3, 3)
    optimizer = build([{"params": [module.weight]}, {"params": [module.bias]}], lr=0.1)
    return module, optimizer, CurvatureMonitor(module, optimizer=optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1.5 must be in \(0, 1\]"),
        ({"start": 0.0}, r"start=0.0 must be in \(0, 1\]"),
        ({"growth": 1.0}, "growth=1.0 must be > 1"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict, message: str):
    _, optimizer, monitor = parts()
    with pytest.raises(ValueError, match=message):
        SharpnessCeiling(optimizer, monitor, **options)


def test_what_belongs_to_another_optimizer_is_refused():
    _, optimizer, monitor = parts()
    _, other, _ = parts(Adam)
    with pytest.raises(ValueError, match="monitor must be attached to the same optimizer"):
        SharpnessCeiling(other, monitor)
    scheduler: LRScheduler = ExponentialLR(other, 0.9)
    with pytest.raises(ValueError, match="scheduler must be over the same optimizer"):
        SharpnessCeiling(optimizer, monitor, scheduler=scheduler)


def test_an_optimizer_without_one_known_limit_is_refused():
    _, optimizer, monitor = parts(Unknown)
    with pytest.raises(TypeError, match=r"optimizer must be SGD, Adam or AdamW of torch\.optim, got Unknown"):
        SharpnessCeiling(optimizer, monitor)
    _, optimizer, monitor = parts()
    optimizer.param_groups[1]["lr"] = 0.3
    with pytest.raises(ValueError, match="all groups of the optimizer must have the same rate and momentum"):
        SharpnessCeiling(optimizer, monitor)
