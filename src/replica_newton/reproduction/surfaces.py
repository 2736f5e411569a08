"""Three surfaces in the plane that slow first-order methods down."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surface:
    """A function of two variables with a known minimum.

    Attributes:
        name: Identifier.
        lesson: What the methods do there, in a few words.
        description: Formula and difficulty in one sentence.
        function: Takes points `(…, 2)` to values `(…)`, twice differentiable by autograd.
        start: Where every method starts.
        minimum: Smallest value.
        minima: Points where it is reached.
        saddles: Points with zero gradient and an indefinite Hessian.
        limits: Ranges of the two variables that are drawn.
        levels: Heights above the minimum of the contours, ascending.
        budget: Steps after which a method has failed.
        longest_step: Length to which all second-order steps are cut, in units of the variables.
        radius: Root mean square length of the replicas' displacements, in units of the variables.
        rates: Rate of each first-order method; `compare_surfaces` finds them among `RATES`.
    """

    name: str
    lesson: str
    description: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: float
    minima: tuple[tuple[float, float], ...]
    saddles: tuple[tuple[float, float], ...]
    limits: tuple[tuple[float, float], tuple[float, float]]
    levels: tuple[float, ...]
    budget: int
    longest_step: float
    radius: float
    rates: Mapping[str, float]

    def gradient(self, x: Tensor) -> Tensor:
        """Gradients `(…, 2)` at points `(…, 2)`."""
        return self._derivatives(x)[1].detach()

    def hessian(self, x: Tensor) -> Tensor:
        """Hessians `(…, 2, 2)` at points `(…, 2)`."""
        x, gradient = self._derivatives(x, create_graph=True)
        # Points do not meet in the sum, so the gradient of one component is a row of the Hessian at each of them.
        rows = [torch.autograd.grad(component.sum(), x, retain_graph=True)[0] for component in gradient.unbind(-1)]
        return torch.stack(rows, dim=-2)

    def _derivatives(self, x: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Points that require a gradient, and their gradients."""
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            # Not torch.func: twice as slow here, and its jacrev takes seconds to load torch's compiler.
            (gradient,) = torch.autograd.grad(self.function(x).sum(), x, create_graph=create_graph)
        return x, gradient


def _turned(x: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Coordinates of points in axes turned against the clock, so that no method gains from axes along its own."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cosine * x[..., 0] + sine * x[..., 1], cosine * x[..., 1] - sine * x[..., 0]


def _point(u: float, v: float, degrees: float) -> tuple[float, float]:
    """Point with coordinates u, v in turned axes."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cosine * u - sine * v, sine * u + cosine * v


def _saddle(x: Tensor) -> Tensor:
    u, v = _turned(x, 15.0)
    return (u.square() - 1.0).square() / 4.0 + 10.0 * v.square()


def _plateau(x: Tensor) -> Tensor:
    u, v = _turned(x, 30.0)
    q = 1.5 * (u.square() + 4.0 * v.square())
    return q / (1.0 + q)


def _ravine(x: Tensor) -> Tensor:
    return (1.0 - x[..., 0]).square() + 10.0 * (x[..., 1] - x[..., 0].square()).square()


SURFACES: Mapping[str, Surface] = MappingProxyType(
    {
        surface.name: surface
        for surface in (
            Surface(
                name="saddle",
                lesson="H⁻¹ is drawn to it, |H|⁻¹ leaves it",
                description="(u² − 1)²/4 + 10 v², axes turned by 15°: the start lies beside the ridge u = 0.",
                function=_saddle,
                start=_point(0.01, 0.9, 15.0),
                minimum=0.0,
                minima=(_point(1.0, 0.0, 15.0), _point(-1.0, 0.0, 15.0)),
                saddles=((0.0, 0.0),),
                limits=((-1.5, 1.5), (-1.0, 1.1)),
                levels=(0.01, 0.05, 0.12, 0.2, 0.25, 0.35, 0.6, 1.0, 2.0, 4.0, 8.0),
                budget=120,
                longest_step=0.5,
                radius=0.05,
                rates=MappingProxyType({"sgd": 0.08, "momentum": 0.025, "adam": 0.1}),
            ),
            Surface(
                name="plateau",
                lesson="H⁻¹ climbs away, |H|⁻¹ crosses it",
                description="q/(1 + q) with q = 1.5 (u² + 4 v²), axes turned by 30°: flat and concave far out.",
                function=_plateau,
                start=(-2.7, 0.5),
                minimum=0.0,
                minima=((0.0, 0.0),),
                saddles=(),
                limits=((-3.6, 1.4), (-1.75, 1.75)),
                levels=(0.02, 0.1, 0.25, 0.45, 0.65, 0.8, 0.88, 0.92, 0.95, 0.97, 0.98),
                budget=200,
                longest_step=0.5,
                radius=0.05,
                rates=MappingProxyType({"sgd": 0.16, "momentum": 0.25, "adam": 0.5}),
            ),
            Surface(
                name="ravine",
                lesson="H⁻¹ and |H|⁻¹ take the bend alike",
                description="Rosenbrock's (1 − x)² + 10 (y − x²)²: steep across, flat along, and curved.",
                function=_ravine,
                start=(-1.2, 1.0),
                minimum=0.0,
                minima=((1.0, 1.0),),
                saddles=(),
                limits=((-1.7, 1.7), (-0.7, 1.68)),
                levels=(0.02, 0.1, 0.4, 1.0, 2.0, 4.0, 7.0, 12.0, 20.0, 35.0, 60.0),
                budget=500,
                longest_step=0.5,
                radius=0.01,
                rates=MappingProxyType({"sgd": 0.02, "momentum": 0.005, "adam": 0.2}),
            ),
        )
    }
)
"""The surfaces by their names, in the order in which they are drawn."""
