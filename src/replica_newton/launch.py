"""Starting the processes of a run and bringing them together, again and again where some are lost."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import IO

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from replica_newton.topology.processes import DEFAULT_TIMEOUT

LOOPBACK = "127.0.0.1"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_POLL = 0.05
_GRACE = 10.0
"""Seconds in which the others may end by themselves, after one process has failed."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that a launcher has started.

    Attributes:
        rank: 0 … processes − 1.
        processes: how many there are.
        local: whether all of them are on this machine.
        local_rank: among those on this machine.
    """

    rank: int
    processes: int
    local: bool
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Place | None":
        """The place that `torchrun` (or another launcher that sets the same variables) has given.

        Args:
            environment: with `RANK`, `WORLD_SIZE` and, by torchrun, `LOCAL_WORLD_SIZE` and `LOCAL_RANK`.

        Returns:
            The place; None outside a launcher.

        Raises:
            RuntimeError: if `RANK` is set and the rest does not fit.
        """
        if "RANK" not in environment:
            return None
        try:
            rank, processes = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_rank = int(environment.get("LOCAL_RANK", rank))
        except (KeyError, ValueError) as error:
            raise RuntimeError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}") from error
        if not 0 <= rank < processes:
            raise RuntimeError(f"RANK={rank} must be in 0 … WORLD_SIZE − 1 = {processes - 1}")
        return cls(rank, processes, environment.get("LOCAL_WORLD_SIZE") == str(processes), local_rank)


def init_processes(backend: str = "gloo", *, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the other processes: `torch.distributed.init_process_group` that also works after a restart.

    `torchrun --max-restarts` gives the processes of every attempt the same store, in which gloo then finds addresses of
    processes that are gone. Here rank 0 makes up a name for each meeting, by which all others prove to it that they are
    at the same one, and all keys have that name before them. It does not depend on counting restarts: nodes that
    restart because of another count differently.

    If all processes are on this machine, gloo listens on the loopback interface alone (unless `GLOO_SOCKET_IFNAME` says
    otherwise), and so does the store where rank 0 makes it: collectives have no authentication. Over several machines
    the store is at `MASTER_ADDR` and `MASTER_PORT`, which torchrun sets.

    Args:
        backend: of the collectives: "gloo", "nccl", ….
        timeout: seconds to wait for all processes, and for a collective that has no limit of its own.

    Raises:
        RuntimeError: if no launcher has set `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`.
        ValueError: if `timeout` is not positive.
        TimeoutError: if some processes do not come in time.
    """
    place = Place.from_environment()
    if place is None or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RuntimeError("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set: start the script by torchrun")
    if not 0.0 < timeout < float("inf"):
        raise ValueError(f"{timeout=} must be positive and finite, in seconds")
    if place.local:
        loopback = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", *loopback[:1])
    store = _store(place, timedelta(seconds=timeout))
    meeting = _meet(store, place, time.monotonic() + timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore(meeting, store),
        rank=place.rank,
        world_size=place.processes,
        timeout=timedelta(seconds=timeout),
    )


