"""Modules in DistributedDataParallel, meshes of devices, and replicas that are sharded."""

from pathlib import Path
from typing import Any

import cases_buckets
import pytest
import torch
from processes import run_processes


def test_a_wrapped_module_trains_as_the_module_does(tmp_path: Path) -> None:
    for (plain, closure, no_sync, averaged), said in run_processes(tmp_path, 2, cases_buckets.wrapped):
        assert torch.equal(closure, plain)
        assert torch.equal(no_sync, plain)
        assert said.startswith("a gradient has changed after it was sent")
        assert "those of a module in DistributedDataParallel in `with module.no_sync():`" in said
        assert not torch.equal(averaged, plain)


def test_meshes_say_where_the_replicas_are(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases_buckets.meshes)
    for rank, result in enumerate(results):
        assert result["line"] == (4, 1, rank, 10.0)
        assert result["plane"] == (2, 2, rank % 2, 10.0)
        both, unnamed, spread, probes, whole = result["said"]
        assert spread.startswith("spread must be LocalStep() for sharded replicas, got RandomDirections(")
        assert probes.startswith("spread=PairedProbes() needs one process or a TreeReduction of whole replicas, got ")
        assert whole == "rule='metric' needs every parameter sharded along its first dimension"
        assert both == "give process_group or device_mesh, not both"
        assert unnamed.startswith('device_mesh must have one dimension, or two of which one is named "replicate", got ')


@pytest.mark.parametrize(
    "options", [{}, {"secant_data": "common", "rule": "saddle-free", "damping": 1.0, "max_norm": 0.2}]
)
def test_sharded_replicas_train_as_whole_ones_do(options: dict[str, Any], tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases_buckets.train_sharded, **options)
    alone = cases_buckets.train_sharded(None, 4, **options)
    assert len({result["local"] for result in results}) == 2, "shards are not of the same size"
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        torch.testing.assert_close(result["parameters"], alone["parameters"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result["eigenvalues"], alone["eigenvalues"], rtol=1e-6, atol=1e-8)


def test_parameters_in_bf16_have_a_state_in_fp32(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases_buckets.train_sharded, dtype=torch.bfloat16, steps=4)
    alone = cases_buckets.train_sharded(None, 4, dtype=torch.float32, steps=4)
    for result in results:
        assert result["state"] == {torch.float32}
        assert result["parameters"].dtype == torch.bfloat16
        assert result["losses"] == pytest.approx(alone["losses"], rel=2e-2)
        assert torch.equal(result["parameters"], results[0]["parameters"])
