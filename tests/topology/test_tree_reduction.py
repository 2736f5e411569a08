import math
from pathlib import Path

import cases
import pytest
import torch
from processes import run_processes

from replica_newton import RandomDirections, TreeReduction

SIZE = cases.network(torch.float64).first.weight.numel() + 12 + 12 * cases.CLASSES + cases.CLASSES + 1 + 3


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"dtype": torch.float64, "plain_closure": True}),
        (4, {"dtype": torch.float64}),
        (
            4,
            {
                "dtype": torch.float64,
                "secant_data": "common",
                "rule": "saddle-free",
                "damping": 1.0,
                "weight_decay": 0.1,
            },
        ),
        (3, {"dtype": torch.float64, "normalised": True, "secant_data": "common"}),
        (3, {"dtype": torch.float64, "spread": RandomDirections(3), "secant_data": "common"}),
        (2, {"dtype": torch.float64, "spread": RandomDirections(radius=0.01)}),
        (4, {"dtype": torch.float32}),
        (8, {"dtype": torch.float64}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_processes_train_as_one_process_does(count: int, options: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, count, cases.train, steps=200, **options)
    options.pop("plain_closure", None)
    alone = cases.train(None, count, steps=200, **options)
    tolerance = 1e-10 if options["dtype"] == torch.float64 else 1e-5
    cases.check_parity(results, alone, tolerance)


def test_two_runs_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(run_processes(folder, 4, cases.train, steps=40, dtype=torch.float32))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one["parameters"], other["parameters"])
        assert one["losses"] == other["losses"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_sends_what_an_all_reduce_of_the_gradient_does(count: int, tmp_path: Path) -> None:
    all_reduce = 2 * SIZE * (count - 1) / count
    width = math.ceil(SIZE / count)
    for result in run_processes(tmp_path, count, cases.train, steps=30, mark=10, plain_closure=True):
        sent = result["sent_a_step"]
        assert sent["gradients"] == sent["points"] == (count - 1) * width
        # Padding aside, and the M×M sums, which do not grow with N.
        assert sent["gradients"] + sent["points"] <= all_reduce + 2 * count
        assert sent["inner products"] <= 12 * count**2
        assert result["state"] == (count + 1) * width, "columns of displacements and of shared parameters"


def test_a_run_goes_on_from_a_checkpoint_at_the_same_bits(tmp_path: Path) -> None:
    for whole, resumed in run_processes(tmp_path, 3, cases.resume, steps=6):
        assert torch.equal(whole, resumed)


def test_with_the_state_of_another_number_of_replicas_they_part_anew(tmp_path: Path) -> None:
    for loaded, fresh in run_processes(tmp_path, 2, cases.other_number):
        assert torch.equal(loaded, fresh)


def test_gradients_at_hand_are_averaged_over_processes(tmp_path: Path) -> None:
    for ours, sgd in run_processes(tmp_path, 3, cases.given_gradients):
        torch.testing.assert_close(ours, sgd, rtol=1e-12, atol=1e-12)


def test_a_loss_that_is_not_finite_stops_all_processes_and_changes_none(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 3, cases.not_finite)
    assert {result["said"] for result in results} == {"loss or gradient of replica 1 is not finite (loss nan)"}
    assert all(result["unchanged"] for result in results)
    assert all(torch.equal(result["parameters"], results[0]["parameters"]) for result in results)
    assert bool(torch.isfinite(results[0]["parameters"]).all())


@pytest.mark.parametrize("servers", [0, 1], ids=["tree", "server"])
def test_steps_that_are_not_finite_are_skipped_by_all_and_batch_norm_forgets_them(servers: int, tmp_path: Path) -> None:
    options = {"normalised": True, "poisoned": (0, 5, 6), "nonfinite": "skip", "steps": 20}
    results = run_processes(tmp_path, servers + 2, cases.train, servers=servers, **options)[servers:]
    alone = cases.train(None, 2, **options)
    cases.check_parity(results, alone, 1e-10)
    assert [result["skipped"] for result in (*results, alone)] == [3, 3, 3]
    assert all(bool(buffer.isfinite().all()) for buffer in alone["buffers"])


def test_without_a_process_group_there_is_no_tree() -> None:
    with pytest.raises(RuntimeError, match="must be initialised first"):
        TreeReduction()


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path) -> None:
    assert run_processes(tmp_path, 2, cases.refusals) == [cases.REFUSALS] * 2
