"""The loss of a network as a function of one flat vector, with exact derivatives: what the mechanism is measured on."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton.training.datasets import Dataset
from replica_newton.training.models import Activation, reference_convnet

CHUNK = 1024
"""Samples differentiated at a time, so that the activations of a pass stay small."""

TRAINING_RATE = 0.05
TRAINING_BATCH = 256


class Samples(NamedTuple):
    """Samples that a loss is the mean over.

    Attributes:
        inputs: `(n, ...)`.
        targets: `(n,)` classes, or `(n, ...)`.
    """

    inputs: Tensor
    targets: Tensor

    def shards(self, replicas: int) -> list["Samples"]:
        """Equal shards, one for each replica; what does not divide is left out."""
        size = len(self.targets) // replicas
        return [self.take(torch.arange(m * size, (m + 1) * size)) for m in range(replicas)]

    def take(self, rows: Tensor) -> "Samples":
        """The samples with the given indices."""
        return Samples(self.inputs[rows], self.targets[rows])

    def chunks(self) -> Iterator[tuple[float, "Samples"]]:
        """Parts of at most `CHUNK` samples, with their share of all."""
        for inputs, targets in zip(torch.split(self.inputs, CHUNK), torch.split(self.targets, CHUNK), strict=True):
            yield len(targets) / len(self.targets), Samples(inputs, targets)


class LossSurface:
    """Mean loss of a module as a function f(w) of its N parameters as one flat vector.

    Args:
        module: the network; it is copied, so later changes do not reach this object.
        criterion: mean loss of `(module(inputs), targets)`.
        dtype: of the parameters and of everything computed. Differences between replicas that stand very close
            together drown in the rounding of fp32.

    Attributes:
        point: `(N,)`, the module's own parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._module = copy.deepcopy(module).to(dtype)
        self._criterion = criterion
        self._shapes = {name: parameter.shape for name, parameter in self._module.named_parameters()}
        self.point = torch.cat([parameter.detach().flatten() for parameter in self._module.parameters()])

    def loss(self, point: Tensor, samples: Samples) -> Tensor:
        """Mean loss f(w) over samples, differentiable in w, `(N,)`."""
        pieces = torch.split(point, [shape.numel() for shape in self._shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}
        dtype = self.point.dtype
        inputs, targets = (rows.to(dtype) if rows.is_floating_point() else rows for rows in samples)
        return self._criterion(torch.func.functional_call(self._module, named, (inputs,)), targets)

    def gradients(self, points: Tensor, samples: Sequence[Samples]) -> Tensor:
        """Gradients `g_m = ∇f_m(w_m)`.

        Args:
            points: `(M, N)`, one row a replica.
            samples: those of every replica; or one entry, common to all.

        Returns:
            `(M, N)`.
        """
        own = list(samples) if len(samples) > 1 else [samples[0]] * len(points)
        rows = torch.zeros(points.shape, dtype=self.point.dtype)
        for m, (point, data) in enumerate(zip(points, own, strict=True)):
            leaf = point.detach().to(self.point.dtype).requires_grad_()
            for share, chunk in data.chunks():
                rows[m] += share * torch.autograd.grad(self.loss(leaf, chunk), leaf)[0]
        return rows

    def hessian(self, point: Tensor, samples: Samples) -> Callable[[Tensor], Tensor]:
        """Exact Hessian products at one point, by double backward.

        Args:
            point: `(N,)`.
            samples: the samples of the loss.

        Returns:
            The function from `(k, N)` vectors to `(k, N)` products `H v`. It keeps the graph of the first
            derivative, about 0.2 MB a sample for the reference network, for as long as it lives.
        """
        leaf = point.detach().to(self.point.dtype).requires_grad_()
        parts = [
            (share, torch.autograd.grad(self.loss(leaf, chunk), leaf, create_graph=True)[0])
            for share, chunk in samples.chunks()
        ]

        def products(vectors: Tensor) -> Tensor:
            rows = torch.zeros_like(vectors, dtype=leaf.dtype)
            for share, gradient in parts:
                for row, vector in zip(rows, vectors.to(leaf.dtype), strict=True):
                    row += share * torch.autograd.grad(gradient, leaf, vector, retain_graph=True)[0]
            return rows

        return products


def train_networks(
    dataset: Dataset, *, activation: Activation, seed: int, steps: Sequence[int], tell: Callable[[float], None]
) -> list[nn.Sequential]:
    """The reference network after some steps of plain SGD (rate 0.05, batches of 256).

    Args:
        dataset: training data.
        activation: of the network.
        seed: of its initialisation and of the batches; the global random state stays as it is.
        steps: numbers of steps at which a copy is taken, ascending.
        tell: is told the share of the steps done.

    Returns:
        The copies, one for each entry of `steps`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = reference_convnet(dataset.input_shape, dataset.classes, activation=activation)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for step in range(steps[-1] + 1):
        if step in steps:
            copies.append(copy.deepcopy(model))
        rows = torch.randint(len(dataset.train_labels), (TRAINING_BATCH,), generator=generator)
        loss = cross_entropy(model(dataset.train_inputs[rows]), dataset.train_labels[rows])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=TRAINING_RATE)
        if step % 50 == 0:
            tell(step / max(steps[-1], 1))
    return copies


def top_eigenpairs(
    hessian: Callable[[Tensor], Tensor], size: int, count: int, *, tolerance: float = 1e-3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Hessian eigenpairs of largest magnitude, by implicitly restarted Lanczos on exact products.

    Args:
        hessian: products, as `LossSurface.hessian` gives them.
        size: N.
        count: how many pairs, below N.
        tolerance: residual `‖H x − θ x‖` allowed, relative to |θ|.
        seed: of the first vector.

    Returns:
        Eigenvalues `(count,)`, signed, by magnitude descending, and orthonormal rows `(count, N)`, both fp64.

    Source:
        Lehoucq, Sorensen and Yang, ARPACK Users' Guide (1998).
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return hessian(torch.from_numpy(vector.copy()).reshape(1, -1)).flatten().double().numpy()

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    first = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    # The space is wider than the default for few pairs: fewer restarts, and the products cost far more than the space.
    values, vectors = eigsh(
        operator, k=count, which="LM", tol=tolerance, v0=first, ncv=min(size, max(2 * count + 10, 20))
    )
    order = np.argsort(-np.abs(values), kind="stable")
    return torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].T.copy())
