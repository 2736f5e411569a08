"""Starting processes, and joining them: what is said if they fail, signals, refusals, and meetings that went wrong."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from replica_newton import GracefulExit, ReplicaNewton, Simulated, init_processes
from replica_newton.launch import Place, _meet, _serve_store, run_together


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def test_processes_know_their_places(capfd) -> None:
    ended = run_together(python("print(rank, *map(os.environ.get, ['WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR']))"), 3)
    assert (ended.status, ended.message) == (0, "")
    assert sorted(capfd.readouterr().out.splitlines()) == [f"{rank} 3 {rank} 127.0.0.1" for rank in range(3)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit('cannot go on' if rank == 1 else time.sleep(0.5))", (1, 1, "cannot go on")),
        ("sys.exit(5 if rank == 2 else 0)", (2, 5, "process 2 ended with status 5")),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else 0", (0, -9, "process 0 was killed by SIGKILL")),
    ],
)
def test_the_first_that_fails_says_why(code: str, expected: tuple[int, int, str]) -> None:
    ended = run_together(python(code), 3)
    assert (ended.rank, ended.status, ended.message) == expected


def test_of_processes_that_leave_together_one_says_why() -> None:
    """Whichever is the first that is seen to leave, it is rank 1 that has something to say."""
    ended = run_together(python("rank != 1 or sys.stderr.write('told to'); sys.exit(143)"), 3)
    assert (ended.status, ended.message) == (143, "told to")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("rank != 2 or os.kill(os.getpid(), signal.SIGKILL); time.sleep(0.5)", (0, 0, "")),
        # One after the other: of two that fail at once either is the first.
        ("time.sleep([4, 0, 2][rank]); sys.exit('no data' if rank else 'no worker is left')", (1, 1, "no data")),
        ("sys.exit('the server' if rank == 0 else time.sleep(600))", (0, 1, "the server")),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(143 * (rank == 2))",
            (2, 143, "process 2 ended with status 143"),
        ),
    ],
    ids=["one of them", "all of them", "another", "told to"],
)
def test_others_go_on_without_those_that_are_expendable(code: str, expected: tuple, monkeypatch) -> None:
    monkeypatch.setattr("replica_newton.launch._GRACE", 1.0)
    ended = run_together(python(code), 3, expendable=(1, 2))
    assert (ended.rank, ended.status, ended.message) == expected


def test_those_that_hang_when_one_has_failed_are_killed(monkeypatch) -> None:
    monkeypatch.setattr("replica_newton.launch._GRACE", 0.3)
    begun = time.monotonic()
    assert run_together(python("sys.exit('gone') if rank == 1 else time.sleep(600)"), 2).message == "gone"
    assert time.monotonic() - begun < 60.0


def test_signals_are_passed_on() -> None:
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); os.kill(os.getppid(), signal.SIGTERM) "
        "if rank == 1 else None; time.sleep(600)"
    )
    # Rank 1 starts last, or the others might not listen yet.
    assert run_together(python(f"time.sleep(rank); {code}"), 2).status == 7


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set: start the script by torchrun"),
        ({"RANK": "0"}, "RANK, WORLD_SIZE and LOCAL_RANK must be integers"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"}, "RANK, WORLD_SIZE and LOCAL_RANK must be integers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be in 0 … WORLD_SIZE − 1 = 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT must be set"),
    ],
)
def test_without_a_launcher_processes_do_not_join(monkeypatch, environment, said) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=said):
        init_processes()


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf")])
def test_time_limit_is_positive(monkeypatch, timeout) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="must be positive and finite"):
        init_processes(timeout=timeout)


def meet(store: HashStore, ranks: list[int], count: int, seconds: float) -> dict[int, str | Exception]:
    """Names of the meetings that processes find, played by threads."""
    found: dict[int, str | Exception] = {}

    def join(rank: int) -> None:
        try:
            found[rank] = _meet(store, Place(rank, count, local=True), time.monotonic() + seconds)
        except TimeoutError as error:
            found[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_those_who_meet_are_of_one_attempt() -> None:
    store = HashStore()
    first = meet(store, [0, 1, 2], 3, 60.0)
    # The second attempt: its other processes come before rank 0, and find the meeting of the first.
    second: dict[int, str | Exception] = {}
    early = threading.Thread(target=lambda: second.update(meet(store, [1, 2], 3, 60.0)))
    early.start()
    time.sleep(0.3)
    second |= meet(store, [0], 3, 60.0)
    early.join()
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_those_who_wait_in_vain_say_for_whom() -> None:
    found = meet(HashStore(), [0, 2], 4, 1.0)
    assert str(found[0]) == "rank 1, 3 did not come to the meeting"
    assert str(found[2]) == "rank 2 found no meeting of all 4 processes"


def test_a_store_for_this_machine_listens_on_loopback_alone() -> None:
    store = _serve_store("127.0.0.1", 0, timedelta(seconds=10))
    lines = Path("/proc/self/net/tcp").read_text().splitlines()
    listening = [line.split() for line in lines if f":{store.port:04X} 0" in line]
    assert {fields[1].partition(":")[0] for fields in listening if fields[3] == "0A"} == {"0100007F"}


def test_without_a_signal_nothing_happens_and_with_one_the_block_ends_in_143() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with GracefulExit() as graceful:
        assert not graceful.agreed(
            ReplicaNewton([torch.ones(1, requires_grad=True)], rule="paper", topology=Simulated(4))
        )
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit) as caught:
        _told_to_leave()
    assert caught.value.code == 143
    with pytest.raises(KeyError):
        _told_to_leave(KeyError())
    assert signal.getsignal(signal.SIGTERM) is before


def _told_to_leave(error: Exception | None = None) -> None:
    with GracefulExit() as graceful:
        os.kill(os.getpid(), signal.SIGTERM)
        assert graceful.agreed(torch.optim.SGD([torch.ones(1)]))
        if error is not None:
            raise error


def test_the_package_runs_as_a_module() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "replica_newton", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip()
