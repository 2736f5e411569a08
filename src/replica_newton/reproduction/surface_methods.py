"""The ways of nine methods over the surfaces, and how many steps each needs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from replica_newton.curvature import SecantCurvature, exact_newton_step, saddle_free_inverse_hvp
from replica_newton.reproduction.surfaces import SURFACES, Surface
from replica_newton.spread import RandomDirections

NOISE = 0.002
"""Standard deviation of every component of every gradient, as if each came from a batch of its own."""

GRADIENTS = 8
"""Gradients whose mean a method without replicas sees at its point: as many as eight replicas evaluate."""

TOLERANCE = 1e-3
"""A method has arrived when its height above the minimum stays below this."""

HOLD = 25
"""Points in a row that must be within the tolerance: to fly through the minimum is not to arrive."""

SEEDS = (0, 1, 2)
"""Seeds of noise and directions in a comparison."""

RATES = tuple(
    round(factor * 10.0**decade, 6)
    for decade in (-3, -2, -1, 0)
    for factor in (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
)
"""Rates tried for each first-order method on each surface: ten a decade, from 0.001 to 8."""

MOMENTUM = 0.9

_ADAM_DECAYS = (0.9, 0.999)
_ADAM_FLOOR = 1e-8
_AT_SADDLE = 0.1


@dataclass(frozen=True)
class Method:
    """A rule for the next point.

    Attributes:
        name: Identifier.
        label: Name in legends.
        rule: How a gradient becomes a step: by a rate; by `H⁻¹` ("newton"); by `|H|⁻¹` ("saddle-free").
        replicas: Number of replicas whose differences stand in for the Hessian; 0 where it is the exact one.
    """

    name: str
    label: str
    rule: Literal["sgd", "momentum", "adam", "newton", "saddle-free"]
    replicas: int = 0

    @property
    def is_first_order(self) -> bool:
        """Whether it knows gradients alone, and needs a rate."""
        return self.rule in ("sgd", "momentum", "adam")


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("sgd", "SGD", "sgd"),
            Method("momentum", f"momentum {MOMENTUM:g}", "momentum"),
            Method("adam", "Adam", "adam"),
            Method("newton", "Newton, exact H⁻¹", "newton"),
            Method("paper-3", "replicas, paper, M = 3", "newton", 3),
            Method("paper-8", "replicas, paper, M = 8", "newton", 8),
            Method("saddle-free", "saddle-free Newton, exact |H|⁻¹", "saddle-free"),
            Method("saddle-free-3", "replicas, |θ|, M = 3", "saddle-free", 3),
            Method("saddle-free-8", "replicas, |θ|, M = 8", "saddle-free", 8),
        )
    }
)
"""All methods by their names. The replicas' literal step (the paper's) is Newton's, their |θ| step the saddle-free."""


