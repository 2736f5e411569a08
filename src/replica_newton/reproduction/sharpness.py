"""The largest Hessian eigenvalue at fixed parameters: from the gradients of replicas, and exactly."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replica_newton.spread import TrackedSubspace
from replica_newton.topology import Simulated
from replica_newton.topology.simulated import Criterion

__all__ = ["Criterion", "Sharpness", "exact_sharpness", "replica_sharpness"]

_RELATIVE_STEP = 1e-3  # as in CurvatureMonitor
_FEWEST_SWEEPS = 5  # from random directions two early values can agree by chance


@dataclass(frozen=True)
class Sharpness:
    """Largest eigenvalue of a Hessian, as one method found it.

    Attributes:
        value: λ_max.
        residual: `‖H x − λ x‖` of its unit vector; the exact H has an eigenvalue within that distance of λ.
        rounds: sweeps of replicas, or Hessian-vector products, that it took.
    """

    value: float
    residual: float
    rounds: int


def replica_sharpness(
    model: nn.Module,
    criterion: Criterion,
    inputs: Tensor,
    targets: Tensor,
    *,
    replicas: int = 8,
    tolerance: float = 0.01,
    sweeps: int = 12,
    seed: int = 0,
) -> Sharpness:
    """Largest Hessian eigenvalue at the model's parameters from the gradient differences of M replicas.

    Replica m keeps its own shard. In a sweep the M displacements go round once, so that every shard sees every one of
    them: the mean over the shards, less the gradient at the shared point, over the step h is `H q` on *all* samples,
    for M directions q at the price of M gradients. A `TrackedSubspace` of order M turns the directions (block power
    iteration). Without the round each direction would see one shard alone, whose sharpness is larger than that of all
    samples; so does `CurvatureMonitor`, at an M-th of the price.

    Args:
        model: the network, in fp32; left as it was.
        criterion: loss, a mean over samples.
        inputs: `(samples, ...)`; M divides the number.
        targets: `(samples, ...)`.
        replicas: M, at most the number of parameters.
        tolerance: relative change of λ_max from one sweep to the next at which the sweeps end.
        sweeps: at most so many; at least five are made where this allows them.
        seed: of the first directions.

    Returns:
        The largest Ritz value and its residual.

    Raises:
        ValueError: if M does not divide the samples or exceeds the number of parameters, or a gradient is not finite.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069; displacement as in `CurvatureMonitor`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    point = torch.cat([parameter.detach().flatten() for parameter in parameters])
    closure = Simulated(replicas).closure(model, criterion, inputs, targets)
    space = TrackedSubspace(replicas, point.numel(), smoothing=1.0, seed=seed)
    length = _RELATIVE_STEP * max(float(torch.linalg.vector_norm(point)), 1.0)
    base = closure.gradients(parameters, point.expand(replicas, -1)).gradients.mean(dim=0)
    value = math.nan
    while True:
        displaced = point + length * space.directions(replicas)
        gradients = torch.zeros_like(displaced)
        for turn in range(replicas):
            # Row m of the result belongs to shard m, at the point of direction m − turn.
            gradients += closure.gradients(parameters, displaced.roll(turn, 0)).gradients.roll(-turn, 0)
        space.observe((gradients / replicas - base) / length)
        before, top = value, int(space.eigenvalues.argmax())
        value = float(space.eigenvalues[top])
        settled = space.sweeps >= _FEWEST_SWEEPS and abs(value - before) <= tolerance * abs(value)
        if settled or space.sweeps >= sweeps:
            return Sharpness(value, float(space.residuals[top]), space.sweeps)


def exact_sharpness(
    model: nn.Module,
    criterion: Criterion,
    inputs: Tensor,
    targets: Tensor,
    *,
    tolerance: float = 0.02,
    products: int = 400,
    seed: int = 1,
) -> Sharpness:
    """Largest Hessian eigenvalue at the model's parameters by power iteration with exact Hessian-vector products.

    Products are gradients of `vᵀ∇L` (double backward), without displacements. Should the most negative eigenvalue
    dominate, the iteration goes on with `H + |λ_min| I`. The error of λ is of the order residual²/gap.

    Args:
        model: the network; left as it was.
        criterion: loss, a mean over samples.
        inputs: `(samples, ...)`.
        targets: `(samples, ...)`.
        tolerance: residual, relative to the eigenvalue of the iterated matrix, at which the iteration ends.
        products: at most so many.
        seed: of the first vector.

    Returns:
        The Rayleigh quotient of the last vector and its residual.

    Source:
        Pearlmutter (1994) for the products; LeCun, Simard and Pearlmutter (1993) for the power iteration.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        gradient = _flat(torch.autograd.grad(criterion(model(inputs), targets), parameters, create_graph=True))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(gradient.numel(), generator=generator).to(gradient)
    vector, shift = start / torch.linalg.vector_norm(start), 0.0
    done = 0
    while True:
        done += 1
        image = _flat(torch.autograd.grad(gradient @ vector, parameters, retain_graph=True, materialize_grads=True))
        value = float(vector @ image)
        residual = float(torch.linalg.vector_norm(image - value * vector))
        converged = residual <= tolerance * abs(value + shift)
        if done >= products or (converged and (value >= 0.0 or shift > 0.0)):
            return Sharpness(value, residual, done)
        if converged:
            shift, image = -value, start
        else:
            image = image + shift * vector
        vector = image / torch.linalg.vector_norm(image)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
