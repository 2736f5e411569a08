"""SharpnessCeiling: a learning-rate scheduler that stays below what the measured sharpness allows."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from replica_newton.monitor.curvature_monitor import CurvatureMonitor
from replica_newton.monitor.stability import is_known, stable_sharpness


class SharpnessCeiling(LRScheduler):
    """Learning rates of another schedule, cut off where training would become unstable, after a warm-up of their own.

        monitor = CurvatureMonitor(model, optimizer=optimizer)
        ceiling = SharpnessCeiling(optimizer, monitor, scheduler=CosineAnnealingLR(optimizer, T_max=1000))
        ...
        optimizer.step()
        ceiling.step()  # in place of scheduler.step(), which it calls

    The rate of step t is `min(scheduled_t, fraction · limit/sharpness, growth · rate_{t−1})`: with `fraction = ½`,
    1/sharpness for plain gradient descent and (1 + β)/sharpness with momentum β; for Adam the limit and
    the sharpness are those in its metric. Until the monitor has seen a sharpness, the rate is `start` times the
    scheduled one; from there it grows to the ceiling, by which time the sharpness, too low at first, has converged.

    Args:
        optimizer: SGD, Adam or AdamW of `torch.optim`, its groups at one rate and momentum.
        monitor: attached to the same optimizer.
        fraction: of the largest stable rate, in (0, 1].
        start: fraction of the scheduled rate until there is a sharpness, in (0, 1].
        growth: largest factor from one rate to the next, > 1.
        scheduler: made before, over the same optimizer; None for a constant rate.

    Raises:
        ValueError: if an argument is out of range, or monitor or scheduler belong to another optimizer.
        TypeError: if the limit of stability of such an optimizer is not known.

    Source:
        LeCun, Simard and Pearlmutter (1993) for 1/sharpness; Cohen et al. (2021), arXiv 2103.00065, for the limit.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        monitor: CurvatureMonitor,
        *,
        fraction: float = 0.5,
        start: float = 0.01,
        growth: float = 1.1,
        scheduler: LRScheduler | None = None,
    ) -> None:
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"{fraction=} must be in (0, 1]")
        if not 0.0 < start <= 1.0:
            raise ValueError(f"{start=} must be in (0, 1]")
        if not growth > 1.0:
            raise ValueError(f"{growth=} must be > 1")
        if monitor.optimizer is not optimizer:
            raise ValueError("monitor must be attached to the same optimizer: CurvatureMonitor(model, optimizer=...)")
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("scheduler must be over the same optimizer")
        if not is_known(optimizer):
            raise TypeError(f"optimizer must be SGD, Adam or AdamW of torch.optim, got {type(optimizer).__name__}")
        if stable_sharpness(optimizer) is None:
            raise ValueError("all groups of the optimizer must have the same rate and momentum")
        self.fraction = fraction
        self.start = start
        self.growth = growth
        self._monitor = monitor
        self._scheduler = scheduler
        self._scheduled = float(optimizer.param_groups[0]["lr"])
        self._rate: float | None = None
        self._sharpness = math.nan
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of the next step, the same for every group."""
        groups = self.optimizer.param_groups
        if self._rate is not None and self._scheduler is not None:
            # Schedulers that multiply the rate they find must find their own.
            _write(groups, self._scheduled)
            self._scheduler.step()
            self._scheduled = float(groups[0]["lr"])
        self._rate = self._ceiling()
        return [self._rate] * len(groups)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: numbers, and the state of the scheduler below; the monitor has its own."""
        state = {name: value for name, value in super().state_dict().items() if name not in {"_monitor", "_scheduler"}}
        return state | {"scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a ceiling over the same kind of scheduler.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            ValueError: if one has a scheduler below and the other not.
        """
        state = dict(state_dict)
        below = state.pop("scheduler")
        if (below is None) != (self._scheduler is None):
            raise ValueError("the state must be that of a ceiling over the same kind of scheduler")
        if self._scheduler is not None:
            self._scheduler.load_state_dict(below)
        super().load_state_dict(state)

    def _ceiling(self) -> float:
        seen = self._monitor.last
        sharpness = None if seen is None else seen.preconditioned_sharpness
        if sharpness is not None and math.isfinite(sharpness):
            self._sharpness = sharpness
        stable = stable_sharpness(self.optimizer)
        if self._rate is None or math.isnan(self._sharpness) or stable is None:
            return self.start * self._scheduled
        rate = min(self._scheduled, self.growth * self._rate)
        if self._sharpness > 0.0 and rate > 0.0:
            largest_stable = stable * float(self.optimizer.param_groups[0]["lr"]) / self._sharpness
            rate = min(rate, self.fraction * largest_stable)
        return rate


def _write(groups: list[dict[str, Any]], rate: float) -> None:
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
