"""Comparisons: what is planned, that only what is missing is trained, what is refused, and the summary on disk."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from replica_newton.training.comparison import RUNS, SUMMARY, Comparison, plan
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.run import CHECKPOINTS, RunConfig, RunError, load_run

SAMPLES, BATCH = 64, 32
STEPS = SAMPLES // BATCH
LISTS = ("train_nll", "test_accuracy", "gradient_evaluations", "seconds")


class _Counter:
    """Observer that keeps the labels of the runs that were trained and may interrupt at a step."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.labels: list[str] = []
        self.steps = 0

    def start_run(self, label: str, **_: int) -> None:
        self.labels.append(label)

    def step(self, **_: float | None) -> None:
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt

    def finish_epoch(self, **_: float) -> None:
        pass

    def finish_run(self) -> None:
        pass


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=SAMPLES)


def base(**settings: Any) -> RunConfig:
    return RunConfig("digits", "sgd", **{"epochs": 1, "batch_size": BATCH, "train_limit": SAMPLES, **settings})


def compared(
    folder: Path,
    dataset: Dataset,
    methods: tuple[str, ...] = ("sgd", "paper"),
    replicas: tuple[int, ...] = (2, 4),
    rates: tuple[float | None, ...] = (None,),
    seeds: tuple[int, ...] = (0,),
    **settings: Any,
) -> tuple[dict[str, Any], _Counter]:
    """Run a comparison as the command does."""
    planned = plan(base(**settings), methods, replicas, rates, seeds)
    counter = _Counter()
    comparison = Comparison.open(folder, base(**settings), dataset)
    comparison.run(planned, dataset, counter)
    return comparison.write_summary(), counter


def read_summary(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / SUMMARY).read_text(), parse_constant=refuse)


def names(planned: list[RunConfig]) -> list[tuple[str, int, float | None, int]]:
    return [(one.method, one.replicas, one.learning_rate, one.seed) for one in planned]


def test_methods_that_do_not_part_replicas_are_planned_once_with_one_replica():
    planned = plan(base(), ["sgd", "paper", "adam"], [1, 2, 4], [None], [0])
    assert names(planned) == [
        ("sgd", 1, 0.1, 0),
        ("paper", 1, 0.1, 0),
        ("paper", 2, 0.1, 0),
        ("paper", 4, 0.1, 0),
        ("adam", 1, 0.003, 0),
    ]


def test_seeds_are_outermost_and_every_rate_is_planned():
    planned = plan(base(), ["sgd", "paper"], [4], [0.1, 0.3], [5, 2])
    assert names(planned) == [
        (method, M, rate, seed) for seed in (5, 2) for method, M in (("sgd", 1), ("paper", 4)) for rate in (0.1, 0.3)
    ]


def test_plan_keeps_the_settings_that_runs_share():
    (one,) = plan(base(activation="tanh", epochs=7), ["momentum"], [2], [None], [3])
    expected = {"epochs": 7, "activation": "tanh", "batch_size": BATCH, "train_limit": SAMPLES, "dataset": "digits"}
    assert {name: getattr(one, name) for name in expected} == expected


def test_what_is_asked_for_twice_is_planned_once():
    planned = plan(base(), ["sgd", "paper", "sgd"], [2, 2], [None, 0.1], [0, 0])
    assert names(planned) == [("sgd", 1, 0.1, 0), ("paper", 2, 0.1, 0)]


@pytest.mark.parametrize("position", range(4))
def test_empty_list_is_refused_by_name(position):
    lists: list[list[Any]] = [["sgd"], [1], [None], [0]]
    lists[position] = []
    name = ("methods", "replicas", "learning rates", "seeds")[position]
    with pytest.raises(RunError, match=f"{name} must name at least one, got none"):
        plan(base(), *lists)


@pytest.mark.parametrize(
    ("methods", "replicas", "rates", "seeds", "rule"),
    [
        (["sgd", "newton"], [1], [None], [0], "method must be one of"),
        (["sgd"], [3], [None], [0], "replicas must divide the batch size 32, got 3"),
        (["paper"], [2, 0], [None], [0], "replicas must be >= 1, got 0"),
        (["paper"], [2], [0.1, -1.0], [0], "learning rate must be positive"),
        (["paper"], [2], [None], [0, -1], "seed must be"),
    ],
)
def test_setting_out_of_range_is_refused_for_any_run(methods, replicas, rates, seeds, rule):
    with pytest.raises(RunError, match=rule):
        plan(base(), methods, replicas, rates, seeds)