def _store(place: Place, timeout: timedelta) -> Store:
    """The launcher's store, or one at the address that the launcher names, made by rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get(_AGENT_STORE) == "True":
        return TCPStore(host, port, is_master=False, timeout=timeout)
    host = LOOPBACK if place.local else host
    if place.rank:
        return TCPStore(host, port, is_master=False, timeout=timeout)
    return _serve_store(host if place.local else "", port, timeout)


def _serve_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """A store that listens at one address, where torch's own listens at all; an empty host is all, port 0 any."""
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]
    return TCPStore(
        host or LOOPBACK,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _meet(store: Store, place: Place, until: float) -> str:
    """Name of a meeting at which all processes are now, and none of an earlier one."""
    announced, me = "replica-newton/meeting", uuid.uuid4().hex
    if place.rank == 0:
        meeting = f"replica-newton/{me}"
        store.set(announced, meeting)
        guests = [f"{meeting}/{rank}" for rank in range(1, place.processes)]
        while guests and not store.check(guests):
            if time.monotonic() > until:
                absent = [rank for rank, guest in enumerate(guests, start=1) if not store.check([guest])]
                raise TimeoutError(f"rank {', '.join(map(str, absent))} did not come to the meeting")
            time.sleep(_POLL)
        store.set(f"{meeting}/all", json.dumps([store.get(guest).decode() for guest in guests]))
        return meeting
    while time.monotonic() < until:
        if store.check([announced]):
            meeting = str(store.get(announced).decode())
            store.set(f"{meeting}/{place.rank}", me)
            # An earlier meeting is over, without this process, or will never be: look again what is announced.
            for _ in range(20):
                if store.check([f"{meeting}/all"]):
                    if json.loads(store.get(f"{meeting}/all"))[place.rank - 1] == me:
                        return meeting
                    break
                time.sleep(_POLL)
        time.sleep(_POLL)
    raise TimeoutError(f"rank {place.rank} found no meeting of all {place.processes} processes")


@dataclass(frozen=True)
class Ended:
    """How the processes of `run_together` ended.

    Attributes:
        rank: of the process that failed first; 0 if none did.
        status: its exit status, negative for the signal that killed it.
        errors: what it wrote to standard error.
    """

    rank: int
    status: int
    errors: str

    @property
    def message(self) -> str:
        """What it wrote to standard error, or else how it ended."""
        if self.errors or not self.status:
            return self.errors
        if self.status < 0:
            return f"process {self.rank} was killed by {signal.Signals(-self.status).name}"
        return f"process {self.rank} ended with status {self.status}"


def run_together(command: Sequence[str], processes: int, *, expendable: Collection[int] = ()) -> Ended:
    """Run a command in several processes of this machine, joined as by `torchrun --standalone`, without restarts.

    Standard output goes where this process's does. The first process that fails ends all, unless the others can do
    without it: they get ten seconds, then they are killed. SIGINT and SIGTERM are passed on.

    Args:
        command: the program and its arguments.
        processes: how many.
        expendable: ranks without which the others go on.

    Returns:
        How they ended, when all have.
    """
    # Kept as long as the processes run: they meet in it.
    store = _serve_store(LOOPBACK, 0, timedelta(seconds=DEFAULT_TIMEOUT))
    common = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        _AGENT_STORE: "True",
    }
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        children: list[subprocess.Popen[bytes]] = []
        stack.enter_context(_signals_passed_on(children))
        stack.callback(_kill, children)
        for rank in range(processes):
            place = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(
                # In a session of its own, or Ctrl-C would reach it twice.
                subprocess.Popen(command, stderr=errors[rank], env=os.environ | place, start_new_session=True)  # noqa: S603
            )
        first = _wait(children, expendable)
        codes = [child.returncode for child in children]
        if not any(code for rank, code in enumerate(codes) if rank not in expendable):
            if not expendable or 0 in [codes[rank] for rank in expendable]:
                return Ended(0, 0, "")
            # All left. Those that were told to, after one was killed, say more than that one does.
            first = max(expendable, key=codes.__getitem__)
        # Processes that leave together, told to, are the same failure: one of them says so.
        same = [first, *(r for r, child in enumerate(children) if child.returncode == children[first].returncode)]
        said = [text for rank in same if (text := _content(errors[rank]))]
        return Ended(first, children[first].returncode, said[0] if said else "")


def _wait(children: Sequence["subprocess.Popen[bytes]"], expendable: Collection[int]) -> int:
    """Rank of the first that failed, 0 if none did; all have then ended."""
    failed: int | None = None
    until = float("inf")
    while True:
        codes = [child.poll() for child in children]
        failures = [rank for rank, code in enumerate(codes) if code]
        if failed is None and failures:
            failed = failures[0]
        if until == float("inf") and any(rank not in expendable for rank in failures):
            until = time.monotonic() + _GRACE
        if None not in codes or time.monotonic() > until:
            _kill(children)
            return failed or 0
        time.sleep(_POLL)


def _kill(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    for child in children:
        child.kill()
        child.wait()


@contextmanager
def _signals_passed_on(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()