def trajectory(
    surface: Surface,
    method: Method,
    steps: int,
    *,
    rate: float | None = None,
    noise: float = NOISE,
    seed: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    """Way of a method over a surface.

    First-order methods have a constant rate and no limit to their steps. Second-order steps, exact or from replicas,
    have rate 1 and are cut to `surface.longest_step`. Replicas stand at seeded random displacements, new at every
    step; the gradient that is multiplied by the inverse is the mean of theirs.

    Args:
        surface: Where it goes.
        method: What goes.
        steps: Number of steps.
        rate: Rate of a first-order method, `surface.rates` if None; of no use to the others.
        noise: Standard deviation of the noise on each of the gradients at the replicas, or on each of `GRADIENTS`
            that the other methods take the mean of.
        seed: Seed of the noise and of the displacements.
        start: `(2,)` first point in fp64, `surface.start` if None.

    Returns:
        `(steps + 1, 2)` points in fp64, the start first.

    Raises:
        ValueError: if `steps` is negative, or `noise` is negative or not finite.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, figure 1.
    """
    if steps < 0:
        raise ValueError(f"{steps=} must be >= 0")
    if not 0.0 <= noise < float("inf"):
        raise ValueError(f"{noise=} must be finite and >= 0")
    point = torch.tensor(surface.start, dtype=torch.float64) if start is None else start
    return torch.stack(list(islice(_points(surface, method, rate, noise, seed, point), steps + 1)))


def approach(surface: Surface, method: Method, *, seed: int = 0) -> tuple[Tensor, bool]:
    """The trajectory up to its arrival, or to the end of the budget.

    Args:
        surface: Where it goes.
        method: What goes, a first-order method at its rate in `surface.rates`.
        seed: Seed of the noise and of the displacements.

    Returns:
        `(steps + 1, 2)` points in fp64, and whether the last one is an arrival.
    """
    points: list[Tensor] = []
    inside = 0
    start = torch.tensor(surface.start, dtype=torch.float64)
    for point in islice(_points(surface, method, None, NOISE, seed, start), surface.budget + 1):
        points.append(point)
        inside = inside + 1 if float(surface.function(point)) - surface.minimum <= TOLERANCE else 0
        if inside == HOLD:
            return torch.stack(points[: 1 - HOLD]), True
    return torch.stack(points), False


def compare_surfaces(*, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Steps that every method needs on every surface, first-order methods at the best of `RATES`.

    A method arrives with the first of `HOLD` points in a row within `TOLERANCE` of the minimum. The best rate is the
    one with the fewest steps (median over the seeds), the lowest among equals; where none arrives, the one that ends
    lowest. Second-order methods have rate 1, but their longest step and the replicas' radius were chosen by hand, a
    radius among three for each surface.

    Args:
        seeds: Seeds of noise and displacements; takes some seconds for three.

    Returns:
        JSON-able: `settings`, and under `surfaces` by name of surface and method `rate`, `rates_tried` (both None for
        second-order methods), `steps` (median; None if not within the budget), `steps_by_seed`, `final_value` (height
        above the minimum at the last point, median) and `ended_at_saddle` (in most seeds).
    """
    surfaces = {
        surface.name: {
            "description": surface.description,
            "budget": surface.budget,
            "longest_step": surface.longest_step,
            "radius": surface.radius,
            "methods": {
                method.name: (_best_rate if method.is_first_order else _second_order_row)(surface, method, seeds)
                for method in METHODS.values()
            },
        }
        for surface in SURFACES.values()
    }
    settings = {
        "noise": NOISE,
        "gradients_without_replicas": GRADIENTS,
        "tolerance": TOLERANCE,
        "hold": HOLD,
        "seeds": list(seeds),
        "momentum": MOMENTUM,
    }
    return {"settings": settings, "surfaces": surfaces}


def _points(
    surface: Surface, method: Method, rate: float | None, noise: float, seed: int, start: Tensor
) -> Iterator[Tensor]:
    """Points `(2,)` of one trajectory, without end."""
    if method.is_first_order:
        rates = torch.tensor([surface.rates[method.name] if rate is None else rate], dtype=torch.float64)
        return (x[0, 0] for x in _first_order(surface, method, rates, noise, (seed,), start))
    return (x[0] for x in _second_order(surface, method, noise, (seed,), start))


def _noise(noise: float, seeds: Sequence[int], count: int) -> Iterator[Tensor]:
    """Noise on `count` gradients for each of the seeds, `(seeds, count, 2)`, step after step."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        draws = [torch.randn(count, 2, generator=generator, dtype=torch.float64) for generator in generators]
        yield noise * torch.stack(draws)


def _first_order(
    surface: Surface, method: Method, rates: Tensor, noise: float, seeds: Sequence[int], start: Tensor
) -> Iterator[Tensor]:
    """Points `(rates, seeds, 2)` for all rates and seeds together, without end."""
    x = start.expand(len(rates), len(seeds), 2)
    rates = rates.reshape(-1, 1, 1)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    yield x
    for step, draws in enumerate(_noise(noise, seeds, GRADIENTS), start=1):
        gradient = surface.gradient(x) + draws.mean(dim=1)
        if method.rule == "momentum":
            gradient = mean = MOMENTUM * mean + gradient
        elif method.rule == "adam":
            first, second = _ADAM_DECAYS
            mean = first * mean + (1.0 - first) * gradient
            square = second * square + (1.0 - second) * gradient.square()
            scale = (square / (1.0 - second**step)).sqrt() + _ADAM_FLOOR
            gradient = mean / (1.0 - first**step) / scale
        x = x - rates * gradient
        yield x


def _second_order(
    surface: Surface, method: Method, noise: float, seeds: Sequence[int], start: Tensor
) -> Iterator[Tensor]:
    """Points `(seeds, 2)` of a second-order method for all seeds together, without end."""
    x = start.expand(len(seeds), 2)
    spreads = [RandomDirections(seed, radius=surface.radius) for seed in seeds]
    yield x
    for number, draws in enumerate(_noise(noise, seeds, method.replicas or GRADIENTS)):
        if method.replicas:
            W = torch.stack([spread.displacements(draws[0], 1.0, number) for spread in spreads])
            G = surface.gradient(x.unsqueeze(1) + W) + draws
            step = torch.stack([_replica_step(*pair, method) for pair in zip(W, G, strict=True)])
        else:
            gradients = surface.gradient(x) + draws.mean(dim=1)
            pairs = zip(surface.hessian(x), gradients, strict=True)
            step = torch.stack([_exact_step(*pair, method) for pair in pairs])
        length = step.norm(dim=1, keepdim=True)
        x = x - step * (surface.longest_step / length).clamp(max=1.0)
        yield x


def _replica_step(W: Tensor, G: Tensor, method: Method) -> Tensor:
    """Product of the mean gradient with the inverse that replicas at displacements W, `(M, 2)`, see."""
    curvature = SecantCurvature(W, G)
    gradient = G.mean(dim=0)
    if method.rule == "newton":
        return curvature.inverse_hvp(gradient)
    return saddle_free_inverse_hvp(curvature.eigenvalues, curvature.eigenvectors, gradient)


def _exact_step(hessian: Tensor, gradient: Tensor, method: Method) -> Tensor:
    """Product of the gradient with the inverse of the Hessian, or of its absolute value."""
    if method.rule == "newton":
        return exact_newton_step(hessian, gradient)
    values, vectors = torch.linalg.eigh(hessian)
    return saddle_free_inverse_hvp(values, vectors.T, gradient)


def _all_arrived(steps: Tensor) -> bool:
    return bool(steps.isfinite().all())


def _best_arrived(steps: Tensor) -> bool:
    """Whether all seeds of the fastest rate have arrived, `(rates, seeds)`: no later arrival makes another faster."""
    counts = steps.median(dim=1).values.tolist()
    return _all_arrived(steps[counts.index(min(counts))])


def _follow(
    surface: Surface, points: Iterable[Tensor], decided: Callable[[Tensor], bool] = _all_arrived
) -> tuple[Tensor, Tensor, Tensor]:
    """Arrival, height above the minimum and place where trajectories end, which is `HOLD` points after arrival.

    Args:
        surface: Where they go.
        points: `(…, 2)` points, step after step, of any number of trajectories.
        decided: Whether to stop, given the steps until arrival of those that have arrived.

    Returns:
        Steps until arrival `(…)`, infinite without it, last heights `(…)` and last points `(…, 2)`.
    """
    x = next(points := iter(points))
    steps = torch.full(x.shape[:-1], float("inf"), dtype=torch.float64)
    inside = torch.zeros(x.shape[:-1], dtype=torch.int64)
    heights, ends, number = steps, x, 0
    while True:
        running = steps.isinf()
        height = surface.function(x) - surface.minimum
        heights, ends = torch.where(running, height, heights), torch.where(running.unsqueeze(-1), x, ends)
        inside = torch.where(height <= TOLERANCE, inside + 1, 0)
        steps = torch.where(running & (inside >= HOLD), float(number - HOLD + 1), steps)
        following = next(points, None)
        if following is None or decided(steps):
            return steps, heights, ends
        x, number = following, number + 1


def _best_rate(surface: Surface, method: Method, seeds: Sequence[int]) -> dict[str, Any]:
    """Row of a first-order method at its best rate."""
    start = torch.tensor(surface.start, dtype=torch.float64)
    points = _first_order(surface, method, torch.tensor(RATES, dtype=torch.float64), NOISE, seeds, start)
    steps, heights, ends = _follow(surface, islice(points, surface.budget + 1), _best_arrived)
    # A rate that diverges ends in NaN, which no comparison would put last.
    last = torch.where(heights.isfinite(), heights, float("inf")).median(dim=1).values.tolist()
    counts = steps.median(dim=1).values.tolist()
    best = min(range(len(RATES)), key=lambda i: (counts[i], last[i] if math.isinf(counts[i]) else 0.0))
    return _row(surface, steps[best], heights[best], ends[best]) | {"rate": RATES[best], "rates_tried": list(RATES)}


def _second_order_row(surface: Surface, method: Method, seeds: Sequence[int]) -> dict[str, Any]:
    """Row of a second-order method."""
    start = torch.tensor(surface.start, dtype=torch.float64)
    points = _second_order(surface, method, NOISE, seeds, start)
    steps, heights, ends = _follow(surface, islice(points, surface.budget + 1))
    return _row(surface, steps, heights, ends) | {"rate": None, "rates_tried": None}


def _row(surface: Surface, steps: Tensor, heights: Tensor, ends: Tensor) -> dict[str, Any]:
    """What all rows say: `(seeds,)` steps and heights, `(seeds, 2)` ends."""
    by_seed = [int(count) if math.isfinite(count) else None for count in steps.tolist()]
    middle = median(steps.tolist())
    final = median(heights.tolist())
    saddles = torch.tensor(surface.saddles, dtype=torch.float64).reshape(-1, 2)
    at_saddle = ((ends.unsqueeze(1) - saddles).norm(dim=-1) < _AT_SADDLE).any(dim=1)
    return {
        "steps": int(middle) if math.isfinite(middle) else None,
        "steps_by_seed": by_seed,
        "final_value": final if math.isfinite(final) else None,
        "ended_at_saddle": 2 * int(at_saddle.sum()) > len(at_saddle),
    }
