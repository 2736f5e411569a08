"""Dense fp64 references: the formulas written literally with N×M and N×N matrices, and problems to try them on.

Nothing here uses the package. Replica rows are `(M, N)` as in the package; matrices inside are N×M as in the paper.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    """Random state of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal fp64 tensor."""
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def orthogonal(n: int, *, seed: int) -> Tensor:
    """Random orthogonal n×n matrix."""
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def symmetric(spectrum: list[float] | Tensor, *, seed: int) -> Tensor:
    """Random symmetric matrix with the given eigenvalues."""
    values = torch.as_tensor(spectrum, dtype=F64)
    Q = orthogonal(values.numel(), seed=seed)
    H = Q @ values.diag() @ Q.T
    return (H + H.T) / 2


def displacements(M: int, N: int, *, seed: int, smallest: float = 0.5) -> Tensor:
    """Replica rows `(M, N)` that sum to zero, with singular values from 1 down to `smallest` and rank min(M−1, N)."""
    rank = min(M - 1, N)
    contrasts = torch.linalg.qr(torch.cat((torch.ones(M, 1, dtype=F64), normal(M, rank, seed=seed)), dim=1)).Q[:, 1:]
    return contrasts @ torch.linspace(1.0, smallest, rank, dtype=F64).diag() @ orthogonal(N, seed=seed + 1)[:rank]


class Quadratic(NamedTuple):
    """Replicas on `f(w) = ½ wᵀHw + bᵀw`: its Hessian, parameters and gradients `(M, N)`."""

    H: Tensor
    w: Tensor
    g: Tensor


def quadratic(spectrum: list[float] | Tensor, M: int, *, seed: int, spread: float = 1.0) -> Quadratic:
    """Replicas around a random point of a quadratic whose Hessian has the given eigenvalues."""
    H = symmetric(spectrum, seed=seed)
    N = H.shape[0]
    w = normal(N, seed=seed + 2) + spread * displacements(M, N, seed=seed + 3)
    return Quadratic(H, w, w @ H + normal(N, seed=seed + 5))


def centred(rows: Tensor) -> Tensor:
    """Replica rows `(M, N)` as the paper's centred matrix, N×M in fp64."""
    rows = rows.to(F64)
    return (rows - rows.mean(dim=0)).T


def paper_inverse_hvp(w: Tensor, g: Tensor, z: Tensor, *, rtol: float = 1e-9) -> Tensor:
    """`z_⊥ + Σ_i (u_iᵀ z) W v_i / σ_i`, from the SVD of the centred N×M matrix G itself (not of its Gram matrix)."""
    W, G, z = centred(w), centred(g), z.to(F64)
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    rank = int((sigma > rtol * sigma[0]).sum()) if float(sigma[0]) > 0.0 else 0
    U = U[:, :rank]
    product = z - U @ (U.T @ z)
    for i in range(rank):
        product = product + (U[:, i] @ z) * (W @ Vh[i]) / sigma[i]
    return product


def anderson_matrix(w: Tensor, g: Tensor, *, rtol: float = 1e-9) -> Tensor:
    """`Ĥ⁻¹ = I + (W − G) G⁺`, N×N: type-II Anderson mixing."""
    W, G = centred(w), centred(g)
    return torch.eye(W.shape[0], dtype=F64) + (W - G) @ torch.linalg.pinv(G, rtol=rtol)


class DensePairs(NamedTuple):
    """Ritz values by |θ| descending, unit Ritz vectors as columns, and `H X` as the replicas show it."""

    values: Tensor
    vectors: Tensor
    images: Tensor


def dense_ritz(w: Tensor, g: Tensor) -> DensePairs:
    """Rayleigh–Ritz in the span of W by a QR decomposition of the N×(M−1) matrix.

    One column of centred W is dropped: the columns sum to zero. The others must be independent.
    """
    Q, R = torch.linalg.qr(centred(w)[:, :-1])
    HQ = torch.linalg.solve(R, centred(g)[:, :-1], left=False)
    projected = Q.T @ HQ
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True)
    return DensePairs(values[order], Q @ rotation[:, order], HQ @ rotation[:, order])


class FlatLoss(NamedTuple):
    """A module's loss as a function of one flat parameter vector, that vector, and the dense Hessian there."""

    loss: Callable[[Tensor], Tensor]
    w: Tensor
    hessian: Tensor

    def gradients(self, rows: Tensor) -> Tensor:
        """Gradients `(M, N)` at every row."""
        return torch.stack([torch.func.grad(self.loss)(row) for row in rows])


def flat_loss(module: torch.nn.Module, loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> FlatLoss:
    """Loss of a module as a function of its flattened parameters, with the exact Hessian.

    Reverse over reverse: `torch.func.hessian` loads forward mode, whose import warns of a deprecation in torch 2.13.
    """
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    flat = torch.cat([parameter.flatten() for parameter in named.values()])

    def of(vector: Tensor) -> Tensor:
        pieces = vector.split([parameter.numel() for parameter in named.values()])
        values = {name: piece.view_as(named[name]) for name, piece in zip(named, pieces, strict=True)}
        return loss(lambda inputs: torch.func.functional_call(module, values, (inputs,)))

    return FlatLoss(of, flat, torch.func.jacrev(torch.func.grad(of))(flat))


def tanh_network(*, seed: int = 0) -> FlatLoss:
    """Least squares of a 3–4–1 tanh network in fp64 on 12 samples: 21 parameters, an indefinite Hessian."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    inputs, targets = normal(12, 3, seed=seed + 1), normal(12, 1, seed=seed + 2)
    return flat_loss(module, lambda model: (model(inputs) - targets).square().mean())
