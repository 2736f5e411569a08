"""Servers hold parameters and state, workers have replicas and data."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from replica_newton.topology.collectives import world_size
from replica_newton.topology.generations import Generations
from replica_newton.topology.processes import DEFAULT_TIMEOUT, Processes
from replica_newton.topology.watch import MembersLost

logger = logging.getLogger(__name__)

OnLost = Literal["drop", "stop"]


class ParameterServer(Processes):
    """S servers, the first ranks, which hold all columns and no data, and M workers, the others, one replica each.

        worker    its gradient, N elements                    → servers, N/S elements each
        servers   inner products of rows, all-reduced
        servers   new point of replica m, N/S elements each   → worker m

    A worker sends N elements a step and receives N, and keeps no state; a server sends and receives M N/S, and keeps
    (M + 1) N/S. The script is the same for all, up to

        if topology.is_server:
            optimizer.serve()       # until the workers call optimizer.close()
        else:
            ...                     # train as with any topology
            optimizer.close()

    A worker that is lost is dropped, with a line in the log, and training goes on; another may `join`. A step that was
    under way is ended by all or made again (see `Generations`). `steps`, `replicas` and `replica` then change when
    `optimizer.step` returns: take them anew for every batch. A server that is lost ends the run.

    Args:
        servers: S >= 1, the first ranks of the group.
        process_group: of `torch.distributed`, initialised by the caller; None for all processes.
        timeout: seconds that a collective may take.
        on_lost: "drop" goes on without a lost worker, over gloo; "stop" ends the run for all.

    Attributes:
        replicas: M, the number of workers now.
        rank: of this process in the group; a newcomer's is the next free one.
        steps: steps asked for so far by the whole run, taken or given up; a newcomer has that of the others.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
        ValueError: if there are too few processes for so many servers and a worker, or an option is out of range.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069; Li et al. (2014), Scaling distributed machine learning with the
        parameter server.
    """

    _generations: Generations | None = None
    _calls = 0
    _begun = 0
    _changed = False
    _buffers_differ = False
    _newcomers_until = 0
    _undo: Callable[[], None] | None = None

    def __init__(
        self,
        servers: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        on_lost: OnLost = "drop",
    ) -> None:
        processes = world_size(process_group)
        if not 1 <= servers < processes:
            raise ValueError(f"{servers=} must be in 1 … {processes - 1}, to leave a worker of {processes} processes")
        if on_lost not in get_args(OnLost):
            raise ValueError(f"{on_lost=} must be one of {', '.join(get_args(OnLost))}")
        backend = dist.get_backend(process_group)
        if on_lost == "drop" and backend != "gloo":
            logger.warning("a lost worker ends the run: only gloo can go on without it, not %s", backend)
            on_lost = "stop"
        if on_lost == "stop":
            super().__init__(process_group, range(servers, processes), range(servers), timeout)
            return
        self._begin(timeout)
        group = process_group or dist.distributed_c10d._get_default_group()
        self._enter(Generations.found(group, servers, timeout))

    @classmethod
    def join(cls, store: Store, *, timeout: float = DEFAULT_TIMEOUT) -> "ParameterServer":
        """Come into a run as another worker, as soon as a step of it ends.

        The others wait for a newcomer from then on: load model and data first. The newcomer's parameters, rates and
        batch-norm statistics (with a closure from `topology.closure`) become those of the run.

        Args:
            store: where the run meets: `torch.distributed.TCPStore(address, port, is_master=False)`, with the address
                and port of the founders' `init_process_group`. `torch.distributed` need not be initialised.
            timeout: seconds that this and any collective may take.

        Returns:
            The topology of a worker, whose `steps`, `replica` and `replicas` are those of the run. `TopologyError` if
            there is no run, or it lets nobody in, in time.
        """
        topology = cls.__new__(cls)
        topology._begin(timeout)
        generations, topology.steps = Generations.join(store, timeout)
        topology._enter(generations)
        topology._changed = topology._buffers_differ = True
        return topology

    def _enter(self, generations: Generations) -> None:
        """The first group of this process."""
        self._generations = generations
        self._regroup(generations)
        self._changed = self._buffers_differ = False

    def _regroup(self, generations: Generations) -> None:
        """Form a group of all that are left, and agree with them on which calls have ended.

        A worker ends a call only when all servers have been prepared to. So the calls that all servers have ended are
        those that some worker may have ended, and no others are: who is ahead takes one back, who is behind goes on.
        """
        while True:
            try:
                collectives, ended = generations.form(self._calls, self.elements_sent)
                self._adopt(collectives, range(generations.servers, collectives.size), range(generations.servers))
                break
            except MembersLost:
                generations.advance()
        self.rank = generations.watch.rank
        if self.is_server and self._calls > ended and self._undo is not None:
            self._undo()
        self._undo = None
        self._calls = ended
        self._changed = self._buffers_differ = True

    @property
    def workers(self) -> list[int]:
        """Ranks of the workers, by replica: as launched, and for newcomers the next free ones."""
        return self._workers if self._generations is None else self._generations.workers

    def together(self, call: Callable[[], bool], meet: Callable[[], None]) -> None:
        """Make a call that all processes make: whatever members come or go, either all end it or none does.

        Args:
            call: returns whether it was a step, after which newcomers may come in. Made again if members are lost
                before all servers are prepared.
            meet: brings everybody to the parameters that all share, after a change of members.
        """
        generations = self._generations
        if generations is None:
            call()
            return
        number = self._calls + 1
        while True:
            try:
                if self._changed:
                    meet()
                    self._changed = False
                    if self._calls >= number:
                        return
                self._begun = self._calls
                stepped = call()
                self._calls = self._begun + 1
                if not stepped or self._newcomers_until <= generations.next_newcomer:
                    return
                generations.admit(self._newcomers_until, self.steps)
            except MembersLost as loss:
                logger.debug("%s", loss)
            generations.advance()
            self._regroup(generations)

    def prepared(self, undo: Callable[[], None] | None = None, *, stepped: bool = False) -> None:
        """Nothing that others do can keep this process from ending the call; see `Topology`.

        Args:
            undo: takes back what the call has done.
            stepped: whether the call is a step.
        """
        self._undo = partial(self._take_back, undo, self.steps)
        self.steps += stepped
        if self.is_server:
            self._calls = self._begun + 1

    def _take_back(self, undo: Callable[[], None] | None, steps: int) -> None:
        self.steps = steps
        if undo is not None:
            undo()

    def all_prepared(self) -> None:
        """Wait until all are prepared; see `Topology`.

        A server that was interrupted in here does not know whether others have come further. It was prepared, so it
        ends the call, unless a server was not: then nobody has come further.
        """
        if self._generations is not None:
            self.total(torch.zeros(1, dtype=torch.float64))

    def end_together(
        self, finish: Callable[[], None], undo: Callable[[], None] | None = None, *, stepped: bool = False
    ) -> None:
        """End a call when all have come to this, and before one goes on; see `Topology`.

        Args:
            finish: does so.
            undo: takes that back.
            stepped: whether the call is a step.
        """
        if self._generations is None:
            super().end_together(finish, undo, stepped=stepped)
            return
        # Who has passed the second knows that all servers were prepared; who has come to it, that all have come here.
        self.total(torch.zeros(1, dtype=torch.float64))
        finish()
        self.prepared(undo, stepped=stepped)
        self.total(torch.zeros(1, dtype=torch.float64))

    def total(self, sums: Tensor, *, steps: int = 1) -> Tensor:
        """Sum over the processes; see `Processes`.

        Args:
            sums: fp64 on the CPU, of some M² elements.
            steps: that this sum is made once in.

        Returns:
            The sum, of the same shape.
        """
        summed = super().total(sums, steps=steps)
        # All have come here, so all have ended the call before: it will not be undone, and its columns can go.
        self._undo = None
        return summed

    def align(self, buffers: Sequence[Tensor]) -> None:
        """Overwrite buffers of the module with those of the first worker, after a change of members.

        Args:
            buffers: of the same shapes in all processes.
        """
        if self._buffers_differ:
            self.common_to_workers(buffers, "buffers")
            self._buffers_differ = False

    def said_by_server(self, message: Tensor) -> Tensor:
        """What the first server knows.

        Args:
            message: fp64, of the same length in all processes.

        Returns:
            The message of the first server.
        """
        said = message.clone()
        self._all.broadcast([said], self._holders[0], "what is settled")
        return said

    @property
    def is_server(self) -> bool:
        """Whether this process holds columns and has no replica."""
        return not self.is_worker

    def agree(self, message: Tensor) -> Tensor:
        """What the first worker says: servers have no loop of their own to know it from.

        Args:
            message: fp64, of the same length in all processes.

        Returns:
            The message of the first worker.
        """
        watch = None if self._generations is None else self._generations.watch
        newcomers_until = 0 if watch is None or watch.next_newcomer is None else watch.next_newcomer
        agreed = torch.cat([message.new_tensor([newcomers_until]), message])
        self.spread_from_first([agreed], "what comes next")
        self._newcomers_until = int(agreed[0])
        return agreed[1:]
