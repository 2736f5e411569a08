"""DistanceRate: a learning rate from how far the weights have to go, with nothing to tune."""

import math
from typing import Any

SHARE = 0.5
"""Of the distance, that the longest step of unit size covers. By experiment: see docs/step_rules.md."""
_ALL_ZERO = 0.01
"""Distance where all weights are zero at first, in their own unit: it grows from there."""
_GROWTH = 1.05
_STRAIGHT = 0.2
_SIGNIFICANT = 0.6
_MEMORY = 0.9
_LEAST_CUT = 1 / 16
_FIRST = 10
"""Steps whose loss is what later ones are compared with: of those after them the rate is at its longest."""


class DistanceRate:
    """Learning rate for steps of unit size, such as those of `Metric`.

        η_t = share · c_t · D_t · min(t/t₀, √(t₀/t)),      D_1 = ‖w_1‖/√N,  c_1 = 1.

    D is an estimate of how far each weight will move: about as far as weights are long when they are drawn, which is
    what every usual initialisation is made for. Averages over gradients are not to be trusted in the first steps, so
    the rate rises until step t₀. Then it falls like 1/√t: over t steps whose directions are partly noise, the rate at
    which what is won and what is lost balance is the distance over √t, whatever t. So no length of training need be
    known, and no schedule is needed; that of the user, if any, multiplies the rate. Multiply all weights by c (and let
    the loss read w/c), and the rate is multiplied by c; multiply the loss by c, and nothing changes.

    Weights that begin at zero or too small are found out by their curvature: along a step that is far too short, the
    slope hardly changes. The slope along each step is measured on the next two gradients, before and after the step
    that follows, neither of which the step has seen. While a step takes away less than a fifth of the slope (of lr
    times as much at a relative rate lr), D grows by 5 % a step, up to the weights' present size `‖w_t‖/√N`. Slopes are
    averaged over about ten steps, and where they are no more than noise, D stays.

    Steps that are too long for the network (inputs in the thousands, very deep, batches of one) make the loss rise.
    While it stands, averaged over about ten steps, above `L₀ + |L₀|`, twice what it was at most in the first ten, c
    falls by 5 % a step, for good, to no less than a sixteenth. Only steps with a closure tell their loss.

    Args:
        share: the part of D that the longest step covers; > 0.
        warm_up: t₀ >= 1.

    Attributes:
        distance: D, None before the first step.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        The distance to go over √t: Zinkevich (2003); Ivgi, Hinder and Carmon (2023), arXiv 2302.12022. Rise and fall in
        one formula: Vaswani et al. (2017), arXiv 1706.03762. Weights' own size as the distance: You et al. (2020),
        arXiv 1904.00962, layer by layer and at every step. Slopes of one batch along the step of another: Baydin et
        al. (2018), arXiv 1703.04782.
    """

    def __init__(self, *, share: float = SHARE, warm_up: int = 20) -> None:
        if not 0.0 < share < float("inf"):
            raise ValueError(f"{share=} must be positive and finite")
        if not warm_up >= 1:
            raise ValueError(f"{warm_up=} must be >= 1")
        self.share = share
        self.warm_up = warm_up
        self.distance: float | None = None
        self._steps = 0
        self._before, self._kept, self._square, self._last = 0.0, 0.0, 0.0, 0.0
        self._loss, self._first_loss, self._cut = math.nan, math.nan, 1.0

    def __call__(self, size: float) -> float:
        """The rate of the next step.

        Args:
            size: `‖w_t‖/√N`, of all that is trained, before the step.

        Returns:
            η.
        """
        self._steps += 1
        if self.distance is None:
            self.distance = size or _ALL_ZERO
        elif self._risen:
            self._cut = max(self._cut / _GROWTH, _LEAST_CUT)
        elif self._straight:
            self.distance = max(self.distance, min(_GROWTH * self.distance, size))
        time = self._steps / self.warm_up
        return self.share * self._cut * self.distance * min(time, 1.0 / math.sqrt(time))

    def observe(self, before: float, after: float, relative: float = 1.0) -> None:
        """Take in slopes at the present parameters; call it before the step, from the third on.

        Args:
            before: slope down the last step, per unit of length.
            after: slope down the step before that, per unit of length.
            relative: lr.
        """
        if self._steps < self.warm_up:
            return
        # Above zero if less than the given part of the slope is gone.
        kept = after - (1.0 - _STRAIGHT * relative) * self._last
        self._kept = _MEMORY * self._kept + (1.0 - _MEMORY) * kept
        self._before = _MEMORY * self._before + (1.0 - _MEMORY) * before
        self._square = _MEMORY * self._square + (1.0 - _MEMORY) * before**2
        self._last = before

    def observe_loss(self, loss: float) -> None:
        """Take in the loss at the present parameters; call it before the step, if it is known.

        Args:
            loss: of what is minimised.
        """
        self._loss = loss if math.isnan(self._loss) else _MEMORY * self._loss + (1.0 - _MEMORY) * loss
        if self._steps < _FIRST:
            self._first_loss = self._loss if math.isnan(self._first_loss) else max(self._first_loss, self._loss)

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return self._steps

    @property
    def _risen(self) -> bool:
        """Whether the loss is more than twice what it was; False where it is not known."""
        return self._loss > self._first_loss + abs(self._first_loss)

    @property
    def _straight(self) -> bool:
        """Whether slopes hardly fall along steps, and are more than noise."""
        return self._kept > 0.0 and self._before > _SIGNIFICANT * self._square**0.5

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        slopes = [self._before, self._kept, self._square, self._last]
        losses = [self._loss, self._first_loss, self._cut]
        return {"distance": self.distance, "steps": self._steps, "slopes": slopes, "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: what `state_dict` returned.
        """
        self.distance, self._steps = state["distance"], state["steps"]
        self._before, self._kept, self._square, self._last = state["slopes"]
        # States of before losses were looked at have none; what is first from now on is.
        self._loss, self._first_loss, self._cut = state.get("losses", [math.nan, math.nan, 1.0])

    def numbers(self) -> list[float]:
        """The state as numbers, nan for a distance that is not known yet."""
        distance = math.nan if self.distance is None else self.distance
        state = self.state_dict()
        return [distance, float(self._steps), *state["slopes"], *state["losses"]]

    def load_numbers(self, numbers: list[float]) -> None:
        """Go on from a state.

        Args:
            numbers: what `numbers` returned.
        """
        distance, steps, *rest = numbers
        known = None if math.isnan(distance) else distance
        self.load_state_dict({"distance": known, "steps": int(steps), "slopes": rest[:4], "losses": rest[4:]})
