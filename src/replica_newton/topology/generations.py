"""Generations: who belongs to a run whose workers may come and go, and the group through which they talk."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from replica_newton.topology.collectives import Collectives, Group, meeting_point
from replica_newton.topology.watch import MembersLost, TopologyError, Verdict, Watch, connection

logger = logging.getLogger(__name__)

_PAUSE = 0.05
_FORMING = "forming a group"
"""Phase in which all members of a generation wait for each other."""


class Generations:
    """One process's part in a run with servers, which hold what cannot be lost, and workers, which come and go.

    A gloo group breaks with the first of its members. So every change of members begins a new generation with a group
    of its own, made by way of the store:

        a collective of generation g fails          somebody asks for admission, and a step ends
                     │                                              │
        verdict/g: who is missing                       verdict/g: who joins
                     └──────────────────────┬───────────────────────┘
        arrived/g+1/rank: everybody says how many calls it has ended
                                            │
                          group/g+1: the group, if all have come;
                          else verdict/g+1, and on to generation g+2

    Args:
        run: store of this run, the same for founders and newcomers.
        watch: of this process, in the generation that it enters first.
        servers: S, which have the ranks 0 … S − 1.
        next_newcomer: the rank that the next newcomer will have.

    Attributes:
        watch: as given.
        servers: as given.
        next_newcomer: the rank that the next newcomer will have.
    """

    def __init__(self, run: Store, watch: Watch, servers: int, next_newcomer: int) -> None:
        self.next_newcomer = next_newcomer
        self.watch = watch
        self._store = run
        self.servers = servers
        self._groups: list[Group] = []

    @classmethod
    def found(cls, group: dist.ProcessGroup, servers: int, timeout: float) -> "Generations":
        """The first generation, all processes of a group, called by each.

        Args:
            group: of `torch.distributed`.
            servers: S.
            timeout: seconds that a collective may take.

        Returns:
            The generations.
        """
        meeting, rank, count = meeting_point(group), group.rank(), group.size()
        if rank == 0:
            root = _root(meeting)
            number = str(root.add("runs", 1))
            root.set(f"{number}/founded", json.dumps({"servers": servers, "processes": count}))
            meeting.set("run", number)
            root.set("run", number)
        run = connection(PrefixStore(meeting.get("run").decode(), _root(meeting)))
        return cls(run, Watch(run, rank, range(count), timeout, next_newcomer=count), servers, count)

    @classmethod
    def join(cls, store: Store, timeout: float) -> tuple["Generations", int]:
        """Come into the latest run that meets at a store, as soon as a step of it ends.

        Args:
            store: that of the founders.
            timeout: seconds that this and any collective may take.

        Returns:
            The generations, and the number of steps so far.

        Raises:
            TopologyError: if there is no run, or it lets nobody in, in time.
        """
        root = connection(_root(store))
        limit = timedelta(seconds=timeout)
        try:
            root.wait(["run"], limit)
            run = connection(PrefixStore(root.get("run").decode(), root))
            founded = json.loads(run.get("founded"))
            rank = founded["processes"] + run.add("candidates", 1) - 1
            watch = Watch(run, rank, [rank], timeout, next_newcomer=rank + 1)
            run.set(f"candidate/{rank}", "")
            run.wait([f"admitted/{rank}"], limit)
        except RuntimeError as error:
            raise TopologyError(f"no run has let this process in within {timeout:g} s") from error
        admitted = json.loads(run.get(f"admitted/{rank}"))
        watch.members, watch.generation = admitted["members"], admitted["generation"]
        logger.info("rank %d joins in generation %d, after %d steps", rank, watch.generation, admitted["steps"])
        return cls(run, watch, founded["servers"], admitted["next_newcomer"]), admitted["steps"]

    @property
    def members(self) -> list[int]:
        """Ranks of the present generation, ascending: servers, then workers."""
        return self.watch.members

    @property
    def workers(self) -> list[int]:
        """Ranks of those members that have a replica, ascending."""
        return self.members[self.servers :]

    def form(self, calls: int, elements_sent: Counter[str]) -> tuple[Collectives, int]:
        """Make the group of the present generation, when all its members have come.

        Args:
            calls: how many calls this process has ended.
            elements_sent: where elements sent to others are counted, by phase.

        Returns:
            The collectives, and how many calls all servers have ended. `MembersLost` where somebody does not come.
        """
        watch = self.watch
        _abandon(self._groups, watch.timeout)
        self._groups = []
        watch.phase = _FORMING
        try:
            ended = watch.in_time(lambda: self._arrive(calls))
            group = self._connect(range(len(self.members)))
        finally:
            watch.phase = ""
        return Collectives(group, watch.timeout, elements_sent, watch, self._connect, going_on=True), ended

    def advance(self) -> None:
        """Go on to the next generation, without those that the verdict on the present one names.

        Raises:
            TopologyError: if this process or a server is among them, or no worker is left.
        """
        watch = self.watch
        verdict = watch.in_time(watch.proposed)
        if watch.rank in verdict.missing:
            raise TopologyError(
                f"rank {watch.rank} was not heard of in time and has been dropped: rejoin with a new process"
            )
        lost = [rank for rank in verdict.missing if rank < self.servers]
        if lost:
            names = ", ".join(map(verdict.name, lost))
            raise TopologyError(
                f"{verdict.phase}: server {names} is lost, and its columns with it: resume from a checkpoint"
            )
        members = sorted({*watch.members, *verdict.joined} - {*verdict.missing})
        if len(members) == self.servers:
            raise TopologyError(f"{verdict.phase}: no worker is left, missing: rank {verdict.names}")
        self._log(verdict, len(members) - self.servers)
        watch.members = members
        watch.generation += 1
        self.next_newcomer = max([self.next_newcomer, *(rank + 1 for rank in verdict.joined)])
        admitted = {
            "members": members,
            "generation": watch.generation,
            "steps": verdict.steps,
            "next_newcomer": self.next_newcomer,
        }
        for rank in verdict.joined:
            self._store.set(f"admitted/{rank}", json.dumps(admitted))

    def admit(self, until: int, steps: int) -> None:
        """Propose that newcomers come in now.

        Args:
            until: all that have lower ranks and are not in yet.
            steps: of training so far.
        """
        verdict = Verdict(joined=list(range(self.next_newcomer, until)), steps=steps)
        self.watch.in_time(lambda: self.watch.propose(verdict))

    def _log(self, verdict: Verdict, replicas: int) -> None:
        after = f"generation {self.watch.generation + 1} goes on with {replicas} replica{'s' * (replicas > 1)}"
        if replicas == 1:
            after += ", which has no curvature: steps are those of SGD"
        for rank in verdict.missing:
            logger.warning("rank %s is lost, noticed in %s: %s", verdict.name(rank), verdict.phase, after)
        for rank in verdict.joined:
            logger.info("rank %d joins: %s", rank, after)
        if not verdict.missing and not verdict.joined:
            logger.warning("%s failed though all ranks are there: %s", verdict.phase, after)

    def _arrive(self, calls: int) -> int:
        """Say that this process is there, and wait for all others; how many calls all servers have ended."""
        watch, store = self.watch, self._store
        prefix = f"arrived/{watch.generation}"
        store.set(f"{prefix}/{watch.rank}", str(calls))
        begun = time.monotonic()
        look = begun + watch.grace
        while not store.check([f"{prefix}/{rank}" for rank in watch.members]):
            now = time.monotonic()
            if watch.alarmed >= watch.generation or now > begun + watch.timeout:
                self._fail(timed_out=now > begun + watch.timeout)
            # Who dies now breaks no connection. One looks after all.
            if now > look and watch.rank == watch.members[0]:
                if len(watch.roll_call()) < len(watch.members):
                    self._fail(timed_out=False)
                look = time.monotonic() + watch.grace
            time.sleep(_PAUSE)
        return min(int(store.get(f"{prefix}/{rank}")) for rank in watch.members[: self.servers])

    def _connect(self, positions: Sequence[int]) -> dist.ProcessGroupGloo:
        """A group of some members, called by these alone."""
        watch = self.watch
        name = f"group/{watch.generation}/{len(positions)}"
        position = positions.index(watch.members.index(watch.rank))
        limit = timedelta(seconds=watch.timeout)
        try:
            group = dist.ProcessGroupGloo(PrefixStore(name, self._store), position, len(positions), limit)
        except RuntimeError:
            watch.in_time(lambda: self._fail(timed_out=True))
            raise
        self._groups.append(group)
        return group

    def _fail(self, *, timed_out: bool) -> None:
        self.watch.verdict(_FORMING, timed_out=timed_out)
        raise MembersLost(f"{_FORMING}: not all have come")


def _root(store: Store) -> Store:
    """Where founders and newcomers meet, whatever `torch.distributed` or a launcher has put before the keys."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore("replica-newton", store)


def _abandon(groups: list[Group], timeout: float) -> None:
    """Hold broken groups until their collectives have run out of time: to let go of one before would wait for them."""

    def hold(held: list[Group]) -> None:
        time.sleep(2.0 * timeout)
        held.clear()

    if groups:
        threading.Thread(target=hold, args=(groups,), name="replica-newton-groups", daemon=True).start()
