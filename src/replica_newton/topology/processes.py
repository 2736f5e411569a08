"""Replicas in processes of their own, their vectors exchanged by the collectives of `torch.distributed`."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from replica_newton.topology.buckets import (
    BUCKET_BYTES,
    Arrival,
    Bucket,
    Buckets,
    GradientExchange,
    Route,
    Workspace,
    joined,
    local,
    sharded_by_rows,
    write,
)
from replica_newton.topology.collectives import Collectives, numbers_at_once
from replica_newton.topology.dealing import Dealing, Held, held_in_shards, held_whole, is_even
from replica_newton.topology.layout import Layout
from replica_newton.topology.local_closure import LocalClosure
from replica_newton.topology.members import LastingMembers
from replica_newton.topology.simulated import Criterion, Data, ReplicaGradients
from replica_newton.topology.standing import Standing

DEFAULT_TIMEOUT = 300.0
_IN_FLIGHT = 2
"""Buckets of points on their way at a time: enough to keep the wire busy, without a second copy of everything."""


class Processes(LastingMembers):
    """M replicas in processes of their own, and processes that hold columns; some or all may be both.

    A holder has about N/H of the N columns of everything, H being the number of holders: of the shared parameters, and
    of the rows of all replicas; `Buckets` says which. Gradients are sent while the backward pass still runs. The order
    of the collectives depends on nothing but the calls: not on data, and not on parameters without gradient.

    Between steps the module of a replica stands where the replica does, not at the parameters that all share:
    `ReplicaNewton.synchronise` moves it there.

    Args:
        process_group: of `torch.distributed`, initialised by the caller; None for all processes.
        workers: ranks in the group that have a replica, ascending.
        holders: ranks in the group that hold columns, ascending.
        timeout: seconds that a collective may take.
        bucket_bytes: size of a bucket of gradients, >= 1.
        shard_groups: processes that share this replica's parameters and samples, this one among them, and those of
            all replicas and shards; None where each replica is whole. N is then the number of elements of this
            process's shards, and the loss of a replica the mean over its shards' samples.

    Attributes:
        replicas: M, the number of workers.
        shards: number of processes that share a replica.
        rank: of this process in the group.
        steps: steps asked for so far by the whole run, taken or given up; a newcomer has that of the others.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        ValueError: if `timeout` or `bucket_bytes` is not positive.
    """

    distributed = True

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        workers: Sequence[int],
        holders: Sequence[int],
        timeout: float,
        bucket_bytes: int = BUCKET_BYTES,
        shard_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ) -> None:
        self._begin(timeout, bucket_bytes, shard_groups)
        self._adopt(Collectives.of(process_group, timeout, self.elements_sent), workers, holders)

    def _begin(
        self,
        timeout: float,
        bucket_bytes: int = BUCKET_BYTES,
        shard_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ) -> None:
        if not 0.0 < timeout < float("inf"):
            raise ValueError(f"{timeout=} must be positive and finite, in seconds")
        if bucket_bytes < 1:
            raise ValueError(f"{bucket_bytes=} must be >= 1")
        self.timeout = timeout
        self.elements_sent: Counter[str] = Counter()
        self._across = self._everyone = None
        if shard_groups is not None:
            self._across, self._everyone = (Collectives.of(one, timeout, self.elements_sent) for one in shard_groups)
        self.shards = 1 if self._across is None else self._across.size
        self._bucket_bytes = bucket_bytes
        self._postponed = False

    def _adopt(self, collectives: Collectives, workers: Sequence[int], holders: Sequence[int]) -> None:
        """Talk through these from now on."""
        self._all = collectives
        self.rank = collectives.rank
        self._workers = list(workers)
        self._holders = list(holders)
        self.replicas = len(self._workers)
        # Closures may have collectives of their own. Where gradients start is up to the backward pass, so they travel
        # beside those; where there are servers, which have no closure, nothing else can come between.
        self._for_gradients = collectives.beside() if self.replicas == collectives.size else collectives
        self._among_workers = collectives.among(self._workers) if self.is_worker else collectives
        self._buckets = Buckets((), torch.float32, len(self._holders))
        self._dealt: tuple[Buckets, Dealing] | None = None
        # Made anew with the members: what lost ones have begun may still be written to.
        self._workspace = Workspace()

    def release(self) -> None:
        """Free the memory that is kept from step to step for what travels, up to two elements a parameter."""
        self._workspace = Workspace()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(replicas={self.replicas}, rank={self.rank})"

    def __getstate__(self) -> dict[str, object]:
        raise TypeError(f"a {type(self).__name__} belongs to its process and cannot be copied or pickled")

    def closure(
        self, module: nn.Module, criterion: Criterion, inputs: Tensor | tuple[Tensor, ...], targets: Tensor
    ) -> "LocalClosure":
        """Closure over this replica's shard of a global batch, for `optimizer.step`.

        Any other closure that calls `backward` does as well, as long as secants come from own data.

        Args:
            module: the model, of the same architecture in all processes; also in `DistributedDataParallel`, whose
                averaging of gradients is left out.
            criterion: loss of `(module(*inputs), targets)`, a mean over samples.
            inputs: of the shard, batch first; the same shape in all processes.
            targets: of the shard, batch first.

        Returns:
            The closure.
        """
        return LocalClosure(self, module, criterion, (*(inputs if isinstance(inputs, tuple) else (inputs,)), targets))

    @property
    def is_worker(self) -> bool:
        """Whether this process has a replica."""
        return self._all.rank in self._workers

    @property
    def replica(self) -> int | None:
        """m, the number of the replica in this process, from 0; None where there is none."""
        return self._workers.index(self._all.rank) if self.is_worker else None

    @property
    def shard(self) -> int | None:
        """Which shard of the replica is in this process, from 0; None where replicas are whole."""
        return None if self._across is None else self._across.rank

    @property
    def workers(self) -> list[int]:
        """Names of the workers, by replica: their ranks."""
        return self._workers

    @property
    def layout(self) -> Layout:
        """Who is who among the processes."""
        return Layout(type(self).__name__, self._all.size, self.replicas, self._workers[0])

    @property
    def position(self) -> int:
        """Of this process among those of the layout."""
        return self._all.rank

    @property
    def _local(self) -> slice:
        """Of the M replicas, the one that is here, if any."""
        return slice(0, 0) if self.replica is None else slice(self.replica, self.replica + 1)

    @property
    def _of_all_shards(self) -> Collectives:
        """Of all processes."""
        return self._all if self._everyone is None else self._everyone

    def lay_out(self, parameters: Sequence[Tensor]) -> list[int]:
        """Fix which process holds which columns; to be called before anything N-sized travels.

        Args:
            parameters: all that vary; of sharded ones, the local shards count.

        Returns:
            Elements of the buckets, in the order of the columns.
        """
        pieces = [local(parameter) for parameter in parameters]
        sizes = tuple(piece.numel() for piece in pieces)
        dtype = reduce(torch.promote_types, (piece.dtype for piece in pieces))
        if (sizes, dtype) != (self._buckets.sizes, self._buckets.dtype):
            self._buckets = Buckets(sizes, dtype, len(self._holders), self._bucket_bytes)
        return [bucket.size for bucket in self._buckets]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here leave their gradients to the step's last one outside, or to the end of the closure.

        For closures with several backward passes (gradient accumulation), or that change gradients after them:

            def closure():
                with topology.no_sync():
                    for x, y in micro_batches[:-1]:
                        (criterion(model(x), y) / len(micro_batches)).backward()
                x, y = micro_batches[-1]
                ...

        Yields:
            Nothing.
        """
        before, self._postponed = self._postponed, True
        try:
            yield
        finally:
            self._postponed = before

    def place(self, parameters: Sequence[Tensor], standing: Standing) -> None:
        """Move the module of every worker to where its replica stands.

        Args:
            parameters: of the module.
            standing: columns of it, which are asked for in their order.
        """
        for bucket, point in self._arriving(standing.points, "points", standing.shared, self._workspace):
            if self.is_worker:
                write(parameters[bucket.parameters], point)

    def row(self, columns: Tensor) -> Tensor:
        """The row of the local replica, from the columns of all rows.

        Args:
            columns: `(M, n)`.

        Returns:
            `(N,)`; called by all processes, each of which must have a replica.
        """

        def held(some: slice, memory: Tensor) -> Tensor:
            return memory.view(self.replicas, -1).copy_(columns[:, some])

        row = columns.new_empty(self._buckets.size)
        for bucket, piece in self._arriving(held, "directions", columns, Workspace()):
            row[bucket.elements] = piece
        return row

    def columns(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The columns that this process holds, from the rows of all replicas, of several kinds; small ones at once.

        Args:
            rows: `(N,)` each, those of the local replica; called by all processes, each of which must have one.

        Returns:
            `(M, n)` of every kind; columns beyond N are zero.
        """
        if len(rows) > 1 and len(self._buckets.groups) > 1:
            return tuple(self.columns(row)[0] for row in rows)

        def started(bucket: Bucket) -> Arrival:
            pieces = [self._buckets.split(bucket, [row[bucket.elements]]) for row in rows]
            sent, width = pieces[0] if len(rows) == 1 else torch.cat(pieces, dim=1), len(rows) * bucket.width
            wait = self._all.start_exchange(sent, self._workers, self._holders, width, "responses")
            return lambda: wait().reshape(len(rows) * self.replicas, -1)

        columns = joined([started(bucket) for bucket in self._buckets], self._buckets).to(rows[0].dtype)
        return torch.unbind(columns.view(self.replicas, len(rows), columns.shape[1]), dim=1)

    def _arriving(
        self, columns: Callable[[slice, Tensor], Tensor], phase: str, like: Tensor, workspace: Workspace
    ) -> Iterator[tuple[Bucket, Tensor]]:
        """Every bucket of the local row as it arrives; `columns` writes what is held of some columns into memory."""
        travelling: deque[tuple[list[Bucket], Callable[[], Tensor]]] = deque()
        holds, nothing = self._all.rank in self._holders, like.new_empty(0, dtype=self._buckets.dtype)

        def arrived() -> Iterator[tuple[Bucket, Tensor]]:
            group, wait = travelling.popleft()
            received, first = wait(), group[0].columns.start
            for bucket in group:
                piece = received[:, bucket.columns.start - first : bucket.columns.stop - first]
                yield bucket, piece.flatten()[: bucket.size]

        for group in self._buckets.groups:
            some = slice(group[0].columns.start, group[-1].columns.stop)
            memory = partial(self._memory, workspace, like.device, some)
            sent = columns(some, memory("columns", self.replicas)) if holds else nothing
            width = some.stop - some.start
            started = self._all.start_exchange(sent, self._holders, self._workers, width, phase, partial(memory, "row"))
            travelling.append((group, started))
            if len(travelling) > _IN_FLIGHT:
                yield from arrived()
        while travelling:
            yield from arrived()

    def _memory(self, workspace: Workspace, device: torch.device, columns: slice, name: str, rows: int) -> Tensor:
        return workspace.take(name, columns, rows, self._buckets.dtype, device)

    def gradients(
        self,
        closure: Callable[[], Tensor],
        parameters: Sequence[Tensor],
        displacements: Tensor,
        data: Data,
        dealing: Dealing | None = None,
        memory: Tensor | None = None,
    ) -> ReplicaGradients:
        """This process's share of the losses, and the columns that it holds of the gradients.

        Args:
            closure: of any kind for own data; a `LocalClosure` for common data.
            parameters: whose gradients are wanted; those without get zeros. The module stands where its replica does.
            displacements: `(M, n)` columns.
            data: own shards, or that of the first replica for all.
            dealing: in place of columns, gradients go to the hands of their parameters, if it is direct.
            memory: `(M, n)`, which the columns are written to if it fits; None for new one.

        Returns:
            Losses `(M,)`, zero but for (a shard's part in) that of the local replica, and gradients `(M, n)`; columns
            beyond N are zero.

        Raises:
            TypeError: if the closure cannot evaluate common data.
            ValueError: if a gradient is sparse.
        """
        if data == "common" and self.is_worker and not isinstance(closure, LocalClosure):
            raise TypeError("common data need a closure from topology.closure(module, criterion, inputs, targets)")
        losses = torch.zeros(self.replicas, dtype=torch.float64)
        nothing = displacements.new_empty(0, dtype=self._buckets.dtype)
        if dealing is not None and dealing.direct:
            route = dealing.route(self._for_gradients, nothing)
        else:
            route = Route(partial(self._start_columns, nothing), partial(joined, buckets=self._buckets, memory=memory))
        if not self.is_worker:
            return ReplicaGradients(losses, route.join([route.start(bucket, ()) for bucket in self._buckets]))
        exchange = GradientExchange(parameters, self._buckets, route, lambda: self._postponed)
        for parameter in parameters:
            parameter.grad = None
        try:
            with exchange, torch.enable_grad():
                loss = closure.common() if data == "common" and isinstance(closure, LocalClosure) else closure()
        except Exception as error:
            self.release()  # what is on its way still uses it
            self._all.tell_why(error)
            raise
        losses[self._local] = torch.as_tensor(loss).detach().to(losses) / self.shards
        return ReplicaGradients(losses, exchange.arrived())

    def _start_columns(self, nothing: Tensor, bucket: Bucket, pieces: Sequence[Tensor]) -> Arrival:
        memory = partial(self._memory, self._workspace, nothing.device, bucket.columns)
        rows = self._buckets.split(bucket, pieces, memory("row", self._buckets.holders)) if pieces else nothing
        return self._for_gradients.start_exchange(
            rows, self._workers, self._holders, bucket.width, "gradients", partial(memory, "columns")
        )

    def part(self, vector: Tensor) -> Tensor:
        """The columns of a vector that this process holds.

        Args:
            vector: `(N,)`, the same in all processes.

        Returns:
            `(n,)`; what lies beyond N is zero.
        """
        if self._all.rank not in self._holders:
            return vector[:0].clone()
        return self._buckets.part(vector, self._holders.index(self._all.rank))

    def whole(self, part: Tensor) -> Tensor:
        """A vector from its columns in all processes.

        Args:
            part: `(n,)`.

        Returns:
            `(N,)`, the same bits in all processes.
        """
        everyone = range(self._all.size)
        vector = part.new_empty(self._buckets.size)
        for bucket in self._buckets:
            sent = part[bucket.columns].expand(len(everyone), -1)
            wait = self._all.start_exchange(sent, self._holders, everyone, bucket.width, "shared parameters")
            vector[bucket.elements] = wait().flatten()[: bucket.size]
        return vector

    @property
    def hands(self) -> list[int]:
        """Ranks of the processes that parameters can be dealt to: all that hold columns, those of all shards."""
        return self._holders if self._across is None else list(range(self._of_all_shards.size))

    def dealing(self, parameters: Sequence[Tensor], hands: Sequence[int]) -> Dealing:
        """Parameters as they are dealt out; the same object as long as nothing changes. Called by all processes.

        Args:
            parameters: as for `lay_out`, which has been called.
            hands: which of `hands` gets each.

        Returns:
            How they come there and back.

        Raises:
            ValueError: if replicas are sharded in another way than along the first dimension.
        """
        ranks = tuple(self.hands[hand] for hand in hands)
        if self._dealt is None or self._dealt[0] is not self._buckets or self._dealt[1].hands != ranks:
            sizes = tuple(parameter.numel() for parameter in parameters)
            held, everyone = tuple(self._held(parameters)), self._of_all_shards
            direct = self._across is None and is_even(sizes, ranks, len(self.hands))
            self._dealt = self._buckets, Dealing(everyone, held, ranks, sizes, self._buckets.dtype, direct)
        return self._dealt[1]

    def _held(self, parameters: Sequence[Tensor]) -> list[Held]:
        """What every process has of the parameters."""
        if self._across is None:
            return held_whole(self._buckets, self._holders, self._workers, self._all.size)
        everyone = self._of_all_shards
        table = torch.zeros(everyone.size, 2 + len(parameters), dtype=torch.float64)
        counts = [local(parameter).numel() for parameter in parameters]
        table[everyone.rank] = torch.tensor([self._all.rank, self._across.rank, *counts], dtype=torch.float64)
        rows = [list(map(int, row)) for row in everyone.sum(table, "shards").tolist()]
        if not all(map(sharded_by_rows, parameters)):
            raise ValueError("rule='metric' needs every parameter sharded along its first dimension")

        def cut(local_sizes: Sequence[int]) -> Buckets:
            return Buckets(local_sizes, self._buckets.dtype, len(self._holders), self._bucket_bytes)

        return held_in_shards([(row[0], row[1]) for row in rows], [row[2:] for row in rows], cut)

    def total(self, sums: Tensor, *, steps: int = 1) -> Tensor:
        """Sum over the processes, those of all shards, the same bits in all of them.

        Args:
            sums: fp64 on the CPU, of some M² elements.
            steps: that this sum is made once in: the more there are, the more bytes it may send to take less time.

        Returns:
            The sum, of the same shape.
        """
        at_once = numbers_at_once(self._buckets.size, self._buckets.dtype.itemsize, steps)
        return self._over_shards(self._all.sum(sums, "inner products", at_once=at_once), "inner products")

    def mean_of_workers(self, values: Tensor) -> Tensor:
        """Mean over the processes that have a replica, called by these alone.

        Args:
            values: fp64 on the CPU.

        Returns:
            The mean, of the same shape.
        """
        total = self._over_shards(self._among_workers.sum(values, "buffers"), "buffers")
        return total / (self.replicas * self.shards)

    def _over_shards(self, sums: Tensor, phase: str) -> Tensor:
        return sums if self._across is None else self._across.sum(sums, phase)

    def agree(self, message: Tensor) -> Tensor:
        """What the first worker says, where some processes cannot know it: here all do.

        Args:
            message: fp64, of the same length in all processes.

        Returns:
            The message of the first worker.
        """
        return message

    def spread_from_first(self, tensors: Sequence[Tensor], phase: str) -> None:
        """Overwrite tensors with those of the first worker.

        Args:
            tensors: of the same shapes in all processes.
            phase: what an error calls it.
        """
        self._all.broadcast(tensors, self._workers[0], phase)

    def common_to_workers(self, tensors: Sequence[Tensor], phase: str = "common shard") -> None:
        """Overwrite tensors with those of the first worker, called by workers alone.

        Args:
            tensors: of the same shapes in all processes.
            phase: what an error calls it.
        """
        self._among_workers.broadcast(tensors, 0, phase)

    def align(self, buffers: Sequence[Tensor]) -> None:
        """Overwrite buffers of the module with those of the first worker, where they may differ. Called by workers.

        Args:
            buffers: of the same shapes in all processes.
        """
