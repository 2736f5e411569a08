"""Checkpoints over real processes: the same bits by the same ones, the same course by others, damage, a full disk."""

from pathlib import Path

import cases_checkpoints as cases
import pytest
import torch
from processes import run_processes

from replica_newton import Simulated


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


METRIC = {"rule": "metric", "lr": 1.0}


@pytest.mark.parametrize(
    ("count", "servers", "half", "options"),
    [(3, 0, 5, {}), (4, 2, 5, {}), (2, 0, 5, METRIC), (5, 3, 5, METRIC), (2, 0, 28, METRIC | {"probes": {"every": 3}})],
    ids=["tree", "servers", "metric", "metric-servers", "probes"],
)
def test_a_run_goes_on_at_the_same_bits_and_saving_changes_none(
    count: int, servers: int, half: int, options: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    results = run_processes(
        fresh(tmp_path, "run"), count, cases.saved_and_resumed, folder=folder, servers=servers, half=half, **options
    )
    for rank, (whole, saved, resumed) in enumerate(results):
        assert resumed["found"].step == half
        assert resumed["found"].parted
        if rank < servers:
            assert resumed["found"].extra == "server"
            continue
        assert resumed["found"].extra == {"replica": rank - servers, "next": half}
        assert torch.equal(resumed["loaded"], saved["saved"])
        assert whole["losses"][:half] + resumed["losses"] == whole["losses"] == saved["losses"]
        for end in (saved, resumed):
            assert torch.equal(end["parameters"], whole["parameters"])
            assert all(torch.equal(a, b) for a, b in zip(end["buffers"], whole["buffers"], strict=True))


def test_eight_then_four_then_eight_replicas_train_on_without_a_jump(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    stages, length = [(8, 0), (4, 1), (8, 0)], 6
    losses, saved = [], None
    for number, (replicas, servers) in enumerate(stages):
        end = (number + 1) * length
        results = run_processes(
            fresh(tmp_path, str(number)),
            replicas + servers,
            cases.part_of_a_run,
            servers=servers,
            folder=checkpoints,
            steps=range(number * length, end),
            save_at=end,
            load=number > 0,
            seed=number,
            limit=280.0,
        )
        worker = results[-1]
        if number:
            assert worker["found"].step == number * length
            assert not worker["found"].parted
            assert worker["found"].extra == {"replica": 0, "next": number * length}
            assert all(torch.equal(result["loaded"], saved) for result in results)
        saved = worker["saved"]
        losses += worker["losses"]
    whole = torch.tensor(cases.run(Simulated(8), None, range(len(stages) * length))["losses"])
    spread = (whole[1:] - whole[:-1]).abs()
    for start in (length, 2 * length):
        # On the same batches: what resuming adds is less than what the next batch adds, at the worst and in the median.
        added = (torch.tensor(losses) - whole)[start : start + length].abs()
        assert float(added.max()) < float(spread.max())
        assert float(added[0]) < float(spread.median())
    assert losses[-1] < 0.95 * losses[0]


def test_a_damaged_checkpoint_is_passed_over_by_all_processes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for first, second, said in run_processes(fresh(tmp_path, "run"), 3, cases.damaged, folder=folder):
        assert (first, second) == (2, 1)
        assert said.startswith(f"{folder}: no whole checkpoint, checkpoint-000002 is damaged (process-")


def test_a_full_disk_in_one_process_is_an_error_in_all_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    results = run_processes(fresh(tmp_path, "run"), 2, cases.disk_full, folder=tmp_path / "checkpoints")
    assert [result[0] for result in results] == ["saving failed in process 1", "[Errno 28] No space left on device"]
    assert all(result[1:] == (2, ["checkpoint-000001"]) for result in results)


def test_what_the_metric_keeps_goes_on_by_other_processes(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    # Not the Kronecker metric, whose bases of directions without a gradient are made of rounding.
    options = METRIC | {"metric": "diagonal", "folder": checkpoints}
    run_processes(fresh(tmp_path, "3"), 3, cases.part_of_a_run, steps=range(5), save_at=5, **options)
    resumed = options | {"steps": range(5, 10), "load": True, "seed": 1}
    ends = run_processes(fresh(tmp_path, "2"), 2, cases.part_of_a_run, **resumed)
    ends += run_processes(fresh(tmp_path, "servers"), 4, cases.part_of_a_run, servers=2, **resumed)[2:]
    whole = cases.run(Simulated(1), **(options | {"steps": range(10)}))
    for end in (*ends, cases.run(Simulated(1), **resumed)):
        torch.testing.assert_close(end["parameters"], whole["parameters"], rtol=1e-9, atol=1e-9)


def test_probes_begin_anew_by_other_processes(tmp_path: Path) -> None:
    options = METRIC | {"folder": tmp_path / "checkpoints", "probes": {"every": 2}}
    run_processes(fresh(tmp_path, "3"), 3, cases.part_of_a_run, steps=range(26), save_at=26, **options)
    resumed = options | {"steps": range(26, 36), "load": True, "seed": 1}
    ends = run_processes(fresh(tmp_path, "2"), 2, cases.part_of_a_run, **resumed)
    for end in (*ends, cases.run(Simulated(1), **resumed)):
        assert end["found"].step == 26
        assert bool(end["parameters"].isfinite().all())
