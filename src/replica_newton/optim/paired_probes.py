"""PairedProbes: curvature for the metric's step, from gradients of one batch at two points."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from replica_newton.optim.metric import Metric
from replica_newton.spread import TrackedSubspace
from replica_newton.spread.columns import Columns

logger = logging.getLogger(__name__)

Blocks = Literal["all", "group", "tensor"]

FIRST_STEP = 20
"""Before it there are no probes: the metric's averages have hardly begun."""
_LEAST = 1e-4
"""Elements of D over their mean, at least."""
_KNOWN = 0.5
"""Uncertainty of an eigenvalue over its size, at most, for a pair to be stepped along."""


class Held(NamedTuple):
    """Blocks of parameters, and how much of each this process holds.

    Attributes:
        sizes: elements of every block, everywhere.
        here: those that are held here.
        columns: how processes share a block; None where all of it is here.
        replicas: M.
        total: sums a few fp64 numbers over the processes.
        device: of the parameters.
    """

    sizes: list[int]
    here: list[int]
    columns: list[Columns | None]
    replicas: int
    total: Callable[[Tensor], Tensor]
    device: torch.device


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
    Elements of D are taken for no less than 1e-4 of their mean: directions without a gradient, such as a bias before
    batch normalisation, would be all rounding.

    It costs a gradient every `every` steps and 2 · rank · N elements of state, shared over processes like the
    parameters. On the tasks of docs/step_rules.md it wins nothing over the metrics alone; on stiff problems with all of
    their data it can, in all but the Kronecker metric.

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
        self._held: Held | None = None
        self._loaded: dict[str, Any] | None = None
        self._least = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_held": None,
            "_spaces": [],
            "_loaded": self.state_dict() if self._spaces else self._loaded,
        }

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

    def attach(self, held: "Held") -> None:
        """Say what is held here, before every step; where it is not what it was, all begins anew.

        Args:
            held: the same blocks in all processes.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._spaces = []
            if not loaded["spaces"]:
                pass
            elif (loaded["sizes"], loaded["replicas"]) == (held.sizes, held.replicas):
                self._spaces = self._new_spaces(held)
                for space, state in zip(self._spaces, loaded["spaces"], strict=True):
                    space.load_state_dict(state)
            else:
                logger.warning("what probes had learnt was of other blocks or replicas: they begin anew")
        elif self._held is not None and (self._held.sizes, self._held.here) != (held.sizes, held.here):
            self._spaces = []
        self._held = held

    def directions(self, metric: Metric, states: Sequence[dict[str, Any]], count: int) -> Tensor:
        """Directions in w to be probed, `D^-½ q̃`.

        Args:
            metric: of the step.
            states: of the parameters held here, one after the other.
            count: how many directions.

        Returns:
            `(count, n)`, of the n elements held here.
        """
        self._spaces = self._spaces or self._new_spaces(self._here)
        sums = [metric.divisor(state).sum(dtype=torch.float64).cpu() for state in states]
        mean = self._here.total(sum(sums, torch.zeros((), dtype=torch.float64))) / sum(self._here.sizes)
        self._least = _LEAST * float(mean)
        rows = torch.cat([space.directions(count) for space in self._spaces], dim=1)
        return self._scaled(metric, states, self._signed(rows), -0.5)

    def observe(self, metric: Metric, states: Sequence[dict[str, Any]], products: Tensor) -> None:
        """Take in the Hessian's products with the directions that `directions` gave last.

        Args:
            metric: of the step.
            states: of the parameters held here.
            products: `(count, n)`; where one is not finite anywhere, the probe is dropped, with a line in the log.
        """
        rows = self._signed(self._scaled(metric, states, products, -0.5))
        wrong = self._here.total((~rows.isfinite()).sum().double().cpu())
        if bool(wrong):
            logger.warning("probe %d is dropped: a gradient beside the parameters is not finite", self.taken)
        else:
            for space, columns in zip(self._spaces, torch.split(rows, self._here.here, dim=1), strict=True):
                space.observe(columns)
        self.taken += 1

    def bent(
        self, metric: Metric, states: Sequence[dict[str, Any]], units: Sequence[Tensor], rate: float
    ) -> Sequence[Tensor]:
        """The metric's step with Newton's in place of it along known pairs.

        Args:
            metric: of the step.
            states: of the parameters held here.
            units: U, of every one.
            rate: η > 0.

        Returns:
            The step; the metric's as long as nothing is known, or of other parameters than was probed.
        """
        known = any(len(space.eigenvalues) for space in self._spaces)
        if not known or sum(self._here.here) != sum(unit.numel() for unit in units):
            return units
        flat = torch.cat([unit.flatten() for unit in units]) if units else torch.empty(0, device=self._here.device)
        steps = torch.split(self._scaled(metric, states, flat[None], 0.5), self._here.here, dim=1)
        along = [space.coordinates(step)[:, 0] for space, step in zip(self._spaces, steps, strict=True)]
        ratios = torch.cat([self._ratios(space, rate) for space in self._spaces])
        weights = torch.split((ratios - 1.0) * self._here.total(torch.cat(along)), [len(part) for part in along])
        changes = torch.cat([space.combined(part) for space, part in zip(self._spaces, weights, strict=True)])
        change = torch.split(self._scaled(metric, states, changes[None], -0.5)[0], [unit.numel() for unit in units])
        return [unit + piece.view_as(unit) for unit, piece in zip(units, change, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt, as far as it is held here: tensors and numbers."""
        held = self._held
        return {
            "taken": self.taken,
            "least": self._least,
            "rank": self.rank,
            "sizes": [] if held is None else held.sizes,
            "replicas": 0 if held is None else held.replicas,
            "spaces": [space.state_dict() for space in self._spaces],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learnt, at the next step; nothing, if blocks or replicas are others by then.

        Args:
            state: what `state_dict()` returned.

        Raises:
            ValueError: if the rank differs.
        """
        if state["rank"] != self.rank:
            raise ValueError(f"the state is of PairedProbes(rank={state['rank']}), got rank={self.rank}")
        self._loaded, self.taken, self._least = state, state["taken"], state["least"]

    @property
    def _here(self) -> "Held":
        if self._held is None:
            raise RuntimeError("attach comes before every other call")
        return self._held

    def _new_spaces(self, held: "Held") -> list[TrackedSubspace]:
        return [
            TrackedSubspace(
                min(self.rank, size),
                size,
                smoothing=self.smoothing,
                seed=self.seed + place,
                device=held.device,
                columns=columns,
            )
            for place, (size, columns) in enumerate(zip(held.sizes, held.columns, strict=True))
        ]

    def _ratios(self, space: TrackedSubspace, rate: float) -> Tensor:
        """ρ of every pair; 1 where it is not known."""
        sizes = space.eigenvalues.abs()
        ratios = (1.0 / (sizes * rate)).clamp_max(self.growth)
        return torch.where(space.uncertainties > _KNOWN * sizes, 1.0, ratios)

    def _signed(self, rows: Tensor) -> Tensor:
        """Rows with signs drawn for every block and row: so what blocks do to each other is without bias."""
        here = self._here.here
        if len(here) == 1:
            return rows
        generator = torch.Generator().manual_seed(self.taken)
        signs = 1.0 - 2.0 * torch.randint(2, (len(rows), len(here)), generator=generator)
        return rows * signs.repeat_interleave(torch.tensor(here), dim=1).to(rows)

    def _scaled(self, metric: Metric, states: Sequence[dict[str, Any]], rows: Tensor, power: float) -> Tensor:
        """Rows times a power of D, all parameters one after the other."""
        if not states:
            return rows
        pieces = torch.split(rows, [state["second_moment"].numel() for state in states], dim=1)
        scaled = [
            torch.stack([metric.scaled(state, row, power, self._least) for row in piece.to(state["second_moment"])])
            for state, piece in zip(states, pieces, strict=True)
        ]
        return torch.cat(scaled, dim=1)
