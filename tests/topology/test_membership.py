from pathlib import Path

import cases_membership as cases
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from replica_newton import ParameterServer
from replica_newton.topology import TopologyError

WORKERS = 3


def check_survivors(results: list[dict], steps: int) -> None:
    """That the workers are equal bit for bit, ended, and learnt."""
    for result in results:
        assert "said" not in result, result
        assert result["steps"] == steps
        assert torch.equal(result["parameters"], results[0]["parameters"])
        for ours, first in zip(result["buffers"], results[0]["buffers"], strict=True):
            assert torch.equal(ours, first)
    losses = results[0]["losses"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("rule", "phase"),
    [
        ("paper", "before gradients"),
        ("paper", "before _start_columns"),
        ("paper", "after gradients"),
        ("paper", "before place"),
        ("paper", "after place"),
        ("paper", "before agree"),
        ("metric", "after gradients"),
        ("metric", "before all_prepared"),
        ("metric", "after all_prepared"),
    ],
)
def test_training_goes_on_without_a_worker_that_is_killed(rule: str, phase: str, tmp_path: Path) -> None:
    options = {"folder": tmp_path, "servers": 2, "failing": {3: "killed"}, "phase": phase, "rule": rule}
    results = run_processes(tmp_path, 2 + WORKERS, cases.lossy, lost=(3,), **options)
    left = [results[2], results[4]]
    check_survivors(left, 12)
    for result in left:
        assert result["replicas"][-1] == 2
        assert len([line for line in result["log"] if line.startswith("rank 3 is lost, noticed in ")]) == 1


@pytest.mark.parametrize("rule", ["paper", "metric"])
def test_a_fresh_process_takes_the_place_of_one_that_is_lost(rule: str, tmp_path: Path) -> None:
    results = run_processes(
        tmp_path,
        5,
        cases.lossy,
        lost=(4,),
        newcomers=1,
        tcp=True,
        folder=tmp_path,
        servers=2,
        failing={4: "killed"},
        newcomer=True,
        rule=rule,
        phase="before gradients",
    )
    left = [results[2], results[3], results[5]]
    check_survivors(left, left[0]["steps"])
    assert left[2]["rank"] == 5
    for result in left:
        assert result["replicas"][-6:] == [3] * 6
        assert result["losses"][-6:] == left[0]["losses"][-6:]
    for result in left[:2]:
        assert result["replicas"][0] == 3
        assert 2 in result["replicas"]
        assert [line for line in result["log"] if line.startswith("rank 5 joins: ")]


def test_a_worker_that_is_stopped_is_dropped_when_time_is_out_and_told_to_rejoin(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases.lossy, folder=tmp_path, failing={2: "stopped"}, timeout=3.0, wakes=1)
    check_survivors([results[1], results[3]], 12)
    assert results[2]["said"] == "rank 2 was not heard of in time and has been dropped: rejoin with a new process"


@pytest.mark.parametrize(("how", "timeout"), [("hung", 3.0), ("error", 20.0)])
def test_a_worker_that_hangs_or_leaves_is_dropped(how: str, timeout: float, tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases.lossy, lost=(1,), folder=tmp_path, failing={1: how}, timeout=timeout)
    check_survivors([results[2], results[3]], 12)


def test_the_last_worker_goes_on_as_sgd(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases.lossy, lost=(1, 2), folder=tmp_path, failing={1: "killed", 2: "killed"})
    check_survivors([results[3]], 12)
    assert "which has no curvature: steps are those of SGD" in " ".join(results[3]["log"])


def test_without_workers_the_run_ends(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 2, cases.lossy, lost=(1,), folder=tmp_path, failing={1: "killed"})
    assert "no worker is left, missing: rank 1" in results[0]["said"]


