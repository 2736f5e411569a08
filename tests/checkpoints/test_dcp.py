"""Checkpoints of torch.distributed.checkpoint: every process finds its own columns again."""

from pathlib import Path

import cases_checkpoints
import cases_dcp
import pytest
import torch
from processes import run_processes

from replica_newton import Simulated


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize(("count", "servers"), [(3, 0), (4, 2)], ids=["tree", "servers"])
def test_a_run_goes_on_at_the_same_bits(count: int, servers: int, tmp_path: Path) -> None:
    results = run_processes(
        fresh(tmp_path, "run"), count, cases_dcp.saved_and_resumed, folder=tmp_path / "checkpoint", servers=servers
    )
    for whole, saved, resumed in results[servers:]:
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
