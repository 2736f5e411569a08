"""Whole parameters dealt out to processes: for work on them that cannot be shared by columns."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from replica_newton.topology.buckets import Arrival, Bucket, Buckets, Piece, Route, local
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


def is_even(sizes: Sequence[int], dealt: Sequence[int], hands: int) -> bool:
    """Whether no hand has more than twice its share of the elements.

    A hand that receives whole gradients receives them from all replicas. One that has most of a model, an embedding
    say, would need the memory, and the time on its wire, of M models, where columns take those of one.

    Args:
        sizes: elements of every parameter.
        dealt: whose hand has it.
        hands: how many there are.

    Returns:
        True also where there are no elements.
    """
    elements: Counter[int] = Counter()
    for size, hand in zip(sizes, dealt, strict=True):
        elements[hand] += size
    return hands * max(elements.values(), default=0) <= 2 * sum(sizes)


class Held(NamedTuple):
    """What one process has of all parameters.

    Attributes:
        columns: pieces of the parameters whose columns are there.
        module: the elements of every parameter, flat, that its module has: all, a shard's, or none in a server.
    """

    columns: list[Piece]
    module: list[slice]


def held_whole(buckets: Buckets, holders: Sequence[int], workers: Sequence[int], processes: int) -> list[Held]:
    """What every process has where replicas are whole.

    Args:
        buckets: of the parameters.
        holders: ranks of the processes that hold columns.
        workers: ranks of the processes that have a replica.
        processes: how many there are.

    Returns:
        It, by rank.
    """
    pieces = list(buckets.pieces())
    return [
        Held(
            [piece for piece in pieces if holders[piece.holder] == rank],
            [slice(0, size if rank in workers else 0) for size in buckets.sizes],
        )
        for rank in range(processes)
    ]


def held_in_shards(
    places: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]], cut: Callable[[Sequence[int]], Buckets]
) -> list[Held]:
    """What every process has where replicas are sharded along the first dimension of their parameters.

    Args:
        places: of every process, the number of its replica, and of its shard.
        counts: of every process, the elements of every parameter in its shard.
        cut: buckets of parameters of given sizes, shared by the replicas.

    Returns:
        It, by rank.
    """
    found = []
    for (replica, shard), mine in zip(places, counts, strict=True):
        shards = [one for place, one in sorted(zip(places, counts, strict=True)) if place[0] == replica]
        starts = [sum(one[parameter] for one in shards[:shard]) for parameter in range(len(mine))]
        pieces = [piece for piece in cut(mine).pieces() if piece.holder == replica]
        found.append(
            Held(
                [piece._replace(elements=_shifted(piece.elements, starts[piece.parameter])) for piece in pieces],
                [slice(start, start + count) for start, count in zip(starts, mine, strict=True)],
            )
        )
    return found


@dataclass(frozen=True)
class Dealing:
    """Parameters, each in the hands of one process, and how they come there and back.

    Where no hand has much more than others, a step sends what an all-reduce does:

        gradients      row m, N elements        → in a process's hand     all but its own hand, N (M−1)/M on average
        parameters     of a process's hand      → modules of the others   all that they have of it, N (M−1)/M on average

    Otherwise, and where replicas are sharded, gradients go to the H holders of columns first, which costs the way of
    their mean from there, at most N/H.

    A probe, of which every process has one row of directions and one of responses, sends

        directions     in a process's hand      → row m, N elements       (M−1) times its hand, N (M−1)/M on average
        responses      row m, N elements        → in a process's hand     all but its own hand, N (M−1)/M on average

    Args:
        collectives: of all processes, those of all shards.
        held: what each of them has.
        hands: rank of the process that has a parameter, for each.
        sizes: elements of every parameter.
        dtype: in which vectors travel.
        direct: whether gradients go to the hands at once.
    """

    collectives: Collectives
    held: tuple[Held, ...]
    hands: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    direct: bool

    @cached_property
    def mine(self) -> list[int]:
        """Places of the parameters in this process's hands."""
        return self._places[self.collectives.rank]

    def route(self, collectives: Collectives, nothing: Tensor) -> Route:
        """The way of gradients from all replicas to the hands of their parameters, where it is direct.

        Args:
            collectives: of the same processes, for gradients alone.
            nothing: `(0,)`, what a process without a replica sends.

        Returns:
            The route; what arrives is `(M, k)`, of the k elements of `mine`.
        """
        everyone, rank = range(collectives.size), collectives.rank
        workers = [by for by in everyone if any(map(_length, self.held[by].module))]

        def start(bucket: Bucket, pieces: Sequence[Tensor]) -> Arrival:
            inside = range(len(self.sizes))[bucket.parameters]
            dealt = [[place for place in inside if self.hands[place] == to] for to in everyone]
            counts = [sum(self.sizes[place] for place in places) for places in dealt]
            flat = {place: piece.reshape(-1).to(self.dtype) for place, piece in zip(inside, pieces, strict=False)}
            sent = torch.cat([nothing, *(flat[place] for places in dealt for place in places if flat)])
            outgoing = [count if flat else 0 for count in counts]
            incoming = [counts[rank] if by in workers else 0 for by in everyone]
            wait = collectives.start_all_to_all(sent, outgoing, incoming, "gradients")
            return lambda: wait().view(len(workers), counts[rank])

        def join(started: list[Arrival]) -> Tensor:
            # Buckets follow each other from the last parameters to the first.
            return torch.cat([started.pop()() for _ in range(len(started))], dim=1)

        return Route(start, join)

    def part(self, vector: Tensor) -> Tensor:
        """The elements of a vector that this process has in its hands.

        Args:
            vector: `(N,)`, the same in all processes.

        Returns:
            `(k,)`, of the elements of `mine`.
        """
        pieces = torch.split(vector, list(self.sizes))
        return torch.cat([vector[:0], *(pieces[place] for place in self.mine)])

    def collect(self, columns: Tensor) -> list[Tensor]:
        """Bring the elements of a vector together where their parameters are dealt to.

        Args:
            columns: `(n,)`, those held here; of gradients that have come directly, the elements of `mine`.

        Returns:
            The elements of `mine`, each flat.
        """
        if self.direct:
            return list(torch.split(columns, [self.sizes[place] for place in self.mine]))
        leaving, coming = self._routes
        sent = torch.cat([columns[:0], *(columns[one.columns] for to in leaving for one in to)])
        outgoing, incoming = ([sum(_length(one.elements) for one in of) for of in by] for by in (leaving, coming))
        received = self.collectives.start_all_to_all(sent, outgoing, incoming, "mean gradient")()
        arrived = [one for by in coming for one in by]
        values = {place: columns.new_empty(self.sizes[place]) for place in self.mine}
        pieces = torch.split(received, [_length(one.elements) for one in arrived])
        for one, elements in zip(arrived, pieces, strict=True):
            values[one.parameter][one.elements] = elements
        return [values[place] for place in self.mine]

    def share(self, values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Write what a process has in its hands into the modules of all.

        Args:
            values: of the parameters `mine`, whole.
            parameters: all of them, of which local shards are written; in a server none.
        """
        flat = [value.detach().reshape(-1).to(self.dtype) for value in values]
        for place, piece in self._dealt_out(lambda _: flat, "parameters", local(parameters[0]).device):
            parameter = local(parameters[place])
            if parameter.data_ptr() != piece.data_ptr():
                parameter.copy_(piece.reshape(parameter.shape))

    def row(self, dealt: Tensor) -> Tensor:
        """This process's row, from the elements of all rows that every process has in its hands.

        Args:
            dealt: `(M, k)`, of the k elements of `mine`, one row a process.

        Returns:
            `(N,)`, in the order of the parameters.
        """
        # Who holds nothing may not know in which precision others do.
        dealt = dealt.to(self.dtype)
        row = dealt.new_empty(sum(self.sizes))
        pieces, sizes = torch.split(row, list(self.sizes)), [self.sizes[place] for place in self.mine]
        for place, piece in self._dealt_out(lambda to: torch.split(dealt[to], sizes), "directions", row.device):
            pieces[place].copy_(piece)
        return row

    def elements(self, row: Tensor) -> Tensor:
        """The elements of all rows that this process has in its hands, from the rows of all processes.

        Args:
            row: `(N,)`, this process's.

        Returns:
            `(M, k)`, of the elements of `mine`.
        """
        everyone, pieces = range(self.collectives.size), torch.split(row, list(self.sizes))
        sent = torch.cat([row[:0], *(pieces[place] for by in everyone for place in self._places[by])])
        counts = [sum(self.sizes[place] for place in self._places[by]) for by in everyone]
        mine = counts[self.collectives.rank]
        wait = self.collectives.start_all_to_all(sent.to(self.dtype), counts, [mine] * len(everyone), "responses")
        return wait().view(len(everyone), mine)

    def _dealt_out(
        self, values: Callable[[int], Sequence[Tensor]], phase: str, device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """Send every process what its module has of the values for it, one flat tensor for each of `mine`.

        Yields:
            Every parameter's place, and what of it is for this process; empty ones are left out.
        """
        rank, everyone = self.collectives.rank, range(self.collectives.size)
        others = [to for to in everyone if to != rank]

        def wanted(to: int) -> list[Tensor]:
            module = self.held[to].module
            return [value[module[place]] for place, value in zip(self.mine, values(to), strict=True)]

        sent = torch.cat(
            [torch.empty(0, dtype=self.dtype, device=device), *(one for to in others for one in wanted(to))]
        )
        outgoing, incoming = [self._count(rank, to) for to in everyone], [self._count(by, rank) for by in everyone]
        outgoing[rank] = incoming[rank] = 0
        received = self.collectives.start_all_to_all(sent, outgoing, incoming, phase)()
        order = [place for by in others for place in self._places[by]]
        arrived = torch.split(received, [_length(self.held[rank].module[place]) for place in order])
        for place, piece in (*zip(self.mine, wanted(rank), strict=True), *zip(order, arrived, strict=True)):
            if len(piece):
                yield place, piece

    def _count(self, by: int, to: int) -> int:
        """Elements in somebody's hands that somebody else's module has."""
        return sum(_length(self.held[to].module[place]) for place in self._places[by])

    @cached_property
    def _places(self) -> list[list[int]]:
        """Of the parameters in everybody's hands."""
        ranks = range(self.collectives.size)
        return [[place for place, rank in enumerate(self.hands) if rank == by] for by in ranks]

    @cached_property
    def _routes(self) -> tuple[list[list[Piece]], list[list[Piece]]]:
        """What goes from here to every process, and what comes here from each."""
        rank, everyone = self.collectives.rank, range(self.collectives.size)
        leaving = [[one for one in self.held[rank].columns if self.hands[one.parameter] == to] for to in everyone]
        coming = [[one for one in self.held[by].columns if self.hands[one.parameter] == rank] for by in everyone]
        return leaving, coming


def _length(elements: slice) -> int:
    return int(elements.stop - elements.start)


def _shifted(elements: slice, by: int) -> slice:
    return slice(elements.start + by, elements.stop + by)
