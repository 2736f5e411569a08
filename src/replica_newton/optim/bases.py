"""Orthonormal bases of factors: their eigenvectors, and those of orthogonal iteration."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor

from replica_newton.optim.grouping import grouped, in_parts

_TOGETHER = 1 << 24
"""Elements of the matrices that are decomposed at once on a GPU: 128 MiB in fp64."""
_MENDED = 0.1
"""Deviation from orthonormal columns that a second round of Cholesky QR takes down to rounding."""


def eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix.

    Args:
        factor: `(n, n)`, positive semi-definite.

    Returns:
        `(n, n)`, columns by descending eigenvalue.
    """
    # In fp32 LAPACK's divide and conquer as built by MKL fails, or returns nan and says nothing, on a sixth of all
    # matrices of low rank with many zeros, which is what units that do not fire make of a factor. In fp64 it has not
    # been seen to.
    vectors: Tensor
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(factor).eigenvectors
        if bool(vectors.isfinite().all()):
            return vectors.flip(1).contiguous()
    vectors = torch.linalg.eigh(factor.double()).eigenvectors
    return vectors.to(factor.dtype).flip(1).contiguous()


def orthonormal_bases(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Q of the QR decompositions of square matrices.

    On the CPU one after the other by Householder reflections. They wait for each other, on a GPU for most of the time;
    so there Q comes from matrix products and Cholesky factors in fp64, of all matrices of one size at once: that is Q
    up to the signs of its columns. A matrix that is too near a singular one for that is reflected after all.

    Args:
        matrices: `(n, n)` each, all on one device.

    Returns:
        As many, columns orthonormal.

    Source:
        Yamamoto et al. (2015), ETNA 44, "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    bases: list[Tensor | None] = [None] * len(matrices)
    if matrices and matrices[0].device.type != "cpu":
        kept, sound = [], []
        sizes = [matrix.numel() for matrix in matrices]
        alike = grouped((matrix.shape, matrix.dtype) for matrix in matrices).values()
        for places in chain.from_iterable(in_parts(some, sizes, _TOGETHER) for some in alike):
            Q, is_sound = _cholesky_qr(torch.stack([matrices[place] for place in places]))
            kept += [(place, one) for place, one in zip(places, Q, strict=True)]
            sound.append(is_sound)
        for (place, one), good in zip(kept, torch.cat(sound).tolist(), strict=True):
            bases[place] = one if good else None
    return [
        torch.linalg.qr(matrix).Q if basis is None else basis for matrix, basis in zip(matrices, bases, strict=True)
    ]


def _cholesky_qr(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Q of `(k, n, n)`, and of which it is sound: a second round mends what the first leaves, unless it is far off."""
    Q = matrices.double()
    Q = Q / torch.linalg.vector_norm(Q, dim=-2, keepdim=True).clamp_min(torch.finfo(Q.dtype).tiny)
    gram, failed = Q.mT @ Q, torch.zeros(len(Q), dtype=torch.int32, device=Q.device)
    for again in (True, False):
        lower, info = torch.linalg.cholesky_ex(gram)
        Q, failed = torch.linalg.solve_triangular(lower.mT, Q, upper=True, left=False), failed + info
        gram = Q.mT @ Q if again else gram
    deviations = (gram - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().amax(dim=(-2, -1))
    return Q.to(matrices.dtype), (deviations < _MENDED) & (failed == 0)
