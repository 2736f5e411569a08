"""Products of a network's Hessian over a whole data set with blocks of vectors: by paired probes, or exactly.

Both work on a copy of the network in double precision. A network that stands still is looked at once, so the time is
well spent: the step h of a probe can be so short (1e-7 of ‖w‖) that few ReLU units switch on the way. In single
precision rounding asks for 1e-3, and the jumps of the gradient at the kinks then count as curvature.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from replica_newton.monitor.probes import refuse_once_differentiable
from replica_newton.topology import Simulated
from replica_newton.topology.simulated import Criterion


class HessianProducts(Protocol):
    """Products `H v` of one fixed Hessian.

    Attributes:
        size: N.
        device: where vectors live, in fp64.
        gradients: gradients over the whole data set evaluated so far; an exact product counts as two, which is about
            what it costs.
    """

    size: int
    device: torch.device
    gradients: int

    def __call__(self, vectors: Tensor, advance: Callable[[float], None] | None = None) -> Tensor:
        """Products of H with every row.

        Args:
            vectors: `(count, N)` fp64.
            advance: is told, after every batch, the share of the block that this batch was.

        Returns:
            `(count, N)` fp64, rows `H v`.
        """
        ...


class _FullBatch:
    """A copy of a network in double precision and evaluation mode, and a data set in batches."""

    def __init__(self, model: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be >= 1")
        if len(inputs) != len(targets) or not len(inputs):
            raise ValueError(f"inputs and targets must hold as many samples, >= 1; got {len(inputs)}, {len(targets)}")
        self._model = copy.deepcopy(model).double().eval()
        self._named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not self._named:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        self._criterion = criterion
        self._inputs, self._targets, self._batch_size = inputs, targets, batch_size
        self._sizes = [parameter.numel() for parameter in self._named.values()]
        self.size, self.device = sum(self._sizes), next(iter(self._named.values())).device
        self.gradients = 0

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs, targets and the share of all samples that they are."""
        pieces = torch.split(self._inputs, self._batch_size), torch.split(self._targets, self._batch_size)
        for inputs, targets in zip(*pieces, strict=True):
            yield _double(inputs), _double(targets), len(inputs) / len(self._inputs)

    def _loss(self, state: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self._criterion(functional_call(self._model, state, (inputs,)), targets)

    def _check(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.size or vectors.dtype != torch.float64:
            raise ValueError(
                f"vectors must be (count, {self.size}) in fp64, got {tuple(vectors.shape)}, {vectors.dtype}"
            )


class ProbedProducts(_FullBatch):
    """Hessian-vector products from differences of gradients on the same data: paired probes.

    `H v ≈ (∇L(w + h v/‖v‖) − ∇L(w)) · ‖v‖/h`. Every row is one replica's displacement; all replicas see all of the
    data, a batch at a time, together in one pass (`Simulated`). The gradient at w is evaluated once for all products.

    Args:
        model: the network; it is evaluated as in `model.eval()`, as batch statistics and dropout would change the
            loss from one probe to the next.
        criterion: loss of (outputs, targets), a mean over samples.
        inputs: `(samples, ...)`.
        targets: `(samples, ...)`.
        batch_size: samples evaluated at a time.
        relative_step: h over `max(‖w‖, 1)`; the default is near the square root of the rounding of fp64.

    Raises:
        ValueError: if an option is out of range, there is nothing to train or the data do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int = 512,
        relative_step: float = 1e-7,
    ) -> None:
        super().__init__(model, criterion, inputs, targets, batch_size)
        if not 0.0 < relative_step < 1.0:
            raise ValueError(f"{relative_step=} must be in (0, 1)")
        self._point = torch.cat([parameter.detach().flatten() for parameter in self._named.values()])
        self._step = relative_step * max(float(torch.linalg.vector_norm(self._point)), 1.0)
        self._base: Tensor | None = None

    def __call__(self, vectors: Tensor, advance: Callable[[float], None] | None = None) -> Tensor:
        """Products of H with every row; see `HessianProducts`."""
        self._check(vectors)
        if self._base is None:
            self._base = self._gradients(self._point[None], None)
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        displaced = self._gradients(self._point + self._step / lengths * vectors, advance)
        products: Tensor = (displaced - self._base) * (lengths / self._step)
        return products

    def _gradients(self, points: Tensor, advance: Callable[[float], None] | None) -> Tensor:
        """Gradients `(count, N)` over all data at the rows of `points`."""
        replicas = Simulated(len(points))
        pieces = zip(self._named.items(), torch.split(points, self._sizes, dim=1), strict=True)
        stacked = {name: piece.reshape(len(points), *p.shape) for (name, p), piece in pieces}
        total = torch.zeros_like(points)
        for inputs, targets, share in self._batches():
            evaluated = replicas.evaluate(self._model, self._loss, stacked, (inputs, targets), data="common")
            total.add_(evaluated.gradients, alpha=share)
            if advance is not None:
                advance(share)
        self.gradients += len(points)
        return total


class ExactProducts(_FullBatch):
    """Exact Hessian-vector products: gradients of `vᵀ∇L` (double backward).

    The graph of a batch's gradient is built once for all vectors of a block.

    Args:
        model: as in `ProbedProducts`.
        criterion: as in `ProbedProducts`.
        inputs: `(samples, ...)`.
        targets: `(samples, ...)`.
        batch_size: samples evaluated at a time.

    Raises:
        ValueError: if an option is out of range, there is nothing to train or the data do not fit together.

    Source:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor, *, batch_size: int = 512
    ) -> None:
        super().__init__(model, criterion, inputs, targets, batch_size)

    def __call__(self, vectors: Tensor, advance: Callable[[float], None] | None = None) -> Tensor:
        """Products of H with every row; see `HessianProducts`."""
        self._check(vectors)
        parameters = list(self._named.values())
        total = torch.zeros_like(vectors)
        for inputs, targets, share in self._batches():
            with torch.enable_grad():
                loss = self._loss(dict(self._named), inputs, targets)
                gradient = _flat(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
            refuse_once_differentiable([gradient])
            if gradient.requires_grad:  # else the loss is linear in all parameters
                for row, product in zip(vectors, total, strict=True):
                    pieces = torch.autograd.grad(gradient, parameters, row, retain_graph=True, materialize_grads=True)
                    product.add_(_flat(pieces), alpha=share)
            if advance is not None:
                advance(share)
        self.gradients += 2 * len(vectors)
        return total


def _double(samples: Tensor) -> Tensor:
    return samples.double() if samples.is_floating_point() else samples


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
