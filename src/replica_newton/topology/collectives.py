"""Collectives of `torch.distributed` that end in time, name what failed and count what they send."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


class Collectives:
    """The collectives of one group of processes.

    Every one carries the name of its phase, which an error repeats and by which what is sent is counted.

    Args:
        group: of `torch.distributed`; None for all processes.
        timeout: seconds that a collective may take.
        elements_sent: where elements sent to others are counted, by phase.

    Attributes:
        group: as given.
        rank: of this process in the group.
        size: number of processes in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, elements_sent: Counter[str]) -> None:
        self.group = group
        self.timeout = timeout
        self.elements_sent = elements_sent
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def among(self, ranks: Sequence[int]) -> "Collectives":
        """The collectives of some of the processes; called by these alone.

        Args:
            ranks: in the group, ascending, this process's own among them.

        Returns:
            Collectives of their group, with the same time-out and count.
        """
        if len(ranks) == self.size:
            return self
        globally = dist.get_process_group_ranks(self.group)
        group = dist.new_group([globally[rank] for rank in ranks], use_local_synchronization=True)
        return Collectives(group, self.timeout, self.elements_sent)

    def beside(self) -> "Collectives":
        """Collectives of the same processes in an order of their own: they never wait for those of this group.

        Returns:
            Collectives with the same time-out and count.
        """
        group = dist.new_group(dist.get_process_group_ranks(self.group), use_local_synchronization=True)
        return Collectives(group, self.timeout, self.elements_sent)

    def broadcast(self, tensors: Sequence[Tensor], source: int, phase: str) -> None:
        """Overwrite tensors with those of one process.

        Args:
            tensors: of the same shapes in all processes.
            source: its rank.
            phase: what an error calls it.
        """
        for tensor in tensors:
            buffer = tensor.detach().contiguous()
            self._run(phase, partial(dist.broadcast, buffer, group_src=source, group=self.group, async_op=True))
            self.elements_sent[phase] += buffer.numel() if self.rank == source else 0
            with torch.no_grad():
                tensor.copy_(buffer)

    def exchange(
        self, sent: Tensor, senders: Sequence[int], receivers: Sequence[int], width: int, phase: str
    ) -> Tensor:
        """All-to-all of `width` elements from every sender to every receiver.

        Args:
            sent: `(receivers, width)`; anything where nothing is sent.
            senders: their ranks, ascending.
            receivers: their ranks, ascending.
            width: elements from one to one.
            phase: what an error calls it.

        Returns:
            `(senders, width)` for a receiver, `(senders, 0)` for others.
        """
        sends, receives = self.rank in senders, self.rank in receivers
        outgoing = [width if sends and rank in receivers else 0 for rank in range(self.size)]
        incoming = [width if receives and rank in senders else 0 for rank in range(self.size)]
        received = sent.new_empty(sum(incoming))
        flat = sent.reshape(-1) if sends else sent.new_empty(0)
        start = partial(dist.all_to_all_single, received, flat, incoming, outgoing, group=self.group, async_op=True)
        self._run(phase, start)
        self.elements_sent[phase] += sum(outgoing) - outgoing[self.rank]
        return received.reshape(len(senders), -1)

    def start_exchange(
        self, sent: Tensor, senders: Sequence[int], receivers: Sequence[int], width: int, phase: str
    ) -> Callable[[], Tensor]:
        """Begin an all-to-all of `width` elements from every sender to every receiver, and go on meanwhile.

        Args:
            sent: `(receivers, width)`, not to be changed; anything where nothing is sent.
            senders: their ranks, ascending.
            receivers: their ranks, ascending.
            width: elements from one to one.
            phase: what an error calls it.

        Returns:
            What waits for it and returns `(senders, width)` for a receiver, `(senders, 0)` for others.
        """
        sends, receives = self.rank in senders, self.rank in receivers
        outgoing = [width if sends and rank in receivers else 0 for rank in range(self.size)]
        incoming = [width if receives and rank in senders else 0 for rank in range(self.size)]
        received = sent.new_empty(sum(incoming))
        flat = sent.reshape(-1) if sends else sent.new_empty(0)
        self.elements_sent[phase] += sum(outgoing) - outgoing[self.rank]
        start = partial(dist.all_to_all_single, received, flat, incoming, outgoing, group=self.group, async_op=True)
        begun: Callable[[], Any]
        try:
            work = start()
            begun = lambda: work  # noqa: E731
        except RuntimeError:
            begun = start  # and be told why where it is waited for

        def wait() -> Tensor:
            self._run(phase, begun)
            return received.reshape(len(senders), -1)

        return wait

    def sum(self, sums: Tensor, phase: str) -> Tensor:
        """Sum over the processes, the same bits in all of them.

        Args:
            sums: of the same shape in all processes.
            phase: what an error calls it.

        Returns:
            The sum.
        """
        on_device = sums.cuda() if dist.get_backend(self.group) == "nccl" else sums.clone()
        self._run(phase, partial(dist.all_reduce, on_device, group=self.group, async_op=True))
        self.elements_sent[phase] += 2 * sums.numel() * (self.size - 1) // self.size
        return on_device.to(sums.device)

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
            missing = [rank for rank in range(self.size) if not store.check([f"{name}/{rank}"])]
        except RuntimeError:
            return "and the process that keeps the store is gone"
        return f"missing: rank {', '.join(map(str, missing))}" if missing else "though all ranks are there"


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:160]