def test_a_newcomer_that_dies_on_the_way_in_is_not_waited_for(tmp_path: Path) -> None:
    results = run_processes(
        tmp_path,
        3,
        cases.lossy,
        lost=(3,),
        newcomers=1,
        tcp=True,
        folder=tmp_path,
        expected=True,
        failing={3: "killed"},
    )
    check_survivors(results[1:3], 12)
    lost = [line for line in results[1]["log"] if line.startswith("rank 3 ")]
    assert [line.partition(":")[0] for line in lost] == ["rank 3 joins", "rank 3 is lost, noticed in forming a group"]


def test_where_there_is_no_run_nobody_can_join() -> None:
    with pytest.raises(TopologyError, match=r"no run has let this process in within 0\.3 s"):
        ParameterServer.join(dist.HashStore(), timeout=0.3)


def test_without_a_server_the_run_ends_for_all(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases.lossy, lost=(1,), folder=tmp_path, servers=2, failing={1: "killed"})
    for rank in (0, 2, 3):
        assert "server 1 is lost, and its columns with it: resume from a checkpoint" in results[rank]["said"]


# By rank (two servers, two workers), where, and after how many calls: the sixth synchronises, the seventh is a sum, as
# are the thirteenth and the fourteenth, the eleventh is a step that is not finite, the twentieth a sum, the
# twenty-second a checkpoint. Some leave one server ahead of the other, some leave a worker that has ended a step beside
# one that has not.
GLITCHES = [
    (0, "after agree", 0),
    (3, "after place", 1),
    (2, "before total", 2),
    (1, "before prepared", 3),
    (0, "before prepared", 4),
    (1, "before said_by_server", 4),
    (2, "before place", 7),
    (1, "before place", 8),
    (2, "before end_together", 10),
    (1, "before whole", 12),
    (3, "after gradients", 14),
    (2, "before total", 19),
    (3, "after total", 19),
    (1, "before total", 21),
    (0, "before end_together", 21),
]
# The same with an average between synchronising and the sum. A server that is interrupted in `all_prepared` cannot know
# whether the other has come further.
METRIC_GLITCHES = [
    (0, "after agree", 0),
    (3, "after all_prepared", 1),
    (2, "before total", 2),
    (1, "before prepared", 3),
    (0, "before prepared", 4),
    (1, "before said_by_server", 4),
    (0, "before dealing", 6),
    (2, "before total", 7),
    (1, "before all_prepared", 8),
    (1, "after all_prepared", 9),
    (3, "before all_prepared", 10),
    (2, "before end_together", 11),
    (3, "after gradients", 16),
    (2, "before total", 21),
    (1, "before total", 23),
    (0, "before end_together", 23),
]


@pytest.mark.parametrize(("rule", "glitches"), [("paper", GLITCHES), ("metric", METRIC_GLITCHES)])
def test_calls_that_are_interrupted_end_as_if_they_were_not(
    rule: str, glitches: list[tuple[int, str, int]], tmp_path: Path
) -> None:
    runs = []
    for name, failing in (("smooth", []), ("interrupted", glitches)):
        (tmp_path / name).mkdir()
        options = {"folder": tmp_path / name / "checkpoints", "servers": 2, "glitches": failing, "rule": rule}
        runs.append(run_processes(tmp_path / name, 4, cases.interrupted, **options))
    smooth, interrupted = runs
    assert smooth[2]["together"][-1].tolist() == [2.0, 1.0]
    for name, complete in (("smooth", 1), ("interrupted", 2)):
        # A checkpoint that was complete and not known to be is made again.
        assert len(list((tmp_path / name / "checkpoints").glob("*/manifest.json"))) == complete
    for ours, theirs in zip(interrupted, smooth, strict=True):
        assert len([line for line in ours["log"] if "failed though all ranks are there" in line]) == len(glitches)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.0, abs=0.0, nan_ok=True)
        assert ours["counts"] == theirs["counts"]
    assert smooth[2]["counts"][0] == 1
    for ours, theirs in zip(interrupted[2:], smooth[2:], strict=True):
        assert torch.equal(ours["parameters"], theirs["parameters"])
        for one, other in zip(ours["together"] + ours["buffers"], theirs["together"] + theirs["buffers"], strict=True):
            assert torch.equal(one, other)
