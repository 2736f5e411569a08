"""A monitor over real processes sees what the one over simulated replicas sees."""

import sys
from pathlib import Path
from typing import Any

import cases_monitor
import pytest
import torch
from processes import run_processes
from torch import nn
from torch.nn.functional import cross_entropy

from replica_newton import CurvatureMonitor, Simulated


def check_same(one: dict[str, Any], alone: dict[str, Any], *, rounding: float) -> None:
    close = {"rtol": rounding, "atol": rounding / 10}
    assert len(one["seen"]) == len(alone["seen"]) > 4
    for left, right in zip(one["seen"], alone["seen"], strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"gradient_noise_scale"}:
            torch.testing.assert_close(
                left[name], right[name], **close, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name in ("eigenvectors", "hvp", "inverse_hvp"):
        torch.testing.assert_close(one[name], alone[name], rtol=10 * rounding, atol=3 * rounding)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        (3, {"order": 3, "adam": True}),
        (3, {"order": 2}),
        (2, {"bucket_bytes": 100}),
        (2, {"step": 1e-3, "plain": True}),
        (2, {"step": 1e-3, "plain": True, "reuse": True}),
        (3, {"dtype": torch.bfloat16}),
    ],
    ids=["in-turns", "adam", "more-than-the-rank", "many-buckets", "differences", "reused", "bfloat16"],
)
def test_processes_see_what_simulated_replicas_see(count: int, options: dict, tmp_path: Path):
    results = run_processes(tmp_path, count, cases_monitor.watched_run, **options)
    alone = cases_monitor.watched_run(None, count, **(options | {"plain": False, "reuse": False}))
    for result in results:
        # bfloat16 is rounded at random, in every process by other numbers.
        check_same(result, alone, rounding=0.05 if "dtype" in options else 1e-3)
        assert torch.equal(result["eigenvectors"], results[0]["eigenvectors"])
        scales = [one["gradient_noise_scale"] for one in result["seen"]]
        if options.get("reuse"):  # the first is compared
            assert result["evaluations"] == [2] + [1] * (len(result["seen"]) - 1)
        if options.get("plain"):  # nobody knows how many samples a loss is of
            assert set(scales) == {None}
        else:
            assert scales == pytest.approx([one["gradient_noise_scale"] for one in alone["seen"]], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_keeps_its_columns_and_no_more(dtype: torch.dtype, tmp_path: Path):
    order, count = 4, 2
    result, _ = run_processes(tmp_path, count, cases_monitor.watched_run, order=order, dtype=dtype)
    size = order * -(-result["size"] // count) * dtype.itemsize
    assert {name: kept for name, kept in result["bytes"].items() if name in {"vectors", "responses"}} == {
        "vectors": size,
        "responses": size,
    }
    # All else is of the size of the order.
    assert max(kept for name, kept in result["bytes"].items() if name not in {"vectors", "responses"}) <= 8 * order**2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (2, {"relative_step": 1e-3, "reuse_gradient": True}), (2, {"dtype": torch.bfloat16})],
    ids=["exact", "reused", "bfloat16"],
)
def test_memory_is_that_of_the_pairs_and_for_a_moment_of_some_vectors(count: int, options: dict, tmp_path: Path):
    """Over P processes, with rank 4 and N parameters; documented in docs/curvature.md."""
    half = 0.5 if "dtype" in options else 1.0
    for result in run_processes(tmp_path, count, cases_monitor.memory, elements=1 << 22, order=4, **options):
        assert 0.0 <= result["kept"] - 2 * half * 4 / count <= 0.5, result
        # The next basis, in bfloat16 as it is made and as it is kept, and eight vectors.
        assert result["peak"] <= (1.0 if half == 1.0 else 1.5) * 4 / count + 8.0, result


def test_a_gradient_that_is_not_that_of_its_own_loss_in_one_process_is_an_error_in_all(tmp_path: Path):
    for said in run_processes(tmp_path, 2, cases_monitor.mean_gradient):
        assert said == ["reuse_gradient=True needs a .grad that is the gradient of this loss, got another", "seen"]


def test_a_loss_that_is_not_finite_in_one_process_is_an_error_in_all(tmp_path: Path):
    for said in run_processes(tmp_path, 2, cases_monitor.not_finite):
        assert said == ["seen", "gradient at step 1 is not finite: there is no curvature to see", "seen"]


def test_a_closure_of_another_topology_is_refused():
    module, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    monitor = CurvatureMonitor(module, every=1, topology=Simulated(2))
    with pytest.raises(ValueError, match=r"closure evaluates 3 replicas, the monitor's is Simulated\(2\)"):
        monitor.observe(Simulated(3).closure(module, cross_entropy, x, y))
    with pytest.raises(TypeError, match=r"Simulated\(2\) needs a closure of topology\.closure"):
        monitor.observe(lambda: cross_entropy(module(x), y))
    with pytest.raises(TypeError, match="topology must be Simulated or TreeReduction, got str"):
        CurvatureMonitor(module, topology="tree")
