"""Replica rows: how M vectors of N elements are checked, centred and multiplied with each other in fp64."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 1 << 14
"""Columns converted to fp64 at a time: 128 KiB a row, so that the temporary of 2 x 8 rows stays in the cache."""

_ON_DEVICE = 64
"""How many times as many on a GPU, which has to be given much to do at once: 8 MiB a row."""

RESOLUTION = 1e-7
"""Lengths below this fraction of the longest row are rounding in an fp64 Gram matrix (√ε = 1.5e-8, with a margin)."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of N-sized results: fp64 if any input is fp64, else fp32 (half precision holds no differences)."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that `tensor` is a dense real floating-point tensor.

    Args:
        name: what the error calls it.
        tensor: the tensor to check.

    Raises:
        TypeError: if it is not one.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        got = f"{tensor.layout}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a dense real floating-point tensor, got {got}")


def check_rows(name: str, rows: Tensor, *, may_be_empty: bool = False) -> None:
    """Check that `rows` is a floating `(M, N)` matrix: one row a replica, M and N at least 1.

    Args:
        name: what the error calls the matrix.
        rows: the matrix to check.
        may_be_empty: whether N may be 0, as for a process that holds no columns.

    Raises:
        ValueError: if it is not two-dimensional or is empty.
    """
    check_floating(name, rows)
    if rows.dim() != 2 or rows.shape[0] == 0 or (rows.shape[1] == 0 and not may_be_empty):
        raise ValueError(f"{name} must have shape (M, N), one row a replica, M, N >= 1; got {tuple(rows.shape)}")


def check_finite(name: str, rows: Tensor) -> None:
    """Check that every element of `rows`, `(M, N)`, is finite.

    Args:
        name: what the error calls the matrix.
        rows: the matrix to check.

    Raises:
        ValueError: naming the first replica whose row holds nan or inf.
    """
    finite_elements = torch.isfinite(rows)
    finite = finite_elements.all(dim=1)
    if not bool(finite.all()):
        replica = int((~finite).nonzero()[0])
        bad = rows[replica].detach()[~finite_elements[replica]]
        raise ValueError(f"{name} must be finite; replica {replica} holds {float(bad[0])} ({bad.numel()} elements)")


def at_a_time(elements: int, device: torch.device) -> int:
    """How much is converted or made at a time on a device.

    Args:
        elements: that stay in the cache of a CPU.
        device: where.

    Returns:
        As many on a CPU, more elsewhere.
    """
    return elements if device.type == "cpu" else _ON_DEVICE * elements


def column_chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some columns of all matrices after the others; there is at least one chunk, though it may be empty.

    Args:
        rows: of as many columns, on one device.

    Returns:
        Of each a view of the same columns, `CHUNK` of them on a CPU.
    """
    width = at_a_time(CHUNK, rows[0].device)
    return zip(*(torch.split(one, width, dim=1) for one in rows), strict=True)


def inner_products(rows: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor]) -> Tensor:
    """Inner products of every row of one matrix with every row of another, `A Bᵀ`, summed in fp64.

    fp32 sums would bury singular values below about 3e-4 of the largest, the square root of the rounding error.

    Args:
        rows: `(a, N)`, any float dtype and device; or several such, one below the other.
        others: `(b, N)` on the same device, likewise.

    Returns:
        `(a, b)` in fp64 on the CPU, where all M×M work is done.
    """
    left, right = ([some] if isinstance(some, Tensor) else list(some) for some in (rows, others))
    a, b = (sum(map(len, some)) for some in (left, right))
    # What is on both sides is converted once.
    if (place := _place(right, left)) is not None:
        blocks, first, second = left, 0, place
    elif (place := _place(left, right)) is not None:
        blocks, first, second = right, place, 0
    else:
        blocks, first, second = left + right, 0, a
    device = blocks[0].device
    total = torch.zeros(a, b, dtype=torch.float64, device=device)
    if not total.numel():
        return total.cpu()
    in_fp64 = torch.empty(0, dtype=torch.float64, device=device)
    for chunks in column_chunks(*blocks):
        if len(chunks) == 1 and chunks[0].dtype == torch.float64:
            in_fp64 = chunks[0]
        else:
            # Into the memory of the chunk before: a fresh page costs more than to fill it.
            shape = sum(map(len, chunks)), chunks[0].shape[1]
            in_fp64 = in_fp64 if in_fp64.shape == shape else in_fp64.new_empty(shape)
            for target, chunk in zip(torch.split(in_fp64, [len(chunk) for chunk in chunks]), chunks, strict=True):
                target.copy_(chunk)
        total.addmm_(in_fp64[first : first + a], in_fp64[second : second + b].T)
    return total.cpu()


def _place(some: Sequence[Tensor], among: Sequence[Tensor]) -> int | None:
    """Rows of a list of matrices that come before some of them, if these follow each other there."""
    for start in range(len(among) - len(some) + 1):
        if all(one is other for one, other in zip(some, among[start:], strict=False)):
            return sum(map(len, among[:start]))
    return None


def unresolved(squares: Tensor, *, rtol: float, scale: float) -> int:
    """How many squared lengths, eigenvalues of a Gram matrix, are no more than rounding.

    Args:
        squares: `(n,)` eigenvalues of the Gram matrix, ascending.
        rtol: lengths up to `rtol` times the longest are not resolved.
        scale: largest squared length of the rows that the Gram matrix was summed from; lengths up to `RESOLUTION`
            times its root are not resolved either.

    Returns:
        The number of those that are not resolved, the first ones.
    """
    lengths: list[float] = squares.tolist()
    cut_off = max(rtol**2 * lengths[-1], RESOLUTION**2 * scale) if lengths else 0.0
    return sum(length <= cut_off for length in lengths)


@cache
def differences_basis(replicas: int) -> Tensor:
    """Orthonormal basis of the M-vectors that sum to zero (Helmert contrasts).

    Centred replica rows satisfy `Σ_m row_m = 0`, so their Gram matrix has the vector of ones as an exact null
    vector. Working in this basis drops that mode by construction, before anything is divided by a singular value,
    and makes any common shift of the rows cancel: they need not be centred at all.

    Args:
        replicas: M >= 1.

    Returns:
        `(M, M−1)` in fp64 on the CPU, columns orthonormal and orthogonal to the vector of ones. It is shared:
        do not write to it.
    """
    k = torch.arange(1, replicas, dtype=torch.float64, device="cpu")
    contrasts = torch.ones(replicas, max(replicas - 1, 0), dtype=torch.float64, device="cpu").triu()
    contrasts[1:].diagonal().copy_(-k)
    return contrasts / (k * (k + 1)).sqrt()
