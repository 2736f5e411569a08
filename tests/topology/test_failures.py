"""What the others say when a process fails and the run cannot go on: both topologies, all ways to fail."""

import re
from pathlib import Path

import cases_membership as cases
import pytest
from processes import run_processes

TREE = {"tree": True}
SERVER = {"servers": 1, "on_lost": "stop"}


def check_said(results: list[dict], lost: int) -> None:
    """That all others have said in time, and in whichever phase, that one process is missing and no other."""
    for rank, result in enumerate(results):
        if rank != lost:
            assert re.match(rf"[a-z ]+: failed after [\d.]+ s, missing: rank {lost} \(", result["said"]), result["said"]
            assert result["seconds"] < 60.0


@pytest.mark.parametrize("phase", ["before gradients", "before _start_columns", "after total", "before place"])
@pytest.mark.parametrize("topology", [TREE, SERVER], ids=["tree", "server"])
def test_a_killed_process_is_named(topology: dict, phase: str, tmp_path: Path) -> None:
    results = run_processes(
        tmp_path, 4, cases.lossy, lost=(2,), folder=tmp_path, failing={2: "killed"}, phase=phase, **topology
    )
    check_said(results, 2)


@pytest.mark.parametrize("how", ["hung", "stopped"])
@pytest.mark.parametrize("topology", [TREE, SERVER], ids=["tree", "server"])
def test_a_process_that_hangs_or_is_stopped_is_named_when_time_is_out(topology: dict, how: str, tmp_path: Path) -> None:
    results = run_processes(
        tmp_path, 4, cases.lossy, lost=(2,), folder=tmp_path, failing={2: how}, timeout=3.0, **topology
    )
    check_said(results, 2)
    assert all(results[rank]["seconds"] > 3.0 for rank in (0, 1, 3))


@pytest.mark.parametrize("topology", [TREE, SERVER], ids=["tree", "server"])
def test_a_process_that_still_computes_is_not_called_missing(topology: dict, tmp_path: Path) -> None:
    failing = {2: "killed", 3: "late"}
    results = run_processes(
        tmp_path, 4, cases.lossy, lost=(2,), folder=tmp_path, failing=failing, phase="before gradients", **topology
    )
    check_said(results, 2)


@pytest.mark.parametrize("topology", [TREE, SERVER, {"servers": 1}], ids=["tree", "server", "dropping"])
def test_a_late_process_is_waited_for(topology: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases.lossy, folder=tmp_path, failing={2: "late"}, **topology)
    assert [result.get("steps") for result in results] == [12] * 4
    assert not any("lost" in line for result in results for line in result["log"])


def test_a_tree_whose_store_is_gone_says_so(tmp_path: Path) -> None:
    results = run_processes(
        tmp_path, 3, cases.lossy, lost=(0,), tcp=True, folder=tmp_path, failing={0: "killed"}, tree=True
    )
    for rank in (1, 2):
        assert "and the process that keeps the store is gone (" in results[rank]["said"]
