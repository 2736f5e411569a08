"""One replica a process, its vectors exchanged by the collectives of `torch.distributed`."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from replica_newton.topology.simulated import Criterion, Data, ReplicaGradients

DEFAULT_TIMEOUT = 300.0
_LAST_WORDS = 2.0
"""Seconds in which those that still run can say so, after a collective has failed."""


class TopologyError(RuntimeError):
    """A collective failed or timed out; the message names the phase and the ranks that are missing."""


class TreeReduction:
    """M replicas in M processes, one each, that share the work on every vector by columns.

    Process j holds columns `j·n … (j+1)·n − 1` of everything, n = ⌈N/M⌉: of the shared parameters, and of the rows of
    all replicas. Rows travel to columns and back by all-to-all, so that a step sends what data-parallel SGD sends:

        gradients    row m, N elements       → columns, M × n       N (M−1)/M elements sent
        inner products of rows               all-reduced            some M²
        new points   columns, M × n          → row m, N elements    N (M−1)/M elements sent

    together `2 N (M−1)/M`, a ring all-reduce of the gradient. The order of the collectives depends on nothing but the
    calls: not on data, and not on parameters without gradient.

    Between steps the module of process m stands where replica m does, not at the parameters that all share:
    `ReplicaNewton.synchronise` moves it there.

    Args:
        process_group: of `torch.distributed`, initialised by the caller (`torchrun` and
            `torch.distributed.init_process_group`); None for all processes.
        timeout: seconds that a collective may take.

    Attributes:
        replicas: M, the number of processes in the group.
        rank: of this process in the group.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
        ValueError: if `timeout` is not positive.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069: "trivially implemented in both the Parameter-Server and
        Tree-Reduction frameworks".
    """

    distributed = True

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch.distributed must be initialised first: torch.distributed.init_process_group(...)")
        if not 0.0 < timeout < float("inf"):
            raise ValueError(f"{timeout=} must be positive and finite, in seconds")
        self._group = process_group
        self.timeout = timeout
        self.replicas = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        self.elements_sent: Counter[str] = Counter()
        self._collectives = 0

    def __repr__(self) -> str:
        return f"TreeReduction(replicas={self.replicas}, rank={self.rank})"

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a TreeReduction belongs to its process and cannot be copied or pickled")

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

    def points(self, parameters: Tensor, displacements: Tensor) -> Tensor:  # noqa: ARG002
        """Where the local replicas stand: the module is there already.

        Args:
            parameters: `(N,)`, of the module.
            displacements: `(M, n)` columns.

        Returns:
            `(1, N)`.
        """
        return parameters[None]

    def published(self, shared: Tensor, displacements: Tensor, size: int) -> Tensor:
        """What the module's parameters become: the point of this process's replica.

        Args:
            shared: `(n,)` columns of the parameters that all share.
            displacements: `(M, n)` columns.
            size: N.

        Returns:
            `(N,)`.
        """
        return self._exchange("points", shared + displacements).flatten()[:size]

    def gradients(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], points: Tensor, data: Data
    ) -> ReplicaGradients:
        """Loss and gradient of the local replica, at the module's parameters.

        Args:
            closure: of any kind for own data; a `LocalClosure` for common data.
            parameters: whose gradients are wanted; those without get zeros.
            points: `(1, N)`, where the module stands.
            data: own shards, or that of rank 0 for all.

        Returns:
            Losses `(1,)` and gradients `(1, N)`.

        Raises:
            TypeError: if the closure cannot evaluate common data.
            ValueError: if a gradient is sparse.
        """
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
            rows: `(1, N)`, of the local replica.

        Returns:
            `(M, n)`; columns beyond N are zero.
        """
        return self._exchange("gradients", self._split(rows[0]))

    def part(self, vector: Tensor) -> Tensor:
        """The columns of a vector that this process holds.

        Args:
            vector: `(N,)`, the same in all processes.

        Returns:
            `(n,)`; what lies beyond N is zero.
        """
        return self._split(vector)[self.rank].clone()

    def whole(self, part: Tensor, size: int) -> Tensor:
        """A vector from its columns in all processes.

        Args:
            part: `(n,)`.
            size: N.

        Returns:
            `(N,)`, the same bits in all processes.
        """
        return self._exchange("shared parameters", part.expand(self.replicas, -1)).flatten()[:size]

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes, the same bits in all of them.

        Args:
            sums: fp64 on the CPU, of some M² elements.

        Returns:
            The sum, of the same shape.
        """
        summed = self._on_device(sums).clone()
        self._run("inner products", lambda: dist.all_reduce(summed, group=self._group, async_op=True))
        self.elements_sent["inner products"] += 2 * summed.numel() * (self.replicas - 1) // self.replicas
        return summed.to(sums.device)

    def by_replica(self, values: Tensor) -> Tensor:
        """Numbers of all replicas.

        Args:
            values: `(1, k)`, of the local replica.

        Returns:
            `(M, k)` fp64 on the CPU, the same in all processes.
        """
        table = torch.zeros(self.replicas, values.shape[1], dtype=torch.float64)
        table[self.rank] = values[0]
        return self.total(table)

    def spread_from_first(self, tensors: Sequence[Tensor], phase: str) -> None:
        """Overwrite tensors with those of rank 0.

        Args:
            tensors: of the same shapes in all processes.
            phase: what an error calls it.
        """
        for tensor in tensors:
            buffer = tensor.detach().contiguous()
            self._run(phase, partial(dist.broadcast, buffer, group_src=0, group=self._group, async_op=True))
            self.elements_sent[phase] += buffer.numel() if self.rank == 0 else 0
            with torch.no_grad():
                tensor.copy_(buffer)

    def _split(self, vector: Tensor) -> Tensor:
        """`(M, n)`: the vector, filled up with zeros, in as many pieces as there are processes."""
        width = -(-vector.numel() // self.replicas)
        padded = vector.new_zeros(self.replicas * width)
        padded[: vector.numel()] = vector
        return padded.reshape(self.replicas, width)

    def _exchange(self, phase: str, rows: Tensor) -> Tensor:
        """All-to-all: row j goes to process j; row j of the result comes from there."""
        sent = rows.contiguous()
        received = torch.empty_like(sent)
        self._run(phase, lambda: dist.all_to_all_single(received, sent, group=self._group, async_op=True))
        self.elements_sent[phase] += sent.numel() - sent[0].numel()
        return received

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if dist.get_backend(self._group) == "nccl" else tensor

    def _run(self, phase: str, start: Callable[[], Any]) -> None:
        """One collective, in its turn and in time."""
        self._collectives += 1
        begun = time.monotonic()
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            took = time.monotonic() - begun
            raise TopologyError(f"{phase}: failed after {took:.1f} s, {self._missing()} ({_line(error)})") from error

    def _missing(self) -> str:
        """Which ranks do not say that they are at this collective too."""
        try:
            store = dist.distributed_c10d._get_default_store()
            name = f"replica-newton/failed/{self._collectives}"
            store.set(f"{name}/{self.rank}", "here")
            time.sleep(_LAST_WORDS)
            missing = [rank for rank in range(self.replicas) if not store.check([f"{name}/{rank}"])]
        except RuntimeError:
            return "and the process that keeps the store is gone"
        return f"missing: rank {', '.join(map(str, missing))}" if missing else "though all ranks are there"


class LocalClosure:
    """One replica's shard of a global batch. Made by `TreeReduction.closure`.

    Called without arguments it leaves the gradient of the shard in `.grad` and returns the loss.
    """

    def __init__(
        self,
        topology: TreeReduction,
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

    def __call__(self) -> Tensor:
        """Gradient of the shard; buffers (batch-norm statistics) become the mean over replicas."""
        loss = self._backward(self._samples)
        for buffer in self._module.buffers():
            if buffer.is_floating_point():
                mean = self._topology.total(buffer.double().cpu()) / self.replicas
                buffer.copy_(mean.to(buffer))
        return loss

    def common(self) -> Tensor:
        """Gradient on the shard of rank 0, with its random numbers; buffers stay."""
        samples = tuple(rows.clone() for rows in self._samples)
        random_state = torch.get_rng_state()
        self._topology.spread_from_first((*samples, random_state), "common shard")
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        with torch.random.fork_rng():
            torch.set_rng_state(random_state)
            loss = self._backward(samples)
        for buffer, value in buffers:
            buffer.copy_(value)
        return loss

    def _backward(self, samples: tuple[Tensor, ...]) -> Tensor:
        self._module.zero_grad()
        with torch.enable_grad():
            *inputs, targets = samples
            loss = self._criterion(self._module(*inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        self.samples_evaluated += self.replicas * len(samples[-1])
        return loss.detach()


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:160]
