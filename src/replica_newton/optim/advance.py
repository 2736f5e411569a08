"""The end of a step: what parameters and displacements become, in one pass over memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from replica_newton.curvature.gram import at_a_time
from replica_newton.topology.standing import Standing

_AT_A_TIME = 1 << 21
"""Elements of all rows that a few columns have, 8 MiB in fp32, which stay in the last cache of a CPU."""
_ROWS = 6
"""Rows of a replica among them: displacement, gradient, the differences of both, new displacement, point."""


class Advance(Standing):
    """Replicas that move to where a step leads, some columns after the others.

        w ← (1 − α λ) w − α d,      d_m as the spread says

    Operations over whole rows, one after the other, would each fetch them from memory anew. Here a few columns pass
    through all of them at once, when they are asked for: while those of the next bucket are made, those of the last one
    are on their way to other processes.

    Args:
        before: where the replicas stand.
        direction: some columns of d.
        parted: some columns of the new displacements, which it may write to the memory that it is given.
        rates: α, one for all or `(n,)`.
        kept: `1 − α λ`, likewise.
        shared: memory for the new w, `(n,)`; None for new one.
        displacements: memory for the new displacements, `(M, n)`; None for new one.

    Attributes:
        shared: new w, as far as it has been made; all of it after `finish`.
        displacements: those of the replicas, likewise.
    """

    def __init__(
        self,
        before: Standing,
        direction: Callable[[slice], Tensor],
        parted: Callable[[slice, Tensor], Tensor],
        *,
        rates: Tensor | float,
        kept: Tensor | float,
        shared: Tensor | None = None,
        displacements: Tensor | None = None,
    ) -> None:
        super().__init__(
            torch.empty_like(before.shared) if shared is None else shared,
            torch.empty_like(before.displacements) if displacements is None else displacements,
        )
        self._before = before.shared
        self._direction = direction
        self._parted = parted
        self._rates = rates
        self._kept = kept
        self._done = 0

    def points(self, columns: slice, memory: Tensor) -> Tensor:
        """Where the replicas will stand, in the columns after those that have been asked for; see `Standing`."""
        points = memory.view(len(self.displacements), -1)
        for some in self._blocks(columns.stop):
            target = points[:, some.start - columns.start : some.stop - columns.start]
            torch.add(self.shared[some], self.displacements[:, some], out=target)
        return points

    def finish(self) -> None:
        """Make what nobody has asked for."""
        for _ in self._blocks(len(self.shared)):
            pass

    def _blocks(self, end: int) -> Iterator[slice]:
        """Make the columns up to here that have not been made, a few at a time."""
        M = len(self.displacements)
        width = max(1, at_a_time(_AT_A_TIME, self.shared.device) // (_ROWS * M))
        while self._done < end:
            some = slice(self._done, min(self._done + width, end))
            self._make(some)
            self._done = some.stop
            yield some

    def _make(self, some: slice) -> None:
        rates, kept, before, shared = self._rates, self._kept, self._before[some], self.shared[some]
        if isinstance(kept, Tensor) or kept != 1.0:
            before = before * (kept[some] if isinstance(kept, Tensor) else kept)
        direction = self._direction(some)
        if isinstance(rates, Tensor):
            torch.addcmul(before, rates[some], direction, value=-1, out=shared)
        else:
            torch.add(before, direction, alpha=-rates, out=shared)
        own = self.displacements[:, some]
        parted = self._parted(some, own)
        if parted.data_ptr() != own.data_ptr():
            own.copy_(parted)
