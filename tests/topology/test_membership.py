from pathlib import Path

import cases_membership as cases
import pytest
import torch
from processes import run_processes

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
    "phase",
    ["before gradients", "before columns", "after columns", "before published", "after published", "before agree"],
)
def test_training_goes_on_without_a_worker_that_is_killed(phase: str, tmp_path: Path) -> None:
    lost = 3
    results = run_processes(
        tmp_path, 2 + WORKERS, cases.lossy, lost=(lost,), folder=tmp_path, servers=2, lost_rank=lost, phase=phase
    )
    left = [results[2], results[4]]
    check_survivors(left, 12)
    for result in left:
        assert result["replicas"][-1] == 2
        assert len([line for line in result["log"] if line.startswith("rank 3 is lost, noticed in ")]) == 1
