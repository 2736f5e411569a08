"""PairedProbes: curvature for the metric's step, from gradients of one batch at two points."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from replica_newton.optim.metric import Metric
from replica_newton.spread import TrackedSubspace

logger = logging.getLogger(__name__)

Blocks = Literal["all", "group", "tensor"]

FIRST_STEP = 20
"""Before it there are no probes: the metric's averages have hardly begun."""
_KNOWN = 0.5
"""Uncertainty of an eigenvalue over its size, at most, for a pair to be stepped along."""


class PairedProbes:
    """Newton's step along the sharpest directions that replicas find, the metric's along all others.

    In coordinates `w̃ = D^½ w`, D what a metric divides gradients by (see `Metric`), the metric's step Ũ is one of
    steepest descent at the rate η, and the Hessian is `A = D^-½ H D^-½`. A `TrackedSubspace` follows the top eigenpairs
    (θ_i, x_i) of A. Every `every` steps each replica answers one direction q̃, by a second gradient of its own shard of
    the batch, with the same random numbers:

        A q̃ ≈ D^-½ (g(w + h D^-½ q̃) − g(w))/h.

    With one replica, directions take turns. The step is then

        Ũ + Σ_i (ρ_i − 1) (x_iᵀ Ũ) x_i,      ρ_i = min(1/(η |θ_i|), growth),

    over the pairs whose uncertainty is at most half of |θ_i|: shorter where η is beyond what the curvature allows,
    longer, up to `growth` times, where it allows more. ρ is positive, so it descends wherever the metric's step does.

    It costs a gradient every `every` steps and 2 · rank · N elements of state. On the tasks of docs/step_rules.md it
    wins nothing; it is there to be tried on others.

    Args:
        every: steps from one probe to the next, >= 1; the first is taken after 20.
        rank: eigenpairs of a block, >= 1, as far as it has so many elements.
        blocks: what is a space of its own, with curvature between blocks left out: "all" for one of all parameters,
            or one for every parameter "group" or "tensor".
        smoothing: see `TrackedSubspace`.
        relative_step: h over `max(‖w‖, 1)`, in (0, 1); None multiplies with the Hessian exactly, by differentiating
            twice, which costs two gradients.
        growth: of the rate, at most, >= 1; with 1, rates are only lowered.
        seed: of the first directions.

    Attributes:
        taken: probes so far.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, for Newton's step in the space of the replicas; Dauphin et al. (2014),
        arXiv 1406.2572, for |θ|.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        rank: int = 8,
        blocks: Blocks = "all",
        smoothing: float = 0.2,
        relative_step: float | None = 3e-3,
        growth: float = 4.0,
        seed: int = 0,
    ) -> None:
        for name, number in (("every", every), ("rank", rank), ("growth", growth)):
            if not 1 <= number < float("inf"):
                raise ValueError(f"{name}={number} must be >= 1 and finite")
        if blocks not in get_args(Blocks):
            raise ValueError(f"{blocks=} must be one of {', '.join(get_args(Blocks))}")
        if not 0.0 < smoothing <= 1.0:
            raise ValueError(f"{smoothing=} must be in (0, 1]")
        if relative_step is not None and not 0.0 < relative_step < 1.0:
            raise ValueError(f"{relative_step=} must be in (0, 1), or None")
        self.every = every
        self.rank = rank
        self.blocks = blocks
        self.smoothing = smoothing
        self.relative_step = relative_step
        self.growth = growth
        self.seed = seed
        self.taken = 0
        self._spaces: list[TrackedSubspace] = []
        self._sizes: list[int] = []

    def __repr__(self) -> str:
        return f"PairedProbes(every={self.every}, rank={self.rank}, blocks={self.blocks!r})"

    def is_due(self, step: int) -> bool:
        """Whether a step asks for a probe.

        Args:
            step: how many have been taken.

        Returns:
            Whether it does.
        """
        return step >= FIRST_STEP and step % self.every == 0

    @property
    def eigenvalues(self) -> list[Tensor]:
        """Of A, those of every block, fp64 on the CPU, by magnitude; empty before the first sweep."""
        return [space.eigenvalues for space in self._spaces]

    def directions(self, metric: Metric, states: Sequence[dict[str, Any]], sizes: Sequence[int], count: int) -> Tensor:
        """Directions in w to be probed, `D^-½ q̃`.

        Args:
            metric: of the step.
            states: of the parameters, one after the other.
            sizes: elements of every block; where they are others than before, all begins anew.
            count: how many directions.

        Returns:
            `(count, N)`.
        """
        if list(sizes) != self._sizes:
            self._sizes = list(sizes)
            self._spaces = self._new_spaces(sizes, states[0]["second_moment"].device)
        rows = torch.cat([space.directions(count) for space in self._spaces], dim=1)
        return _scaled(metric, states, self._signed(rows), -0.5)

    def observe(self, metric: Metric, states: Sequence[dict[str, Any]], products: Tensor) -> None:
        """Take in the Hessian's products with the directions that `directions` gave last.

        Args:
            metric: of the step.
            states: of the parameters.
            products: `(count, N)`; where one is not finite, the probe is dropped, with a line in the log.
        """
        rows = self._signed(_scaled(metric, states, products, -0.5))
        if bool(rows.isfinite().all()):
            for space, columns in zip(self._spaces, torch.split(rows, self._sizes, dim=1), strict=True):
                space.observe(columns)
        else:
            logger.warning("probe %d is dropped: a gradient beside the parameters is not finite", self.taken)
        self.taken += 1

    def bent(
        self, metric: Metric, states: Sequence[dict[str, Any]], units: Sequence[Tensor], rate: float
    ) -> Sequence[Tensor]:
        """The metric's step with Newton's in place of it along known pairs.

        Args:
            metric: of the step.
            states: of the parameters.
            units: U, of every parameter.
            rate: η > 0.

        Returns:
            The step; the metric's as long as nothing is known, or of other parameters than was probed.
        """
        known = any(len(space.eigenvalues) for space in self._spaces)
        if not known or sum(self._sizes) != sum(unit.numel() for unit in units):
            return units
        flat = _scaled(metric, states, torch.cat([unit.flatten() for unit in units])[None], 0.5)[0]
        changes = []
        for space, step in zip(self._spaces, torch.split(flat, self._sizes), strict=True):
            vectors, sizes = space.eigenvectors, space.eigenvalues.abs()
            ratios = (1.0 / (sizes * rate)).clamp_max(self.growth)
            ratios[space.uncertainties > _KNOWN * sizes] = 1.0
            along = vectors @ step.to(vectors)
            changes.append(((ratios - 1.0).to(along) * along) @ vectors)
        change = _scaled(metric, states, torch.cat(changes)[None], -0.5)[0]
        pieces = torch.split(change, [unit.numel() for unit in units])
        return [unit + piece.view_as(unit) for unit, piece in zip(units, pieces, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt: tensors and numbers."""
        return {"taken": self.taken, "sizes": self._sizes, "spaces": [space.state_dict() for space in self._spaces]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what was learnt with the same blocks and rank.

        Args:
            state: what `state_dict()` returned.
            device: of the parameters.

        Raises:
            ValueError: if the rank differs.
        """
        spaces = self._new_spaces(state["sizes"] if state["spaces"] else [], device)
        for space, saved in zip(spaces, state["spaces"], strict=True):
            space.load_state_dict(saved)
        self._spaces, self._sizes, self.taken = spaces, list(state["sizes"]), state["taken"]

    def _new_spaces(self, sizes: Sequence[int], device: torch.device) -> list[TrackedSubspace]:
        return [
            TrackedSubspace(min(self.rank, size), size, smoothing=self.smoothing, seed=self.seed + place, device=device)
            for place, size in enumerate(sizes)
        ]

    def _signed(self, rows: Tensor) -> Tensor:
        """Rows with signs drawn for every block and row: so what blocks do to each other is without bias."""
        if len(self._sizes) == 1:
            return rows
        generator = torch.Generator().manual_seed(self.taken)
        signs = 1.0 - 2.0 * torch.randint(2, (len(rows), len(self._sizes)), generator=generator)
        return rows * signs.repeat_interleave(torch.tensor(self._sizes), dim=1).to(rows)


def _scaled(metric: Metric, states: Sequence[dict[str, Any]], rows: Tensor, power: float) -> Tensor:
    """Rows times a power of D, all parameters one after the other."""
    pieces = torch.split(rows, [state["second_moment"].numel() for state in states], dim=1)
    scaled = [
        torch.stack([metric.scaled(state, row, power) for row in piece.to(state["second_moment"])])
        for state, piece in zip(states, pieces, strict=True)
    ]
    return torch.cat(scaled, dim=1)
