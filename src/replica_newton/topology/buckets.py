"""Buckets: which columns a process holds, and how gradients become columns while the backward pass still runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

BUCKET_BYTES = 25 << 20
"""Of a bucket, as in DistributedDataParallel: large enough for the bandwidth, small enough to overlap."""
_FIRST_BUCKET_BYTES = 1 << 20
"""Of the first bucket: communication starts early in the backward pass."""
_GROUP_BYTES = 8 << 20
"""Of buckets that need not start early: below that, another message costs more than a copy."""


def sharded_by_rows(parameter: Tensor) -> bool:
    """Whether a parameter is sharded along its first dimension, and in one way only.

    Args:
        parameter: a tensor or a DTensor.

    Returns:
        False for what is not sharded.
    """
    placements: tuple[Any, ...] = getattr(parameter, "placements", ())
    return len(placements) == 1 and bool(placements[0].is_shard(0))


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard of a `DTensor`, all of any other.

    Args:
        tensor: a parameter or its gradient.

    Returns:
        A tensor that shares the memory of the argument.
    """
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def write(parameters: Sequence[Tensor], values: Tensor) -> None:
    """`w ← values`, in place.

    Args:
        parameters: of which the local shards are written.
        values: `(N,)`, of all of them, one after the other.
    """
    pieces = torch.split(values, [local(parameter).numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        local(parameter).copy_(piece.reshape(local(parameter).shape))


@dataclass(frozen=True)
class Bucket:
    """Parameters that follow each other, whose elements travel together.

    Attributes:
        parameters: their places in the list of parameters.
        elements: theirs in the flat vector of N elements.
        columns: those of every holder in its n columns, equally many for all.
    """

    parameters: slice
    elements: slice
    columns: slice

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.elements.stop - self.elements.start)

    @property
    def width(self) -> int:
        """Number of columns of a holder."""
        return int(self.columns.stop - self.columns.start)


class Piece(NamedTuple):
    """Elements of one parameter that one process holds.

    Attributes:
        parameter: its place in the list of parameters.
        holder: number of the process.
        elements: of the flat parameter.
        columns: theirs in the columns of the holder.
    """

    parameter: int
    holder: int
    elements: slice
    columns: slice


class Buckets:
    """A partition of N elements into buckets of whole parameters, each shared by H holders.

    The last parameters come first, since a backward pass reaches them first. Holder j has columns `j·w … (j+1)·w − 1`
    of every bucket, `w = ⌈N_b/H⌉`; so what is filled up with zeros is less than H elements a bucket.

    Args:
        sizes: elements of every parameter, in their order; of the local shards of sharded ones.
        dtype: in which vectors travel.
        holders: H >= 1.
        bucket_bytes: a bucket ends with the parameter that makes it reach so many; the first is smaller.

    Attributes:
        size: N.
        width: n, the columns of a holder.
        groups: buckets that follow each other, as many as are small, for what need not start early; none is left out.
    """

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype, holders: int, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.sizes = tuple(sizes)
        self.dtype = dtype
        self.holders = holders
        self.size = sum(sizes)
        self.width = 0
        self._buckets: list[Bucket] = []
        last, end, elements = len(sizes), self.size, 0
        for first in reversed(range(len(sizes))):
            elements += sizes[first]
            enough = bucket_bytes if self._buckets else min(_FIRST_BUCKET_BYTES, bucket_bytes)
            at_the_end = first == 0 and (elements or not self._buckets)
            if at_the_end or (elements and elements * dtype.itemsize >= enough):
                width = -(-elements // holders)
                columns = slice(self.width, self.width + width)
                self._buckets.append(Bucket(slice(first, last), slice(end - elements, end), columns))
                last, end, elements, self.width = first, end - elements, 0, self.width + width
        self.groups: list[list[Bucket]] = []
        most, room = min(bucket_bytes, _GROUP_BYTES) // dtype.itemsize, 0
        for bucket in self._buckets:
            if not self.groups or bucket.size > room:
                self.groups.append([])
                room = most
            self.groups[-1].append(bucket)
            room -= bucket.size

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def split(self, bucket: Bucket, pieces: Sequence[Tensor], memory: Tensor | None = None) -> Tensor:
        """What the holders get of one bucket of a vector.

        Args:
            bucket: of this partition.
            pieces: tensors whose elements are the bucket's, one after the other.
            memory: `(H w,)` in `dtype`, which the result is written to; None for new one.

        Returns:
            `(H, w)` in `dtype`, filled up with zeros.
        """
        padded = memory
        if padded is None:
            padded = pieces[0].new_empty(self.holders * bucket.width, dtype=self.dtype)
        torch.cat([piece.reshape(-1) for piece in pieces], out=padded[: bucket.size])
        padded[bucket.size :] = 0
        return padded.reshape(self.holders, bucket.width)

    def pieces(self) -> Iterator[Piece]:
        """Every parameter in the pieces that its holders have, by bucket and parameter.

        Yields:
            The pieces; none is empty.
        """
        starts = [0, *accumulate(self.sizes)]
        for bucket in self._buckets:
            for parameter in range(len(self.sizes))[bucket.parameters]:
                first, end = starts[parameter] - bucket.elements.start, starts[parameter + 1] - bucket.elements.start
                for holder in range(self.holders):
                    low, high = max(first, holder * bucket.width), min(end, (holder + 1) * bucket.width)
                    if low < high:
                        column = bucket.columns.start - holder * bucket.width
                        columns = slice(column + low, column + high)
                        yield Piece(parameter, holder, slice(low - first, high - first), columns)

    def part(self, vector: Tensor, holder: int) -> Tensor:
        """The columns of a vector that a holder has.

        Args:
            vector: `(N,)`.
            holder: its number.

        Returns:
            `(n,)`, in the dtype of the vector; what lies beyond N is zero.
        """
        part = vector.new_zeros(self.width)
        for bucket in self._buckets:
            piece = vector[bucket.elements][holder * bucket.width : (holder + 1) * bucket.width]
            part[bucket.columns][: len(piece)] = piece
        return part


class Workspace:
    """Memory that is used again in every step: to touch a fresh page costs more than to fill it.

    Two tensors a bucket, one for what is sent of a row or has come of it, one for what has come of columns or is sent
    of them: gradients go one way and points go the other.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int, int], Tensor] = {}

    def take(self, name: str, columns: slice, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for some columns, with what the last user has left in it.

        Args:
            name: of the two.
            columns: w of a holder, those of a bucket or of a group.
            rows: how many of them.
            dtype: of the elements.
            device: where it is.

        Returns:
            `(rows · w,)`.
        """
        place, elements = (name, columns.start, columns.stop), rows * (columns.stop - columns.start)
        found = self._tensors.get(place)
        if found is None or (found.numel(), found.dtype, found.device) != (elements, dtype, device):
            found = self._tensors[place] = torch.empty(elements, dtype=dtype, device=device)
        return found


Arrival = Callable[[], Tensor]
"""Waits for what has come of one bucket, a row of each replica."""


class Route(NamedTuple):
    """How gradients travel: what starts those of a bucket, and what puts together what has come of all buckets.

    Attributes:
        start: given a bucket and the gradients in it, none in a process without a replica.
        join: given the arrivals of all buckets, which it empties, so that nothing holds on to what has travelled.
    """

    start: Callable[[Bucket, Sequence[Tensor]], Arrival]
    join: Callable[[list[Arrival]], Tensor]


def joined(started: list[Arrival], buckets: Buckets, memory: Tensor | None = None) -> Tensor:
    """The columns of all buckets beside each other.

    Args:
        started: the exchange of every bucket; emptied, so that nothing holds on to what has travelled.
        buckets: theirs, at least one.
        memory: `(M, n)`, which the result is written to if it fits; None for new one.

    Returns:
        `(M, n)`.
    """
    columns = None
    for bucket in buckets:
        received = started.pop(0)()
        if columns is None:
            shape = (len(received), buckets.width if received.numel() else 0)
            columns = memory
            if columns is None or (columns.shape, columns.dtype) != (shape, received.dtype):
                columns = received.new_empty(shape)
        if received.numel():
            columns[:, bucket.columns] = received
    return torch.empty(0) if columns is None else columns


class GradientExchange:
    """The gradients of one evaluation, sent bucket by bucket as the backward pass makes them ready.

    Used as a context around the backward pass. A bucket starts when all its gradients are there and all buckets before
    it have started, so that the order is the same in all processes whatever their data. Gradients that have not come by
    the end are sent then; those of parameters without one are zero.

    Args:
        parameters: whose gradients are wanted.
        buckets: their partition.
        route: how they travel.
        postponed: whether a gradient that comes now is not the last word; see `Processes.no_sync`.

    Source:
        Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training, section 3.2.
    """

    def __init__(
        self, parameters: Sequence[Tensor], buckets: Buckets, route: Route, postponed: Callable[[], bool]
    ) -> None:
        self._parameters = parameters
        self._buckets = list(buckets)
        self._route = route
        self._postponed = postponed
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        places = [range(len(parameters))[bucket.parameters] for bucket in buckets]
        self._bucket_of = {place: number for number, inside in enumerate(places) for place in inside}
        self._missing = [len(inside) for inside in places]
        self._ready: dict[int, tuple[Tensor, int]] = {}
        self._started: list[Arrival] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "GradientExchange":
        self._hooks = [one.register_post_accumulate_grad_hook(self._note) for one in self._parameters]  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def arrived(self) -> Tensor:
        """What has come here of all rows.

        Returns:
            `(M, n)`, as the route puts it together.

        Raises:
            ValueError: if a gradient is sparse.
            RuntimeError: if a gradient has changed since it was sent.
        """
        for bucket in self._buckets[len(self._started) :]:
            self._start(bucket)
        # All have been sent by now, so whatever is wrong here leaves the others nothing to wait for.
        arrived = self._route.join(self._started)
        for place, (gradient, version) in self._ready.items():
            if self._parameters[place].grad is not gradient or local(gradient)._version != version:
                raise RuntimeError(
                    "a gradient has changed after it was sent: run all backward passes of a step but the last, or all "
                    "if gradients are changed after them, in `with topology.no_sync():`, and those of a module in "
                    "DistributedDataParallel in `with module.no_sync():`"
                )
        return arrived

    def _note(self, parameter: Tensor) -> None:
        """A gradient is there."""
        place = self._places[id(parameter)]
        if self._postponed() or place in self._ready or place not in self._bucket_of or parameter.grad is None:
            return
        self._ready[place] = parameter.grad, local(parameter.grad)._version
        self._missing[self._bucket_of[place]] -= 1
        for bucket in self._buckets[len(self._started) :]:
            if self._missing[len(self._started)]:
                break
            self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        """Send the next bucket."""
        pieces = [_gradient(parameter) for parameter in self._parameters[bucket.parameters]]
        self._started.append(self._route.start(bucket, pieces))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(local(parameter)).detach()
    gradient = local(parameter.grad).detach()
    if gradient.layout != torch.strided:
        raise ValueError("sparse gradients are not supported")
    return gradient
