"""What looks on while a run trains: it changes nothing, and says at which step it saw what."""

from dataclasses import asdict
from pathlib import Path

import cases_monitor
import pytest
import torch
from processes import run_processes
from torch import nn

from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.loop import train
from replica_newton.training.run import RunConfig, RunState
from replica_newton.training.watch import RANK, CurvatureWatch, TrackedRun, curvature_values, log_finite


class _Recorder:
    """Tracker and observer that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.told: list[str] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def start_run(self, _: str, **__: int) -> None:
        self.told.append("start")

    def step(self, **_: float | None) -> None:
        self.told.append("step")

    def finish_epoch(self, **_: float) -> None:
        self.told.append("epoch")

    def finish_run(self) -> None:
        self.told.append("finish")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=96)


def config(method: str, epochs: int = 2) -> RunConfig:
    return RunConfig("digits", method, epochs=epochs, batch_size=24, replicas=4 if method == "paper-common" else 1)


@pytest.mark.parametrize("method", ["momentum", "paper-common"])
def test_a_watched_run_is_the_same_bit_for_bit(method: str, digits: Dataset):
    seen = []
    watched, alone = RunState(config(method)), RunState(config(method))
    train(watched, digits, None, _Recorder(), CurvatureWatch(2, lambda step, what: seen.append((step, what))))
    train(alone, digits, None, _Recorder())
    assert all(torch.equal(watched.model[name], value) for name, value in alone.model.items())
    assert torch.equal(watched.random_state, alone.random_state)
    for left, right in zip(watched.history, alone.history, strict=True):
        assert asdict(left) | {"seconds": 0.0} == asdict(right) | {"seconds": 0.0}
    assert [step for step, _ in seen] == [1, 3, 5, 7]
    assert all(len(what.eigenvalues) == RANK for _, what in seen)


def test_a_run_over_processes_is_watched_by_all_of_them(tmp_path: Path):
    results = run_processes(tmp_path, 3, cases_monitor.watched_training)
    for alone, watched, seen in results:
        assert all(torch.equal(watched[name], value) for name, value in alone.items())
        assert [step for step, _ in seen] == [1, 3, 5, 7]
        for (_, ours), (_, first) in zip(seen, results[0][2], strict=True):
            assert torch.equal(ours.eigenvalues, first.eigenvalues)
            assert ours.gradient_noise_scale == first.gradient_noise_scale > 0.0
        assert len(seen[-1][1].eigenvalues) == RANK


def test_a_resumed_run_goes_on_with_the_number_of_its_steps(digits: Dataset):
    steps, tracker = [], _Recorder()
    state = RunState(config("sgd", epochs=1))
    train(state, digits, None, _Recorder())
    longer = state.continued(config("sgd", epochs=2))
    train(
        longer, digits, None, TrackedRun(_Recorder(), [tracker]), CurvatureWatch(3, lambda step, _: steps.append(step))
    )
    assert steps == [5, 8]
    assert [step for step, _ in tracker.logged] == [5, 6, 7, 8, 8]


@pytest.mark.parametrize(("samples", "replicas"), [(24, 8), (7, 7), (11, 1)])
def test_as_many_replicas_probe_as_divide_the_batch(samples: int, replicas: int):
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), []
    watch = CurvatureWatch(1, lambda _, what: seen.append(what))
    watch.start(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    for _ in range(-(-RANK // replicas)):
        watch.observe(model, torch.randn(samples, 3), torch.randint(3, (samples,)))
    assert [len(what.eigenvalues) for what in seen] == [0] * (len(seen) - 1) + [RANK]


def test_a_gradient_that_is_not_finite_is_not_reported_and_does_not_end_the_run(caplog: pytest.LogCaptureFixture):
    model, seen = nn.Linear(3, 3), []
    watch = CurvatureWatch(1, lambda step, _: seen.append(step))
    watch.start(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    watch.observe(model, torch.full((8, 3), float("inf")), torch.zeros(8, dtype=torch.long))
    watch.observe(model, torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    assert seen == [2]
    assert "no curvature: gradient at step 0 is not finite" in caplog.text


def test_a_watch_needs_a_positive_interval():
    with pytest.raises(ValueError, match="every=0 must be >= 1"):
        CurvatureWatch(0, lambda *_: None)


def test_everything_is_passed_on_and_logged(digits: Dataset):
    display, tracker, losses = _Recorder(), _Recorder(), []
    train(RunState(config("sgd", epochs=1)), digits, None, TrackedRun(display, [tracker], losses.append))
    assert display.told == ["start", *["step"] * 4, "epoch", "finish"]
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4, 4]
    assert [values["loss"] for _, values in tracker.logged[:4]] == losses
    assert tracker.logged[0][1].keys() == {"loss", "learning_rate"}
    assert tracker.logged[-1][1].keys() == {"train_nll", "test_accuracy"}


def test_what_is_missing_or_not_finite_is_not_logged():
    tracker = _Recorder()
    log_finite([tracker], 3, {"a": 1.0, "b": None, "c": float("nan"), "d": float("inf")})
    log_finite([tracker], 4, {"b": None})
    assert tracker.logged == [(3, {"a": 1.0})]


def test_values_of_an_observation_are_numbered_from_one(digits: Dataset):
    seen = []
    watch = CurvatureWatch(1, lambda _, what: seen.append(what))
    train(RunState(config("sgd", epochs=1)), digits, None, _Recorder(), watch)
    values = curvature_values(seen[-1])
    assert values["curvature/sharpness"] == seen[-1].sharpness
    assert values["curvature/eigenvalue_8"] == float(seen[-1].eigenvalues[7])
    assert values["curvature/stability_ratio"] == pytest.approx(seen[-1].sharpness * 0.1 / 2.0)
    assert len(values) == 5 + 8