def test_summary_is_what_the_issue_says(digits, tmp_path):
    summary, counter = compared(tmp_path, digits, epochs=2, seeds=(0, 1))
    assert counter.labels == [
        f"{run}, rate 0.1, seed {seed}" for seed in (0, 1) for run in ("sgd", "paper, M = 2", "paper, M = 4")
    ]
    assert read_summary(tmp_path) == summary
    assert set(summary) == {"task", "runs"}
    assert summary["task"] == {
        "dataset": "digits",
        "train_samples": SAMPLES,
        "test_samples": 360,
        "activation": "relu",
        "parameters": 6758,
        "batch_size": BATCH,
        "epochs": 2,
    }
    assert [(run["method"], run["replicas"], run["seed"]) for run in summary["runs"]] == [
        (method, M, seed) for method, M in (("sgd", 1), ("paper", 2), ("paper", 4)) for seed in (0, 1)
    ]
    for run in summary["runs"]:
        assert list(run) == ["method", "replicas", "seed", "learning_rate", *LISTS]
        assert run["learning_rate"] == 0.1
        assert all(len(run[name]) == 2 for name in LISTS)
        assert all(type(value) is float for name in ("train_nll", "test_accuracy", "seconds") for value in run[name])
        assert all(0.0 <= value <= 1.0 for value in run["test_accuracy"])
        assert all(type(value) is int for value in run["gradient_evaluations"])
        assert run["gradient_evaluations"] == [SAMPLES, 2 * SAMPLES]
        assert 0.0 < run["seconds"][0] < run["seconds"][1]


def test_run_that_diverged_has_null_in_the_summary_and_is_not_tried_again(digits, tmp_path):
    summary, _ = compared(tmp_path, digits, ("sgd",), rates=(1e20,), epochs=3)
    assert read_summary(tmp_path)["runs"][0]["train_nll"] == [None]
    assert all(len(summary["runs"][0][name]) == 1 for name in LISTS)
    assert compared(tmp_path, digits, ("sgd",), rates=(1e20,), epochs=3)[1].labels == []


def test_second_call_trains_nothing_and_changes_nothing(digits, tmp_path):
    first, counter = compared(tmp_path, digits)
    assert counter.steps == 3 * STEPS
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second, counter = compared(tmp_path, digits)
    assert counter.labels == []
    assert counter.steps == 0
    assert second == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("addition", "labels"),
    [
        ({"methods": ("sgd", "paper", "adam")}, ["adam, rate 0.003, seed 0"]),
        ({"seeds": (0, 7)}, [f"{run}, rate 0.1, seed 7" for run in ("sgd", "paper, M = 2")]),
        ({"replicas": (1, 2)}, ["paper, M = 1, rate 0.1, seed 0"]),
        ({"rates": (None, 0.05)}, [f"{run}, rate 0.05, seed 0" for run in ("sgd", "paper, M = 2")]),
    ],
)
def test_addition_trains_only_what_is_new(digits, tmp_path, addition, labels):
    settings: dict[str, Any] = {"replicas": (2,)}
    before, _ = compared(tmp_path, digits, **settings)
    after, counter = compared(tmp_path, digits, **(settings | addition))
    assert counter.labels == labels
    assert counter.steps == STEPS * len(labels)
    assert len(after["runs"]) == len(before["runs"]) + len(labels)
    assert all(run in after["runs"] for run in before["runs"])


def test_more_epochs_train_only_the_epochs_that_are_missing_and_fewer_show_less(digits, tmp_path):
    short, _ = compared(tmp_path, digits, replicas=(2,), epochs=1)
    long, counter = compared(tmp_path, digits, replicas=(2,), epochs=3)
    assert counter.steps == 2 * 2 * STEPS
    assert [run["train_nll"][:1] for run in long["runs"]] == [run["train_nll"] for run in short["runs"]]
    assert [len(run["train_nll"]) for run in long["runs"]] == [3, 3]
    shown, counter = compared(tmp_path, digits, replicas=(2,), epochs=2)
    assert counter.steps == 0
    assert [run["train_nll"] for run in shown["runs"]] == [run["train_nll"][:2] for run in long["runs"]]


def test_number_of_missing_runs_is_known_before_and_after(digits, tmp_path):
    planned = plan(base(), ["sgd", "paper"], [2, 4], [None], [0])
    comparison = Comparison.open(tmp_path, base(), digits)
    assert comparison.missing(planned) == 3
    comparison.run(planned[:1], digits, _Counter())
    assert comparison.missing(planned) == 2


