"""Peak resident memory of training over processes."""

import sys
from pathlib import Path

import cases_buckets
import pytest
import torch
from processes import run_processes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [2, 4])
def test_state_is_below_two_floats_a_parameter(count: int, tmp_path: Path) -> None:
    elements = 1 << 24
    for result in run_processes(tmp_path, count, cases_buckets.memory, elements=elements):
        # Displacements and shared parameters, (M + 1)/M, and what the allocator keeps.
        assert 0.9 * (count + 1) / count <= result["state"] <= 2.0
        # Documented in docs/topologies.md: the same again with the last gradients and their mean, and what travels.
        assert result["between steps"] <= 5.0 + 3.0 / count + 0.2, result
        assert result["peak"] <= 7.0, result


def test_what_is_written_to_again_can_be_released_at_any_time_and_a_curvature_of_before_says_so(tmp_path: Path) -> None:
    results = []
    for at in (None, 3):
        (tmp_path / str(at)).mkdir()
        results.append(run_processes(tmp_path / str(at), 2, cases_buckets.released, at=at))
    for kept, freed in zip(*results, strict=True):
        assert torch.equal(kept["parameters"], freed["parameters"])
        assert kept["said"] == "the parameters and gradients of this curvature are those of a step that is over"
