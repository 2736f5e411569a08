"""Whole parameters dealt out to processes: for work on them that cannot be shared by columns."""

from collections.abc import Sequence
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
        return [place for place, rank in enumerate(self.hands) if rank == self.collectives.rank]

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
        everyone = range(self.collectives.size)
        places = [[place for place, rank in enumerate(self.hands) if rank == by] for by in everyone]
        sizes = [sum(self.buckets.sizes[place] for place in of) for of in places]
        own = [local(parameters[place]).reshape(-1).to(self.buckets.dtype) for place in self.mine]
        mine = torch.cat([torch.empty(0, dtype=self.buckets.dtype, device=local(parameters[0]).device), *own])
        outgoing = [len(mine)] * len(everyone)
        received = self.collectives.start_all_to_all(mine.repeat(len(everyone)), outgoing, sizes, "parameters")()
        for by, values in zip(everyone, torch.split(received, sizes), strict=True):
            if by == self.collectives.rank:
                continue
            pieces = torch.split(values, [self.buckets.sizes[place] for place in places[by]])
            for place, piece in zip(places[by], pieces, strict=True):
                parameter = local(parameters[place])
                parameter.copy_(piece.reshape(parameter.shape))

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
