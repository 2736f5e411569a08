"""Replicas in processes of their own, their vectors exchanged by the collectives of `torch.distributed`."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from replica_newton.topology.simulated import Criterion, Data, ReplicaGradients, backward

DEFAULT_TIMEOUT = 300.0
_LAST_WORDS = 2.0
"""Seconds in which those that still run can say so, after a collective has failed."""


class TopologyError(RuntimeError):
    """A collective failed or timed out; the message names the phase and the ranks that are missing."""


def world_size(process_group: dist.ProcessGroup | None) -> int:
    """Number of processes in a group.

    Args:
        process_group: None for all processes.

    Returns:
        The number.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialised first: torch.distributed.init_process_group(...)")
    return dist.get_world_size(process_group)


class Processes:
    """M replicas in processes of their own, and processes that hold columns; some or all may be both.

    A holder has n = ⌈N/H⌉ of the N columns of everything, H being the number of holders: of the shared parameters, and
    of the rows of all replicas. The order of the collectives depends on nothing but the calls: not on data, and not on
    parameters without gradient.

    Between steps the module of a replica stands where the replica does, not at the parameters that all share:
    `ReplicaNewton.synchronise` moves it there.

    Args:
        process_group: of `torch.distributed`, initialised by the caller; None for all processes.
        workers: ranks in the group that have a replica, ascending.
        holders: ranks in the group that hold columns, ascending.
        timeout: seconds that a collective may take.

    Attributes:
        replicas: M, the number of workers.
        rank: of this process in the group.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        ValueError: if `timeout` is not positive.
    """

    distributed = True

    def __init__(
        self, process_group: dist.ProcessGroup | None, workers: Sequence[int], holders: Sequence[int], timeout: float
    ) -> None:
        if not 0.0 < timeout < float("inf"):
            raise ValueError(f"{timeout=} must be positive and finite, in seconds")
        self._group = process_group
        self._workers = list(workers)
        self._holders = list(holders)
        self.timeout = timeout
        self.replicas = len(self._workers)
        self.rank = dist.get_rank(process_group)
        self.elements_sent: Counter[str] = Counter()
        self._among_workers = process_group
        if self.is_worker and len(self._workers) < self._processes:
            ranks = dist.get_process_group_ranks(process_group)
            members = [ranks[worker] for worker in self._workers]
            self._among_workers = dist.new_group(members, use_local_synchronization=True)

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
            module: the model, of the same architecture in all processes.
            criterion: loss of `(module(*inputs), targets)`, a mean over samples.
            inputs: of the shard, batch first; the same shape in all processes.
            targets: of the shard, batch first.

        Returns:
            The closure.
        """
        return LocalClosure(self, module, criterion, inputs if isinstance(inputs, tuple) else (inputs,), targets)

    @property
    def is_worker(self) -> bool:
        """Whether this process has a replica."""
        return self.rank in self._workers

    @property
    def replica(self) -> int | None:
        """m, the number of the replica in this process, from 0; None where there is none."""
        return self._workers.index(self.rank) if self.is_worker else None

    @property
    def _processes(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def _local(self) -> slice:
        """Of the M replicas, the one that is here, if any."""
        return slice(0, 0) if self.replica is None else slice(self.replica, self.replica + 1)

    def points(self, parameters: Tensor, displacements: Tensor) -> Tensor:  # noqa: ARG002
        """Where the local replicas stand: the module is there already.

        Args:
            parameters: `(N,)`, of the module.
            displacements: `(M, n)` columns.

        Returns:
            `(1, N)`; `(0, N)` where there is no replica.
        """
        return parameters[None][: int(self.is_worker)]

    def published(self, shared: Tensor, displacements: Tensor, size: int) -> Tensor:
        """What the module's parameters become: the point of this process's replica.

        Args:
            shared: `(n,)` columns of the parameters that all share.
            displacements: `(M, n)` columns.
            size: N.

        Returns:
            `(N,)`; zeros where there is no replica.
        """
        points = self._exchange("points", shared + displacements, self._holders, self._workers, self._width(size))
        return points.flatten()[:size] if self.is_worker else shared.new_zeros(size)

    def gradients(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], points: Tensor, data: Data
    ) -> ReplicaGradients:
        """Loss and gradient of the local replica, at the module's parameters.

        Args:
            closure: of any kind for own data; a `LocalClosure` for common data.
            parameters: whose gradients are wanted; those without get zeros.
            points: `(1, N)`, where the module stands.
            data: own shards, or that of the first replica for all.

        Returns:
            Losses `(1,)` and gradients `(1, N)`.

        Raises:
            TypeError: if the closure cannot evaluate common data.
            ValueError: if a gradient is sparse.
        """
        if not self.is_worker:
            return ReplicaGradients(points.new_zeros(0), points)
        for parameter in parameters:
            parameter.grad = None
        if data == "own":
            with torch.enable_grad():
                loss = closure()
        elif isinstance(closure, LocalClosure):
            loss = closure.common()
        else:
            raise TypeError("common data need a closure from topology.closure(module, criterion, inputs, targets)")
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if any(piece.layout != torch.strided for piece in pieces):
            raise ValueError("sparse gradients are not supported")
        row = torch.cat([piece.flatten() for piece in pieces]).to(points.dtype)
        return ReplicaGradients(torch.as_tensor(loss).detach().reshape(1), row[None])

    def columns(self, rows: Tensor) -> Tensor:
        """Rows of all replicas, the columns that this process holds.

        Args:
            rows: `(1, N)`, of the local replica, if any.

        Returns:
            `(M, n)`; columns beyond N are zero.
        """
        pieces = self._split(rows[0]) if len(rows) else rows.new_zeros(0)
        return self._exchange("gradients", pieces, self._workers, self._holders, self._width(rows.shape[1]))

    def part(self, vector: Tensor) -> Tensor:
        """The columns of a vector that this process holds.

        Args:
            vector: `(N,)`, the same in all processes.

        Returns:
            `(n,)`; what lies beyond N is zero.
        """
        if self.rank not in self._holders:
            return vector[:0].clone()
        return self._split(vector)[self._holders.index(self.rank)].clone()

    def whole(self, part: Tensor, size: int) -> Tensor:
        """A vector from its columns in all processes.

        Args:
            part: `(n,)`.
            size: N.

        Returns:
            `(N,)`, the same bits in all processes.
        """
        everyone = list(range(self._processes))
        sent = part.expand(self._processes, -1)
        return self._exchange("shared parameters", sent, self._holders, everyone, self._width(size)).flatten()[:size]

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes, the same bits in all of them.

        Args:
            sums: fp64 on the CPU, of some M² elements.

        Returns:
            The sum, of the same shape.
        """
        return self._sum("inner products", sums, self._group)

    def total_of_workers(self, sums: Tensor) -> Tensor:
        """Sum over the processes that have a replica, called by these alone.

        Args:
            sums: fp64 on the CPU.

        Returns:
            The sum, of the same shape.
        """
        return self._sum("buffers", sums, self._among_workers)

    def by_replica(self, values: Tensor) -> Tensor:
        """Numbers of all replicas.

        Args:
            values: `(1, k)`, of the local replica.

        Returns:
            `(M, k)` fp64 on the CPU, the same in all processes.
        """
        table = torch.zeros(self.replicas, values.shape[1], dtype=torch.float64)
        table[self._local] = values.to(table)
        return self.total(table)

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
        self._broadcast(tensors, phase, self._group, self._workers[0])

    def common_to_workers(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first worker, called by workers alone.

        Args:
            tensors: of the same shapes in all processes.
        """
        self._broadcast(tensors, "common shard", self._among_workers, 0)

    def _broadcast(self, tensors: Sequence[Tensor], phase: str, group: dist.ProcessGroup | None, source: int) -> None:
        for tensor in tensors:
            buffer = tensor.detach().contiguous()
            self._run(phase, partial(dist.broadcast, buffer, group_src=source, group=group, async_op=True))
            self.elements_sent[phase] += buffer.numel() if self.rank == self._workers[0] else 0
            with torch.no_grad():
                tensor.copy_(buffer)

    def _width(self, size: int) -> int:
        """n, the columns of a holder, of N elements."""
        return -(-size // len(self._holders))

    def _split(self, vector: Tensor) -> Tensor:
        """`(H, n)`: the vector, filled up with zeros, in as many pieces as there are holders."""
        width = self._width(vector.numel())
        padded = vector.new_zeros(len(self._holders) * width)
        padded[: vector.numel()] = vector
        return padded.reshape(-1, width)

    def _exchange(self, phase: str, sent: Tensor, senders: list[int], receivers: list[int], width: int) -> Tensor:
        """All-to-all of `width` elements from every sender to every receiver.

        Returns:
            `(senders, width)` for a receiver, `(senders, 0)` for others.
        """
        everyone = range(self._processes)
        sends, receives = self.rank in senders, self.rank in receivers
        outgoing = [width if sends and rank in receivers else 0 for rank in everyone]
        incoming = [width if receives and rank in senders else 0 for rank in everyone]
        received = sent.new_empty(sum(incoming))
        flat = sent.reshape(-1) if sends else sent.new_empty(0)
        start = partial(dist.all_to_all_single, received, flat, incoming, outgoing, group=self._group, async_op=True)
        self._run(phase, start)
        self.elements_sent[phase] += sum(outgoing) - outgoing[self.rank]
        return received.reshape(len(senders), -1)

    def _sum(self, phase: str, sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        summed = self._on_device(sums).clone()
        self._run(phase, partial(dist.all_reduce, summed, group=group, async_op=True))
        processes = dist.get_world_size(group)
        self.elements_sent[phase] += 2 * summed.numel() * (processes - 1) // processes
        return summed.to(sums.device)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if dist.get_backend(self._group) == "nccl" else tensor

    def _run(self, phase: str, start: Callable[[], Any]) -> None:
        """One collective, in time."""
        begun = time.monotonic()
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            took = time.monotonic() - begun
            raise TopologyError(f"{phase}: failed after {took:.1f} s, {self._missing()} ({_line(error)})") from error

    def _missing(self) -> str:
        """Which ranks do not say within two seconds that a collective has failed for them too."""
        try:
            store = dist.distributed_c10d._get_default_store()
            name = "replica-newton/failed"
            store.set(f"{name}/{self.rank}", "here")
            time.sleep(_LAST_WORDS)
            missing = [rank for rank in range(self._processes) if not store.check([f"{name}/{rank}"])]
        except RuntimeError:
            return "and the process that keeps the store is gone"
        return f"missing: rank {', '.join(map(str, missing))}" if missing else "though all ranks are there"


class LocalClosure:
    """One replica's shard of a global batch. Made by `Processes.closure`.

    Called without arguments it leaves the gradient of the shard in `.grad` and returns the loss.
    """

    def __init__(
        self,
        topology: Processes,
        module: nn.Module,
        criterion: Criterion,
        inputs: tuple[Tensor, ...],
        targets: Tensor,
    ) -> None:
        self._topology = topology
        self._module = module
        self._criterion = criterion
        self._samples = (*inputs, targets)
        self.samples_evaluated = 0

    @property
    def replicas(self) -> int:
        """M, the number of shards of the batch."""
        return self._topology.replicas

    @property
    def samples(self) -> int:
        """Number of samples in the global batch."""
        return self.replicas * len(self._samples[-1])

    def losses(self) -> list[Callable[[], Tensor]]:
        """A function that returns the loss of this replica's shard, as the module stands."""

        def loss() -> Tensor:
            *inputs, targets = self._samples
            return self._criterion(self._module(*inputs), targets)

        return [loss]

    def __call__(self) -> Tensor:
        """Gradient of the shard; buffers (batch-norm statistics) become the mean over replicas."""
        loss = self._backward(self._samples)
        for buffer in self._module.buffers():
            if buffer.is_floating_point():
                mean = self._topology.total_of_workers(buffer.double().cpu()) / self.replicas
                buffer.copy_(mean.to(buffer))
        return loss

    def common(self) -> Tensor:
        """Gradient on the shard of the first replica, with its random numbers; buffers stay."""
        samples = tuple(rows.clone() for rows in self._samples)
        random_state = torch.get_rng_state()
        self._topology.common_to_workers((*samples, random_state))
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        with torch.random.fork_rng():
            torch.set_rng_state(random_state)
            loss = self._backward(samples)
        for buffer, value in buffers:
            buffer.copy_(value)
        return loss

    def _backward(self, samples: tuple[Tensor, ...]) -> Tensor:
        loss = backward(self._module, self._criterion, samples)
        self.samples_evaluated += self.replicas * len(samples[-1])
        return loss


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:160]
