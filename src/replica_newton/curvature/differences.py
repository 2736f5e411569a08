"""Rows of several replicas as differences to the first: their inner products, and their sums with weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from replica_newton.curvature.gram import CHUNK, at_a_time, inner_products, working_dtype

Which = Literal["W", "G", "both"]

_CHUNK = 1 << 18
"""Elements of all rows that are made at a time: 2 MiB in fp64, which stays in the cache of a CPU."""


class Differences:
    """`W_m − W_0` and `G_m − G_0` for m = 1 … M−1: M−1 rows of each, or both in this order.

    Weights that sum to zero over the replicas make the same of them as of centred rows, and the first replica's own row
    of zeros need not be kept. Between replicas that stand close together the differences are exact.

    Args:
        W: `(M, N)`.
        G: `(M, N)`, on the same device.
        copy: whether the differences are kept, 2 (M−1) N elements. Else they are made some columns at a time, in the
            cache, whenever they are asked for: W and G must not change before they are released.

    Attributes:
        dtype: of the rows, fp32, or fp64 if an input is fp64.
        device: of the rows.
        elements: N.
    """

    def __init__(self, W: Tensor, G: Tensor, *, copy: bool) -> None:
        self.dtype, self.device = working_dtype(W, G), W.device
        self._replicas, self.elements = W.shape
        self._sources = {"W": W.detach(), "G": G.detach()}
        self._kept: Tensor | None = None
        self._in_fp64: Tensor | None = None
        self._memory = torch.empty(0)  # for a few columns of all rows, used again: who asks for few asks often
        if copy:
            self._kept = torch.empty(self._count("both"), self.elements, dtype=self.dtype, device=self.device)
            self._make("both", slice(0, self.elements), self._kept)
            self._sources = {}
            # One chunk is kept in fp64 as well: to convert it again for every product would cost more than the product.
            self._in_fp64 = self._of("G").double() if self.elements <= CHUNK else None

    def release(self) -> None:
        """Let go of what was not copied; whatever needs it raises `RuntimeError` from then on."""
        self._sources = {}

    def parted(self) -> bool:
        """Whether any difference in W is not zero."""
        return any(bool(rows.any()) for _, rows in self._chunks("W", self.dtype))

    def squared_displacements(self) -> float:
        """Sum of the squares of all differences in W, in `dtype`."""
        return sum(float(rows.flatten() @ rows.flatten()) for _, rows in self._chunks("W", self.dtype))

    def gradient_gram(self) -> Tensor:
        """Inner products of the differences in G, `(M−1, M−1)` in fp64 on the CPU."""
        if self._in_fp64 is not None:
            return inner_products(self._in_fp64, self._in_fp64)
        return self._sum("G", lambda rows, _: (rows, rows))

    def displacement_products(self) -> tuple[Tensor, Tensor]:
        """Inner products of the differences in W with those in W and in G, `(M−1, M−1)` each, in fp64 on the CPU."""
        WW, WG = self._sum("both", lambda rows, _: (rows[: len(rows) // 2], rows)).tensor_split(2, dim=1)
        return WW, WG

    def products(self, vector: Tensor | None) -> Tensor:
        """Inner products of all rows, the last of which is a vector, with each other, in one pass.

        Args:
            vector: `(N,)`; None for none.

        Returns:
            Of 2 (M−1) rows, or one more, in fp64 on the CPU.
        """
        return self._sum("both", lambda rows, _: (rows, rows), () if vector is None else (vector,))

    def dots(self, vectors: Tensor, which: Which) -> Tensor:
        """Inner products of vectors with the rows.

        Args:
            vectors: `(k, N)`.
            which: of the rows.

        Returns:
            `(k, M−1)`, or `(k, 2M−2)` for both, in fp64 on the CPU.
        """
        if which == "G" and self._in_fp64 is not None:
            return inner_products(vectors, self._in_fp64)
        return self._sum(which, lambda rows, columns: (vectors[:, columns].to(rows), rows))

    def combine(self, weights: Tensor, some: slice | None = None) -> Tensor:
        """Sums of all rows with weights.

        Rows that are not kept are not made for it either: it is W and G, summed with weights that sum to zero. What
        cancels leaves the rounding of W and G themselves, which their differences have already.

        Args:
            weights: `(2M−2,)` or `(k, 2M−2)`.
            some: columns; None for all.

        Returns:
            `(N,)` or `(k, N)`, in `dtype`; or as many columns as there are in `some`.
        """
        weights = weights.to(self.device, self.dtype)
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self.combine(weights, some)
        some = slice(0, self.elements) if some is None else some
        if self._kept is not None:
            return weights @ self._kept[:, some]
        rows = weights if weights.dim() == 2 else weights[None]
        on_W, on_G = (torch.cat((-own.sum(dim=1, keepdim=True), own), dim=1) for own in rows.tensor_split(2, dim=1))
        W, G = self._source("W"), self._source("G")
        sums = weights.new_empty(len(rows), some.stop - some.start)
        width = max(1, at_a_time(4 * _CHUNK, self.device) // (2 * self._replicas))  # nothing but sums is written
        for start in range(some.start, some.stop, width):
            columns = slice(start, min(start + width, some.stop))
            target = sums[:, columns.start - some.start : columns.stop - some.start]
            torch.mm(on_W, W[:, columns].to(self.dtype), out=target)
            target.addmm_(on_G, G[:, columns].to(self.dtype))
        return sums.view(*weights.shape[:-1], some.stop - some.start)

    def _sum(
        self,
        which: Which,
        factors: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        vectors: Sequence[Tensor] = (),
    ) -> Tensor:
        """Inner products over all columns in fp64, on the CPU, of what `factors` makes of the rows of some columns."""
        total: Tensor | None = None
        for columns, rows in self._chunks(which, torch.float64, vectors):
            left, right = factors(rows, columns)
            total = left @ right.T if total is None else total.addmm_(left, right.T)
        return torch.empty(0) if total is None else total.cpu()

    def _chunks(
        self, which: Which, dtype: torch.dtype, vectors: Sequence[Tensor] = ()
    ) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and vectors for the last of them, a few columns after the other; good until the next are asked for.

        There is at least one chunk: who holds no columns has products of nothing.

        Yields:
            Which columns, and `(rows, columns)`.
        """
        kept = None if self._kept is None else self._of(which)
        if kept is not None and kept.dtype == dtype and not vectors:
            yield slice(0, self.elements), kept
            return
        count = self._count(which) + len(vectors)
        width = max(1, min(self.elements, at_a_time(_CHUNK, self.device) // max(count, 1)))
        if self._memory.numel() < count * width or self._memory.dtype != dtype:
            self._memory = torch.empty(count * width, dtype=dtype, device=self.device)
        memory = self._memory[: count * width].view(count, width)
        for start in range(0, max(self.elements, 1), width):
            columns = slice(start, min(start + width, self.elements))
            rows = memory[:, : columns.stop - start]
            first = rows[: count - len(vectors)]
            if kept is not None:
                first.copy_(kept[:, columns])
            else:
                self._make(which, columns, first)
            for row, vector in zip(rows[len(first) :], vectors, strict=True):
                row.copy_(vector[columns])
            yield columns, rows

    def _count(self, which: Which) -> int:
        return (self._replicas - 1) * (2 if which == "both" else 1)

    def _of(self, which: Which) -> Tensor:
        """Rows that are kept."""
        kept = self._kept if self._kept is not None else torch.empty(0)
        return kept if which == "both" else kept.tensor_split(2)["WG".index(which)]

    def _make(self, which: Which, columns: slice, target: Tensor) -> None:
        """Rows of some columns, in the precision of the rows and then in that of the target."""
        names = "WG" if which == "both" else which
        for name, rows in zip(names, target.tensor_split(len(names)), strict=True):
            source = self._source(name)[:, columns].to(self.dtype)
            torch.sub(source[1:], source[0], out=rows)

    def _source(self, name: str) -> Tensor:
        if not self._sources:
            raise RuntimeError("the parameters and gradients of this curvature are those of a step that is over")
        return self._sources[name]
