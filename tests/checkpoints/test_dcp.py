"""Checkpoints of torch.distributed.checkpoint: every process finds its own columns again."""

from pathlib import Path
from typing import Any

import cases_checkpoints
import cases_dcp
import pytest
import torch
from processes import run_processes

from replica_newton import Simulated


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (3, {}),
        (4, {"servers": 2}),
        (4, {"shards": 2}),
        (3, {"rule": "metric"}),
        (5, {"rule": "metric", "servers": 3}),
        (4, {"rule": "metric", "shards": 2}),
    ],
    ids=["tree", "servers", "shards", "metric", "metric-servers", "metric-shards"],
)
def test_a_run_goes_on_at_the_same_bits(count: int, options: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    results = run_processes(fresh(tmp_path, "run"), count, cases_dcp.saved_and_resumed, folder=folder, **options)
    for whole, saved, resumed in results[options.get("servers", 0) :]:
        if "shards" in options:
            assert saved.refused.startswith("sharded replicas are saved by torch.distributed.checkpoint, with Replica")
        elif "rule" not in options:
            assert saved.refused == "optimizer.synchronise() must be called before its state and the model are saved"
        assert torch.equal(resumed.loaded, saved.end)
        assert torch.equal(resumed.end, whole.end)
        assert (resumed.rate, resumed.step) == (cases_checkpoints.RATE, 8)


def test_with_another_number_of_replicas_they_part_anew_if_asked_to(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    saved = run_processes(fresh(tmp_path, "two"), 2, cases_dcp.one_stage, folder=folder, steps=range(4), load=False)[0]
    results = run_processes(fresh(tmp_path, "three"), 3, cases_dcp.of_another_number, folder=folder, steps=range(4, 8))
    for said, resumed in results:
        assert "Missing key in checkpoint state_dict: optimizer.TreeReduction with 3 replicas in 3 processes" in said
        assert torch.equal(resumed.loaded, saved.end)
        assert torch.equal(resumed.end, results[0][1].end)
        assert (resumed.rate, resumed.step) == (cases_checkpoints.RATE, 8)
    alone = cases_checkpoints.run(Simulated(3), None, range(8))["parameters"]
    assert 0.0 < float((results[0][1].end - alone).norm()) < 0.2 * float(alone.norm())


def test_the_metric_goes_on_with_any_other_processes(tmp_path: Path) -> None:
    # Not the Kronecker metric, whose bases of directions without a gradient are made of rounding.
    options = {"rule": "metric", "metric": "diagonal", "scaled": False, "folder": tmp_path / "checkpoint"}
    before, after = {"steps": range(4), "load": False}, {"steps": range(4, 8), "load": True}
    saved = run_processes(fresh(tmp_path, "shards"), 4, cases_dcp.one_stage, shards=2, **options, **before)[0]
    ends = run_processes(fresh(tmp_path, "tree"), 3, cases_dcp.one_stage, **options, **after)
    run_processes(fresh(tmp_path, "again"), 3, cases_dcp.one_stage, **options, **before)
    ends += run_processes(fresh(tmp_path, "4"), 4, cases_dcp.one_stage, shards=2, **options, **after)
    whole = run_processes(fresh(tmp_path, "whole"), 2, cases_dcp.one_stage, **options, **(before | {"steps": range(8)}))
    for resumed in ends:
        torch.testing.assert_close(resumed.loaded, saved.end, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(resumed.end, whole[0].end, rtol=1e-9, atol=1e-9)
        assert resumed.rate == cases_checkpoints.RATE
