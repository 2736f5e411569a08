"""Peak resident memory of training over processes."""

import sys
from pathlib import Path

import cases_buckets
import pytest
from processes import run_processes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [2, 4])
def test_state_is_below_two_floats_a_parameter(count: int, tmp_path: Path) -> None:
    elements = 1 << 24
    for result in run_processes(tmp_path, count, cases_buckets.memory, elements=elements):
        # Displacements and shared parameters, (M + 1)/M, and what the allocator keeps.
        assert 0.9 * (count + 1) / count <= result["state"] <= 2.0
        # Documented in docs/topologies.md: buckets on their way, the columns of the gradients, the algebra's copy of
        # both, and the new displacements.
        assert result["peak"] <= 7.0, result