def test_interrupted_comparison_is_summarised_and_goes_on_to_the_same_numbers(digits, tmp_path):
    planned = plan(base(epochs=2), ["sgd", "paper"], [4], [None], [0])
    comparison = Comparison.open(tmp_path / "cut", base(epochs=2), digits)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(planned, digits, _Counter(interrupt_at=3 * STEPS + 1))
    assert [len(run["train_nll"]) for run in read_summary(tmp_path / "cut")["runs"]] == [2, 1]
    resumed, counter = compared(tmp_path / "cut", digits, replicas=(4,), epochs=2)
    assert counter.labels == ["paper, M = 4, rate 0.1, seed 0"]
    assert counter.steps == STEPS
    whole, _ = compared(tmp_path / "whole", digits, replicas=(4,), epochs=2)
    for run in (*resumed["runs"], *whole["runs"]):
        del run["seconds"]
    assert resumed == whole


def test_opening_writes_nothing(digits, tmp_path):
    Comparison.open(tmp_path / "new", base(), digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "samples", "named"),
    [
        ({"batch_size": 16}, SAMPLES, "batch_size 32, got 16"),
        ({"activation": "tanh"}, SAMPLES, "activation relu, got tanh"),
        ({"train_limit": 96}, 96, "train_samples 64, got 96"),
    ],
)
def test_another_task_in_the_same_folder_is_refused(digits, tmp_path, change, samples, named):
    compared(tmp_path, digits, ("sgd",))
    before = (tmp_path / SUMMARY).read_bytes()
    with pytest.raises(RunError, match=named) as caught:
        Comparison.open(tmp_path, base(**change), load_dataset("digits", train_limit=samples))
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / SUMMARY).read_bytes() == before


def test_run_of_another_task_is_refused_where_the_summary_is_missing(digits, tmp_path):
    compared(tmp_path, digits, ("sgd",))
    (tmp_path / SUMMARY).unlink()
    with pytest.raises(RunError, match="the saved run has train limit 64, got 96"):
        compared(tmp_path, load_dataset("digits", train_limit=96), ("sgd",), train_limit=96, epochs=2)


def test_folder_that_is_a_file_is_refused(digits, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="must be a folder, got a file"):
        Comparison.open(tmp_path / "file", base(), digits)
    assert (tmp_path / "file").read_text() == "mine"


def test_batch_larger_than_the_training_set_is_refused(digits, tmp_path):
    with pytest.raises(RunError, match="at most the 64 training samples, got 128"):
        Comparison.open(tmp_path, base(batch_size=128), digits)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"task": 3}', b"\xff\xfe"])
def test_summary_that_cannot_be_read_is_an_error_that_names_the_file(digits, tmp_path, content):
    (tmp_path / SUMMARY).write_bytes(content)
    with pytest.raises(RunError, match="not a readable summary") as caught:
        Comparison.open(tmp_path, base(), digits)
    assert str(tmp_path / SUMMARY) in str(caught.value)


def test_deleted_summary_is_written_anew_from_the_runs(digits, tmp_path):
    before, _ = compared(tmp_path, digits)
    (tmp_path / SUMMARY).unlink()
    after, counter = compared(tmp_path, digits)
    assert counter.steps == 0
    assert after == before == read_summary(tmp_path)


def test_damaged_checkpoint_of_one_run_is_named_and_nothing_is_overwritten(digits, tmp_path):
    compared(tmp_path, digits)
    (folder,) = (tmp_path / RUNS).glob("paper-M4-*")
    (file,) = (folder / CHECKPOINTS).glob("*/process-0.pt")
    file.write_bytes(b"garbage")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    planned = plan(base(), ["sgd", "paper"], [2, 4], [None], [0])
    comparison = Comparison.open(tmp_path, base(), digits)
    for action in (lambda: comparison.missing(planned), comparison.write_summary):
        with pytest.raises(RunError, match="no whole checkpoint") as caught:
            action()
        assert str(folder / CHECKPOINTS) in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder / CHECKPOINTS)
    assert compared(tmp_path, digits)[1].labels == ["paper, M = 4, rate 0.1, seed 0"]


def test_runs_lie_in_folders_that_hold_their_settings(digits, tmp_path):
    compared(tmp_path, digits, ("paper",), rates=(0.05, 0.1))
    saved = {load_run(folder).config for folder in (tmp_path / RUNS).iterdir()}
    assert saved == set(plan(base(), ["paper"], [2, 4], [0.05, 0.1], [0]))
    assert all(math.isfinite(load_run(folder).history[-1].train_nll) for folder in (tmp_path / RUNS).iterdir())
