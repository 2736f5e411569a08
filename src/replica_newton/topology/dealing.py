"""Whole parameters dealt out to processes: for work on them that cannot be shared by columns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from replica_newton.topology.buckets import Buckets, Piece, local
from replica_newton.topology.collectives import Collectives


def deal(work: Sequence[float], hands: int) -> list[int]:
    """Which hand gets which piece of work: each in turn goes to the one that has the least so far.

    What comes later changes nothing about what has been dealt, so that parameters that are added move no state.

    Args:
        work: of every piece.
        hands: how many, >= 1.

    Returns:
        The hand of every piece, from 0. None has more than the mean and the largest piece together.

    Source:
        Graham (1966), list scheduling.
    """
    loads, dealt = [0.0] * hands, []
    for one in work:
        hand = min(range(hands), key=loads.__getitem__)
        loads[hand] += one
        dealt.append(hand)
    return dealt


@dataclass(frozen=True)
class Dealing:
    """Parameters, each in the hands of one process, and how they come there and back.

    Together with the exchange of gradients that gives every process its columns of their mean, a step sends

        gradients      row m, N elements        → columns, M × n          N (M−1)/M elements sent
        mean gradient  columns, n               → parameters dealt        at most N/M
        parameters     of a process's hand      → all processes           (M−1) times its hand, N (M−1)/M on average

    and a probe, of which every process has one row of directions and one of responses,

        directions     in a process's hand      → row m, N elements       (M−1) times its hand, N (M−1)/M on average
        responses      row m, N elements        → in a process's hand     all but its own hand, N (M−1)/M on average

    Args:
        collectives: of the processes, all of which hold columns.
        buckets: which columns.
        hands: rank of the process that has a parameter, for each.
    """

    collectives: Collectives
    buckets: Buckets
    hands: tuple[int, ...]

    @cached_property
    def mine(self) -> list[int]:
        """Places of the parameters in this process's hands."""
        return self._places[self.collectives.rank]

    def collect(self, columns: Tensor) -> list[Tensor]:
        """Bring the elements of a vector together where their parameters are dealt to.

        Args:
            columns: `(n,)`, those held here.

        Returns:
            The elements of `mine`, each flat.
        """
        leaving, coming = self._routes
        sent = torch.cat([columns[:0], *(columns[one.columns] for to in leaving for one in to)])
        outgoing, incoming = ([sum(map(_length, of)) for of in pieces] for pieces in (leaving, coming))
        received = self.collectives.start_all_to_all(sent, outgoing, incoming, "mean gradient")()
        arrived = [one for by in coming for one in by]
        values = {place: columns.new_empty(self.buckets.sizes[place]) for place in self.mine}
        for one, elements in zip(arrived, torch.split(received, list(map(_length, arrived))), strict=True):
            values[one.parameter][one.elements] = elements
        return [values[place] for place in self.mine]

    def share(self, parameters: Sequence[Tensor]) -> None:
        """Overwrite every parameter with what it is in the process that has it in its hands.

        Args:
            parameters: all of them.
        """
        own = [local(parameters[place]).reshape(-1).to(self.buckets.dtype) for place in self.mine]
        mine = torch.cat([torch.empty(0, dtype=self.buckets.dtype, device=local(parameters[0]).device), *own])
        for place, piece in self._from_all(mine.expand(self.collectives.size, -1), "parameters"):
            if self.hands[place] != self.collectives.rank:
                parameter = local(parameters[place])
                parameter.copy_(piece.reshape(parameter.shape))

    def row(self, dealt: Tensor) -> Tensor:
        """This process's row, from the elements of all rows that every process has in its hands.

        Args:
            dealt: `(M, k)`, of the k elements of `mine`, one row a process.

        Returns:
            `(N,)`, in the order of the parameters.
        """
        # Who holds nothing may not know in which precision others do.
        dealt = dealt.to(self.buckets.dtype)
        row = dealt.new_empty(self.buckets.size)
        pieces = torch.split(row, list(self.buckets.sizes))
        for place, piece in self._from_all(dealt, "directions"):
            pieces[place].copy_(piece)
        return row

    def elements(self, row: Tensor) -> Tensor:
        """The elements of all rows that this process has in its hands, from the rows of all processes.

        Args:
            row: `(N,)`, this process's.

        Returns:
            `(M, k)`, of the elements of `mine`.
        """
        everyone, pieces = range(self.collectives.size), torch.split(row, list(self.buckets.sizes))
        sent = torch.cat([row[:0], *(pieces[place] for by in everyone for place in self._places[by])])
        sent = sent.to(self.buckets.dtype)
        outgoing, mine = [self._count(by) for by in everyone], self._count(self.collectives.rank)
        received = self.collectives.start_all_to_all(sent, outgoing, [mine] * len(everyone), "responses")()
        return received.view(len(everyone), mine)

    def _from_all(self, dealt: Tensor, phase: str) -> Iterator[tuple[int, Tensor]]:
        """Send everyone its row of what is in these hands, `(M, k)`; every parameter's place and what came for it."""
        everyone = range(self.collectives.size)
        outgoing, incoming = [dealt.shape[1]] * len(everyone), [self._count(by) for by in everyone]
        received = self.collectives.start_all_to_all(dealt.reshape(-1).contiguous(), outgoing, incoming, phase)()
        order = [place for by in everyone for place in self._places[by]]
        yield from zip(order, torch.split(received, [self.buckets.sizes[place] for place in order]), strict=True)

    def _count(self, by: int) -> int:
        """Elements in somebody's hands."""
        return sum(self.buckets.sizes[place] for place in self._places[by])

    @cached_property
    def _places(self) -> list[list[int]]:
        """Of the parameters in everybody's hands."""
        ranks = range(self.collectives.size)
        return [[place for place, rank in enumerate(self.hands) if rank == by] for by in ranks]

    @cached_property
    def _routes(self) -> tuple[list[list[Piece]], list[list[Piece]]]:
        """What goes from here to every process, and what comes here from each."""
        rank, everyone = self.collectives.rank, range(self.collectives.size)
        pieces = [(one, self.hands[one.parameter]) for one in self.buckets.pieces()]
        leaving = [[one for one, hand in pieces if (one.holder, hand) == (rank, to)] for to in everyone]
        coming = [[one for one, hand in pieces if (one.holder, hand) == (by, rank)] for by in everyone]
        return leaving, coming


def _length(piece: Piece) -> int:
    return int(piece.elements.stop - piece.elements.start)
