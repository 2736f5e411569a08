"""Checkpoints of torch.distributed.checkpoint: every process finds its own columns again."""

from pathlib import Path

import cases_checkpoints as cases
import pytest
import torch
from processes import run_processes

from replica_newton import Simulated


def stage(
    folder: Path, name: str, count: int, steps: range, *, load: bool, partial_load: bool = False, servers: int = 0
):
    (folder / name).mkdir()
    return run_processes(
        folder / name,
        count,
        cases.by_dcp,
        folder=folder / "checkpoint",
        steps=steps,
        load=load,
        partial_load=partial_load,
        servers=servers,
    )


@pytest.mark.parametrize(("count", "servers"), [(3, 0), (4, 2)], ids=["tree", "servers"])
def test_a_run_goes_on_at_the_same_bits(count: int, servers: int, tmp_path: Path) -> None:
    stage(tmp_path, "whole", count, range(8), load=False, servers=servers)
    whole = stage(tmp_path, "end of it", count, range(0), load=True, servers=servers)[-1]
    saved = stage(tmp_path, "half", count, range(5), load=False, servers=servers)
    resumed = stage(tmp_path, "other half", count, range(5, 8), load=True, servers=servers)
    for before, after in list(zip(saved, resumed, strict=True))[servers:]:
        assert before[0] == "optimizer.synchronise() must be called before its state and the model are saved"
        assert torch.equal(after[1], before[2])
        assert torch.equal(after[2], whole[2])
        assert after[3:] == (cases.RATE, 8)


def test_with_another_number_of_replicas_they_part_anew_if_asked_to(tmp_path: Path) -> None:
    saved = stage(tmp_path, "two", 2, range(4), load=False)[0]
    (said,) = set(stage(tmp_path, "refused", 3, range(4, 8), load=True)[:1])
    assert "Missing key in checkpoint state_dict: optimizer.TreeReduction with 3 replicas in 3 processes" in said
    resumed = stage(tmp_path, "three", 3, range(4, 8), load=True, partial_load=True)
    assert all(torch.equal(one[1], saved[2]) for one in resumed)
    assert all(torch.equal(one[2], resumed[0][2]) for one in resumed)
    assert resumed[0][3:] == (cases.RATE, 8)
    alone = cases.run(Simulated(3), None, range(8))["parameters"]
    assert 0.0 < float((resumed[0][2] - alone).norm()) < 0.2 * float(alone.norm())
