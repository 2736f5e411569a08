"""A run on disk: settings checked, checkpoints written whole, damaged ones named, metrics of one line an epoch."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from replica_newton.checkpoints.folder import write_checkpoint
from replica_newton.topology import Simulated
from replica_newton.training.methods import METHODS
from replica_newton.training.run import (
    CHECKPOINTS,
    MAX_RATE,
    METRICS,
    Epoch,
    Progress,
    RunConfig,
    RunError,
    RunState,
    finite_or_none,
    load_run,
    save_run,
)

CONFIG = RunConfig("digits", "paper", replicas=4, epochs=3, batch_size=32, train_limit=128, learning_rate=0.1)


def epoch(number: int, **changes: Any) -> Epoch:
    reached = Epoch(number, 2.0 / number, 1.5 / number, 0.5, 128 * number, 0.25 * number, sharpness=3.0, fallbacks=1)
    return replace(reached, **changes)


def run_state(epochs: int = 2) -> RunState:
    model = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.1, -0.0])}
    optimizer = {"state": {0: {"displacements": torch.ones(4, 6)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return RunState(
        CONFIG,
        [epoch(number) for number in range(1, epochs + 1)],
        Progress(3, 5.5, 96, 0.125),
        model,
        optimizer,
        torch.get_rng_state().clone(),
    )


def saved_file(folder: Path) -> Path:
    """What the only process has saved, first of all."""
    return folder / CHECKPOINTS / "checkpoint-000001" / "process-0.pt"


def metrics(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / METRICS).read_text().splitlines()]


def test_saved_run_is_loaded_as_it_was(tmp_path):
    state = run_state()
    save_run(state, tmp_path / "a" / "run")
    loaded = load_run(tmp_path / "a" / "run")
    assert loaded.config == state.config
    assert loaded.history == state.history
    assert loaded.progress == state.progress
    assert loaded.model.keys() == state.model.keys()
    assert all(torch.equal(loaded.model[name], state.model[name]) for name in state.model)
    assert torch.equal(loaded.optimizer["state"][0]["displacements"], torch.ones(4, 6))
    assert loaded.optimizer["param_groups"] == state.optimizer["param_groups"]
    assert torch.equal(loaded.random_state, state.random_state)


def test_folder_without_a_checkpoint_holds_no_run(tmp_path):
    (tmp_path / METRICS).write_text("{}\n")
    assert load_run(tmp_path) is None
    assert load_run(tmp_path / "missing") is None


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_an_error_that_names_the_file(tmp_path, fraction):
    save_run(run_state(), tmp_path)
    path = saved_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(RunError, match=r"process-0\.pt has \d+ bytes, not") as caught:
        load_run(tmp_path)
    assert str(tmp_path / CHECKPOINTS) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_checkpoint_of_garbage_is_an_error_that_names_the_file(tmp_path, content):
    save_run(run_state(), tmp_path)
    saved_file(tmp_path).write_bytes(content)
    with pytest.raises(RunError, match="delete the folder to train from the start") as caught:
        load_run(tmp_path)
    assert str(tmp_path / CHECKPOINTS) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"lists": [1, 2]},
        {},
        {"config": {"dataset": "digits", "method": "newer"}, "history": []},
        {"config": asdict(CONFIG)},
    ],
)
def test_file_of_torch_that_is_no_run_is_an_error_that_names_the_file(tmp_path, content):
    write_checkpoint(tmp_path / CHECKPOINTS, 1, content, Simulated(1))
    with pytest.raises(RunError, match=r"checkpoint-000001: not a readable checkpoint"):
        load_run(tmp_path)


def test_checkpoint_cannot_run_code(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    write_checkpoint(tmp_path / CHECKPOINTS, 1, {"config": Exploit()}, Simulated(1))
    with pytest.raises(RunError, match=r"checkpoint-000001: not a readable checkpoint"):
        load_run(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("operation", ["write_bytes", "replace"])
@pytest.mark.parametrize("failing", ["process-0.pt", "manifest.json", METRICS])
def test_failure_while_saving_leaves_the_run_before_and_no_other_file(tmp_path, monkeypatch, operation, failing):
    save_run(run_state(1), tmp_path)
    before = saved_file(tmp_path).read_bytes()
    genuine = getattr(Path, operation)

    def fail(self: Path, argument: Any) -> Any:
        if failing in self.name:
            if operation == "write_bytes":
                genuine(self, argument[: len(argument) // 2])
            raise OSError("disk full")
        return genuine(self, argument)

    monkeypatch.setattr(Path, operation, fail)
    with pytest.raises(OSError, match="disk full"):
        save_run(run_state(2), tmp_path)
    assert saved_file(tmp_path).read_bytes() == before
    assert len(load_run(tmp_path).history) == 1
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINTS, METRICS}
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["checkpoint-000001"]
    assert len(metrics(tmp_path)) >= 1


def test_metrics_hold_one_line_of_json_an_epoch(tmp_path):
    state = run_state(2)
    save_run(state, tmp_path)
    assert metrics(tmp_path) == [asdict(one) for one in state.history]


def test_saving_again_leaves_no_duplicates_in_the_metrics(tmp_path):
    for epochs in (1, 2, 2, 3):
        save_run(run_state(epochs), tmp_path)
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_are_null_in_the_metrics_and_come_back_from_the_checkpoint(tmp_path):
    state = run_state(1)
    state.history.append(epoch(2, train_nll=math.nan, train_loss=math.inf, sharpness=None))
    save_run(state, tmp_path)
    last = metrics(tmp_path)[-1]
    assert last["train_nll"] is last["train_loss"] is last["sharpness"] is None
    loaded = load_run(tmp_path)
    assert math.isnan(loaded.history[-1].train_nll)
    assert loaded.diverged


@pytest.mark.parametrize(
    ("value", "expected"), [(math.nan, None), (-math.inf, None), (0.5, 0.5), (7, 7), ("nan", "nan"), (None, None)]
)
def test_only_floats_that_are_not_finite_become_none(value, expected):
    assert finite_or_none(value) == expected


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("method", "newton", "method must be one of sgd, momentum, adam, paper"),
        ("replicas", 0, "replicas must be >= 1"),
        ("replicas", -2, "replicas must be >= 1"),
        ("replicas", 5, "replicas must divide the batch size 32"),
        ("replicas", 64, "replicas must divide the batch size 32"),
        ("epochs", 0, "epochs must be >= 1"),
        ("batch_size", 0, "batch size must be >= 1"),
        ("seed", -1, "seed must be in 0 … 4294967295"),
        ("seed", 2**32, "seed must be in 0 … 4294967295"),
        ("activation", "sigmoid", "activation must be one of relu, tanh"),
        ("learning_rate", 0.0, "learning rate must be positive"),
        ("learning_rate", -0.1, "learning rate must be positive"),
        ("learning_rate", math.nan, "learning rate must be positive"),
        ("learning_rate", math.inf, "learning rate must be positive and at most 1e+30"),
        ("learning_rate", 2 * MAX_RATE, "learning rate must be positive and at most 1e+30"),
        ("topology", "ring", "topology must be one of simulated, tree, server"),
        ("servers", 1, "servers must be 0 for topology simulated"),
    ],
)
def test_setting_out_of_range_is_refused_with_the_rule_and_the_value(setting, value, rule):
    with pytest.raises(RunError) as caught:
        replace(CONFIG, **{setting: value})
    assert str(caught.value).startswith(rule)
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("method", METHODS)
def test_rate_is_the_methods_own_unless_given(method):
    assert RunConfig("digits", method).learning_rate == METHODS[method].learning_rate
    assert RunConfig("digits", method, learning_rate=0.7).learning_rate == 0.7


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        CONFIG.epochs = 7


def test_label_names_replicas_only_where_they_part():
    assert CONFIG.label == "paper, M = 4, rate 0.1, seed 0"
    assert RunConfig("digits", "adam", replicas=4, seed=2).label == "adam, rate 0.003, seed 2"
    assert replace(CONFIG, topology="tree").label == "paper, M = 4, rate 0.1, seed 0, tree"


@pytest.mark.parametrize("samples", [32, 33, 1000])
def test_batch_fits_as_many_samples_or_more(samples):
    CONFIG.check_fits(samples)


def test_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(RunError, match="batch size must be at most the 31 training samples, got 32"):
        CONFIG.check_fits(31)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset", "mnist"),
        ("method", "sgd"),
        ("replicas", 2),
        ("learning_rate", 0.2),
        ("batch_size", 64),
        ("seed", 1),
        ("activation", "tanh"),
        ("train_limit", None),
        ("train_limit", 64),
    ],
)
def test_run_is_not_continued_with_other_settings(setting, value):
    with pytest.raises(RunError, match="the saved run has") as caught:
        run_state().continued(replace(CONFIG, **{setting: value}))
    assert f"{setting.replace('_', ' ')} {getattr(CONFIG, setting)}, got {value}" in str(caught.value)


def test_run_is_continued_for_more_epochs_or_fewer():
    state = run_state(2)
    longer = state.continued(replace(CONFIG, epochs=5))
    assert longer.config.epochs == 5
    assert longer.history == state.history
    assert longer.model is state.model
    assert not longer.finished
    assert state.continued(replace(CONFIG, epochs=1)).finished


@pytest.mark.parametrize(
    ("nll", "finished"), [([2.0], False), ([2.0, 1.0, 0.5], True), ([math.nan], True), ([], False)]
)
def test_run_is_finished_after_its_epochs_or_once_it_diverged(nll, finished):
    history = [epoch(number, train_nll=value) for number, value in enumerate(nll, start=1)]
    assert RunState(CONFIG, history).finished is finished


def test_summary_has_one_value_an_epoch_up_to_the_number_asked_for():
    state = run_state(3)
    state.history[2] = epoch(3, train_nll=math.nan)
    settings = {"method": "paper", "replicas": 4, "seed": 0, "learning_rate": 0.1}
    assert state.summary(2) == settings | {
        "train_nll": [1.5, 0.75],
        "test_accuracy": [0.5, 0.5],
        "gradient_evaluations": [128, 256],
        "seconds": [0.25, 0.5],
    }
    assert state.summary(10)["train_nll"] == [1.5, 0.75, None]
