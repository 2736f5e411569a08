"""Rows of a tracked space: how they are kept, in fp32 or bfloat16, added up, and made orthonormal."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from replica_newton.curvature.gram import CHUNK, at_a_time, column_chunks, inner_products

DTYPES = torch.float32, torch.bfloat16
"""In which rows can be kept."""

_ROUNDS, _NEARLY = 6, 0.1
"""Of Cholesky QR: rounds at most, and deviation from orthonormal rows that the last one mends."""
_SHIFT, _ROUGH_SHIFT = 1e-13, 1e-3
"""What keeps its factors real, and those of a Gram matrix that does not know of the rounding of rows of any length."""


class Writer:
    """Writes some columns of fp32 rows to where they are kept; rounded up or down at random, if in bfloat16.

    Args:
        rows: `(order, N)`, which will be written to.
        seed: of the random numbers, the same for every chunk of columns.
    """

    def __init__(self, rows: Tensor, *, seed: int) -> None:
        self._dither: Tensor | None = None
        if rows.dtype == torch.bfloat16:
            shape = len(rows), min(rows.shape[1], at_a_time(CHUNK, rows.device))
            generator = torch.Generator(rows.device).manual_seed(seed)
            self._dither = torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32, device=rows.device)

    def __call__(self, target: Tensor, values: Tensor) -> None:
        """Write a chunk.

        Args:
            target: some columns of the rows, a chunk of `column_chunks`.
            values: fp32, of the same shape.
        """
        if self._dither is not None:
            # The upper 16 bits are those of bfloat16: the more there is below, the more often it carries.
            bits = values.view(torch.int32) + self._dither[:, : values.shape[1]]
            values = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
        target.copy_(values)


def kept_in(dtype: torch.dtype, rows: Tensor, *, seed: int) -> Tensor:
    """Rows as they are kept.

    Args:
        dtype: of `DTYPES`.
        rows: `(order, N)` fp32.
        seed: see `Writer`.

    Returns:
        They themselves in fp32.
    """
    if dtype == rows.dtype:
        return rows
    kept = torch.empty_like(rows, dtype=dtype)
    write = Writer(kept, seed=seed)
    for target, some in column_chunks(kept, rows):
        write(target, some)
    return kept


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """`weights @ rows` in fp32.

    Args:
        weights: `(k, order)`, on any device.
        rows: `(order, N)`, as they are kept.

    Returns:
        `(k, N)`.
    """
    product = torch.empty(len(weights), rows.shape[1], dtype=torch.float32, device=rows.device)
    weights = weights.to(product)
    for target, some in column_chunks(product, rows):
        torch.mm(weights, some.float(), out=target)
    return product


def orthonormal(
    rows: Tensor, total: Callable[[Tensor], Tensor], others: Sequence[Tensor] = (), gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of independent rows, that of Gram and Schmidt.

    Args:
        rows: `(order, N)` fp32, which the basis is written to.
        total: sums products over the processes that share the columns.
        others: rows that its products are wanted with.
        gram: products of the rows with each other, as they would be without rounding, if they are known.

    Returns:
        The basis, and its products with all other rows.

    Source:
        Fukaya et al. (2020), Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices.
    """
    # Sums over the columns are all it takes. A round leaves rounding times the condition of the rows.
    eye, products = torch.eye(len(rows), dtype=torch.float64), torch.empty(len(rows), 0, dtype=torch.float64)
    for _ in range(_ROUNDS):
        summed = gram is None
        if gram is None:
            gram, products = total(inner_products(rows, (rows, *others))).tensor_split([len(rows)], dim=1)
        lengths = gram.diagonal().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        cosines = gram / torch.outer(lengths, lengths)
        if summed:
            lower = torch.linalg.cholesky(cosines + _SHIFT * eye)
        else:
            lower, failed = torch.linalg.cholesky_ex(cosines + _ROUGH_SHIFT * eye)
            if int(failed):
                gram = None
                continue
        turn = torch.linalg.solve_triangular(lower, torch.diag(1.0 / lengths), upper=False)
        products, turned = turn @ products, turn.to(rows)
        for (some,) in column_chunks(rows):
            some.copy_(turned @ some)
        if summed and float((gram - eye).abs().max()) < _NEARLY:
            break
        gram = None
    return rows, products
