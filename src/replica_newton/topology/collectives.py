"""Collectives of `torch.distributed` that end in time, name what failed and count what they send."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllToAllOptions, BroadcastOptions, PrefixStore, Store

from replica_newton.topology.watch import MembersLost, TopologyError, Watch

Group: TypeAlias = dist.ProcessGroup | dist.ProcessGroupGloo

_SLICE = 0.1
"""Seconds between two looks, while waiting, whether somebody else has noticed that a process is lost."""
LITTLE = 256
"""Numbers that a process may always send for a sum in one message to each, where two would send less."""


def numbers_at_once(parameters: int, element: int, steps: int = 1) -> int:
    """Numbers that a process may send for a sum in one message to each: a twentieth of what a row is, in bytes.

    Args:
        parameters: N, elements of a row, of which a step sends one or two.
        element: bytes of one.
        steps: that a sum is made once in.

    Returns:
        So many fp64 numbers, `LITTLE` at least.
    """
    return max(LITTLE, steps * parameters * element // (20 * torch.float64.itemsize))


def sent_for_a_sum(numbers: int, processes: int, at_once: int = LITTLE) -> int:
    """What every process sends to the others for a sum over all.

    Args:
        numbers: K, that are summed.
        processes: P.
        at_once: numbers that it may send in one message to each.

    Returns:
        `(P−1) K` in one message to each where that is little, `2 (P−1) ⌈K/P⌉` in two otherwise.
    """
    others = processes - 1
    if exchanges_for_a_sum(numbers, processes, at_once) == 1:
        return others * numbers
    return 2 * others * -(-numbers // processes)


def exchanges_for_a_sum(numbers: int, processes: int, at_once: int = LITTLE) -> int:
    """How often all send to all for a sum, one time after the other.

    Args:
        numbers: that are summed.
        processes: that sum them.
        at_once: numbers that a process may send in one message to each.

    Returns:
        1 or 2.
    """
    return 1 if processes == 2 or (processes - 1) * numbers <= at_once else 2


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
        group: of `torch.distributed`, or a gloo group made without it.
        timeout: seconds that a collective may take.
        elements_sent: where elements sent to others are counted, by phase.
        watch: finds out who is missing when one fails.
        form: makes the group of some ranks, ascending, of this one, called by these alone.
        going_on: whether those that are left can go on when processes are lost.

    Attributes:
        group: as given.
        rank: of this process in the group.
        size: number of processes in the group.
    """

    def __init__(
        self,
        group: Group,
        timeout: float,
        elements_sent: Counter[str],
        watch: Watch,
        form: Callable[[Sequence[int]], Group],
        *,
        going_on: bool = False,
    ) -> None:
        self.group: Any = group
        self.timeout = timeout
        self.elements_sent = elements_sent
        self.rank = group.rank()
        self.size = group.size()
        self._watch = watch
        self._form = form
        self._going_on = going_on
        backend = group.name() if isinstance(group, dist.ProcessGroupGloo) else dist.get_backend(group)
        self._on_device = backend == "nccl"
        # Only gloo can be asked again after a wait that was too short.
        self._slice = _SLICE if backend == "gloo" else timeout

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None, timeout: float, elements_sent: Counter[str]) -> "Collectives":
        """The collectives of a group of `torch.distributed`.

        Args:
            process_group: None for all processes.
            timeout: seconds that a collective may take.
            elements_sent: where elements sent to others are counted, by phase.

        Returns:
            The collectives.
        """
        group = process_group or dist.distributed_c10d._get_default_group()
        watch = Watch(meeting_point(group), group.rank(), range(group.size()), timeout)

        def form(ranks: Sequence[int]) -> dist.ProcessGroup:
            globally = dist.get_process_group_ranks(group)
            made: dist.ProcessGroup = dist.new_group([globally[rank] for rank in ranks], use_local_synchronization=True)
            return made

        return cls(group, timeout, elements_sent, watch, form)

    def among(self, ranks: Sequence[int]) -> "Collectives":
        """The collectives of some of the processes; called by these alone.

        Args:
            ranks: in the group, ascending, this process's own among them.

        Returns:
            Collectives of their group, with the same time-out and count.
        """
        if len(ranks) == self.size:
            return self
        return self._like(self._form(ranks))

    def _like(self, group: Group) -> "Collectives":
        return Collectives(group, self.timeout, self.elements_sent, self._watch, self._form, going_on=self._going_on)

    def beside(self) -> "Collectives":
        """Collectives of the same processes in an order of their own: they never wait for those of this group.

        Returns:
            Collectives with the same time-out and count.
        """
        return self._like(self._form(range(self.size)))

    def broadcast(self, tensors: Sequence[Tensor], source: int, phase: str) -> None:
        """Overwrite tensors with those of one process.

        Args:
            tensors: of the same shapes in all processes.
            source: its rank.
            phase: what an error calls it.
        """
        for tensor in tensors:
            buffer = self._placed(tensor.detach()).contiguous()
            options = BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self._run(phase, partial(self.group.broadcast, [buffer], options))
            self.elements_sent[phase] += buffer.numel() if self.rank == source else 0
            with torch.no_grad():
                tensor.copy_(buffer)

    def start_exchange(
        self,
        sent: Tensor,
        senders: Sequence[int],
        receivers: Sequence[int],
        width: int,
        phase: str,
        memory: Callable[[int], Tensor] | None = None,
    ) -> Callable[[], Tensor]:
        """Begin an all-to-all of `width` elements from every sender to every receiver, and go on meanwhile.

        Args:
            sent: `(receivers, width)`, not to be changed; anything where nothing is sent.
            senders: their ranks, ascending.
            receivers: their ranks, ascending.
            width: elements from one to one.
            phase: what an error calls it.
            memory: gives memory, `(k · width,)`, for what comes from k senders; None for new one.

        Returns:
            What waits for it and returns `(senders, width)` for a receiver, `(senders, 0)` for others.
        """
        sends, receives = self.rank in senders, self.rank in receivers
        outgoing = [width if sends and rank in receivers else 0 for rank in range(self.size)]
        incoming = [width if receives and rank in senders else 0 for rank in range(self.size)]
        # Expanded rows of one element are a view without storage of their own, even when flattened.
        flat = sent.reshape(-1).contiguous() if sends else sent.new_empty(0)
        received = memory(len(senders)) if memory is not None and receives else None
        wait = self.start_all_to_all(flat, outgoing, incoming, phase, received)
        return lambda: wait().reshape(len(senders), -1)

    def start_all_to_all(
        self,
        sent: Tensor,
        outgoing: Sequence[int],
        incoming: Sequence[int],
        phase: str,
        received: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """Begin to send every process as many elements as it is to get, and go on meanwhile.

        Args:
            sent: those for each process, one after the other; not to be changed.
            outgoing: how many are for each.
            incoming: how many come from each.
            phase: what an error calls it.
            received: memory for all that comes, one after the other; None for new one.

        Returns:
            What waits for it and returns what has come, one after the other.
        """
        into = sent.new_empty(sum(incoming)) if received is None else received
        self.elements_sent[phase] += sum(outgoing) - outgoing[self.rank]
        start = partial(self.group.alltoall_base, into, sent, list(incoming), list(outgoing), AllToAllOptions())
        begun: Callable[[], Any]
        try:
            work = start()
            begun = lambda: work  # noqa: E731
        except RuntimeError:
            begun = start  # and be told why where it is waited for

        def wait() -> Tensor:
            self._run(phase, begun)
            return into

        return wait

    def sum(self, sums: Tensor, phase: str, *, at_once: int = LITTLE) -> Tensor:
        """Sum over the processes, the same bits in all of them.

        What a small sum costs is the number of messages that wait for each other. An all-reduce over a ring has
        2 (P−1) of them in P processes, an exchange of all with all one. So little is sent to everybody, who adds it up
        in the order of the ranks; of more than that everybody adds up a P-th, and sends the others what came out: two
        messages, and the bytes of the ring (see `sent_for_a_sum`).

        Args:
            sums: of the same shape in all processes.
            phase: what an error calls it.
            at_once: numbers that may be sent to everybody, P − 1 times as many as there are; the same in all processes.

        Returns:
            The sum.
        """
        P, K = self.size, sums.numel()
        if P == 1:
            return sums.clone()
        flat = self._placed(sums.flatten())
        if exchanges_for_a_sum(K, P, at_once) == 1:
            total = self._from_each(flat.expand(P, K), phase).sum(dim=0)
        else:
            padded = torch.nn.functional.pad(flat, (0, -K % P)).reshape(P, -1)
            part = self._from_each(padded, phase).sum(dim=0)
            total = self._from_each(part.expand(P, -1), phase).flatten()[:K]
        return total.reshape(sums.shape).to(sums.device)

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where the backend can send it from."""
        return tensor.cuda() if self._on_device else tensor

    def _from_each(self, sent: Tensor, phase: str) -> Tensor:
        """Row j of `(P, w)` goes to process j; row j of what is returned has come from there."""
        everyone = range(self.size)
        return self.start_exchange(sent, everyone, everyone, sent.shape[1], phase)()

    def tell_why(self, error: Exception) -> None:
        """Leave word of an error in this process, which the others would only know as silence.

        Args:
            error: raised between collectives; one of a collective is known to all.
        """
        if not isinstance(error, TopologyError):
            with suppress(TopologyError):
                self._watch.in_time(lambda: self._watch.leave(error))

    def _run(self, phase: str, start: Callable[[], Any]) -> None:
        """One collective, in time."""
        begun = time.monotonic()
        self._watch.enter(phase)
        try:
            self._wait(start(), begun + self.timeout)
        except RuntimeError as error:
            took = time.monotonic() - begun
            raise self._failure(phase, took, error) from error
        finally:
            self._watch.phase = ""

    def _wait(self, work: Any, until: float) -> None:
        """Wait for a collective, and look up now and then, since others may know that it will never end."""
        while True:
            left = max(until - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=min(self._slice, left)))
            except RuntimeError:
                if work.is_completed():
                    # It has failed, or ended while it was given up.
                    work.wait(timedelta(seconds=self._slice))
                    return
                if time.monotonic() >= until:
                    raise
                if self._watch.alarmed >= self._watch.generation:
                    raise RuntimeError("another process has noticed it") from None
            else:
                return

    def _failure(self, phase: str, took: float, error: RuntimeError) -> TopologyError:
        watch, line = self._watch, str(error).partition("\n")[0][:160]
        failed = f"{phase}: failed after {took:.1f} s"
        try:
            verdict = watch.in_time(lambda: watch.verdict(phase, timed_out=took >= self.timeout))
        except TopologyError as gone:
            return TopologyError(f"{failed}, and {gone} ({line})")
        missing = f"missing: rank {verdict.names}" if verdict.missing else "though all ranks are there"
        said = f"{failed}, {missing} ({line})"
        return MembersLost(said) if self._going_on else TopologyError(said)


def meeting_point(group: dist.ProcessGroup) -> Store:
    """Where those meet that make a topology of a group, and nobody else.

    Args:
        group: of `torch.distributed`. Its processes make their topologies in the same order.

    Returns:
        A store whose keys no other topology sees.
    """
    name = group.group_name
    _topologies[name] += 1
    store = dist.distributed_c10d._get_default_store()
    return PrefixStore(f"replica-newton/{name}/{_topologies[name]}", store)


_topologies: Counter[str] = Counter()
"""How many topologies this process has made, by group."""
