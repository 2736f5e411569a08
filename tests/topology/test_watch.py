"""Who is missing, by watches of several ranks in one process."""

import subprocess
import sys
import time
from pathlib import Path

import cases_membership as cases
import pytest
import torch.distributed as dist
from processes import run_processes

from replica_newton.topology import TopologyError
from replica_newton.topology.watch import Verdict, Watch


def watches(*phases: str, absent: int = 0, timeout: float = 4.0) -> list[Watch]:
    """Watches of the first ranks, in the collectives given; the last ranks have none."""
    store = dist.HashStore()
    made = [Watch(store, rank, range(len(phases) + absent), timeout) for rank in range(len(phases))]
    for watch, phase in zip(made, phases, strict=True):
        watch.phase = phase
    return made


@pytest.mark.parametrize("timed_out", [False, True])
def test_who_does_not_answer_is_missing_and_no_other(timed_out: bool) -> None:
    first, *_ = watches("points", "", absent=2)
    assert first.verdict("points", timed_out=timed_out) == Verdict(missing=[2, 3], phase="points")


def test_who_answers_but_keeps_all_others_waiting_is_missing_when_time_is_out() -> None:
    first, *_ = watches("points", "buffers", "")
    assert first.verdict("points", timed_out=True).missing == [2]


def test_who_still_computes_is_not_missing_before() -> None:
    first, *_ = watches("points", "points", "")
    assert first.verdict("points", timed_out=False).missing == []


def test_nobody_waits_for_answers_that_are_all_there() -> None:
    first, *_ = watches("points", "points", timeout=50.0)
    begun = time.monotonic()
    first.roll_call()
    assert time.monotonic() - begun < 0.9 * first.grace


def test_the_first_verdict_holds_for_all() -> None:
    first, second = watches("points", "gradients")
    second.propose(Verdict(missing=[7], phase="gradients"))
    assert first.verdict("points", timed_out=False) == second.proposed() == Verdict(missing=[7], phase="gradients")


def test_a_loss_that_one_notices_reaches_those_that_wait() -> None:
    first, second, third = watches("points", "points", "")
    first.roll_call(0)
    assert (second.alarmed, third.alarmed) == (0, 0)
    first.roll_call()
    assert second.alarmed == 0, "a mere roll call alarms nobody"


def test_a_store_that_does_not_answer_is_no_reason_to_wait_for_ever() -> None:
    (watch,) = watches("points", timeout=0.1)
    watch.grace = 0.1
    with pytest.raises(TopologyError, match="the process that keeps the store is gone"):
        watch.in_time(lambda: time.sleep(30.0))


def test_newcomers_are_seen() -> None:
    store = dist.HashStore()
    watch = Watch(store, 0, [0], 4.0, next_newcomer=3)
    store.set("candidate/3", "")
    store.set("candidate/4", "")
    watch.look(store)
    assert watch.next_newcomer == 5


@pytest.mark.parametrize("options", [{"tree": True}, {"servers": 1}], ids=["tree", "server"])
def test_training_does_not_look_into_the_store(options: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, 3, cases.lossy, folder=tmp_path, cut_off=True, **options)
    assert [result["steps"] for result in results] == [12] * 3


def test_the_interpreter_does_not_end_before_the_thread_has_left_the_store() -> None:
    """A thread that is in C++ then would end the process by SIGABRT, whatever it had achieved."""
    code = """
import time
import torch.distributed as dist
from replica_newton.topology.watch import Watch

def look(watch, store):
    time.sleep(0.5)
    print("left", flush=True)

Watch.look = look
watch = Watch(dist.HashStore(), 0, [0], 4.0)
time.sleep(0.3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "left\n"
