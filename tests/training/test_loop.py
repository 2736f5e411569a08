"""The loop: equal bits on reruns and after interruptions, every gradient counted, divergence that ends a run."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from replica_newton.optim import ReplicaNewton
from replica_newton.training import loop
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.loop import evaluate, train
from replica_newton.training.methods import METHODS
from replica_newton.training.models import reference_convnet
from replica_newton.training.run import METRICS, RunConfig, RunError, RunState, load_run

BATCH, SAMPLES = 32, 100  # three batches, and four samples that are left over
STEPS = SAMPLES // BATCH
TOGETHER = ("sgd", "momentum", "adam", "metric")
COMMON_DATA = tuple(name for name in METHODS if name not in (*TOGETHER, "paper"))


class _Recorder:
    """Observer that keeps what it is told, and may interrupt the run at a step."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.starts: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.finished_runs = 0

    def start_run(self, label: str, **numbers: int) -> None:
        self.starts.append({"label": label, **numbers})

    def step(self, **numbers: float | None) -> None:
        self.steps.append(numbers)
        if len(self.steps) == self.interrupt_at:
            raise KeyboardInterrupt

    def finish_epoch(self, **numbers: float) -> None:
        self.epochs.append(numbers)

    def finish_run(self) -> None:
        self.finished_runs += 1


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=SAMPLES)


def config(method: str = "sgd", **settings: Any) -> RunConfig:
    replicas = 4 if METHODS[method].parts_replicas else 1
    return RunConfig("digits", method, **{"replicas": replicas, "epochs": 2, "batch_size": BATCH, **settings})


def trained(settings: RunConfig, dataset: Dataset, folder: Path | None = None) -> tuple[RunState, _Recorder]:
    state, recorder = RunState(settings), _Recorder()
    train(state, dataset, folder, recorder)
    return state, recorder


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested dictionaries, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree.values() for tensor in tensors(part)] if isinstance(tree, dict) else []


def timeless(state: RunState) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(epoch).items() if name != "seconds"} for epoch in state.history]


def assert_same_bits(one: RunState, other: RunState) -> None:
    assert timeless(one) == timeless(other)
    for part in ("model", "optimizer"):
        pairs = list(zip(tensors(getattr(one, part)), tensors(getattr(other, part)), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
    assert tensors(one.model)


@pytest.mark.parametrize("method", METHODS)
def test_same_settings_give_the_same_bits_whatever_torch_did_before(method, digits):
    torch.manual_seed(11)
    first, _ = trained(config(method), digits)
    torch.manual_seed(22)
    second, _ = trained(config(method), digits)
    assert_same_bits(first, second)


@pytest.mark.parametrize("method", ["sgd", "paper"])
@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.07}, {"activation": "tanh"}, {"batch_size": 16}])
def test_other_settings_give_other_parameters(method, change, digits):
    first, _ = trained(config(method, epochs=1), digits)
    second, _ = trained(config(method, epochs=1, **change), digits)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(first.model), tensors(second.model), strict=True))
    assert first.history[0].train_nll != second.history[0].train_nll


def test_number_of_replicas_matters_for_the_papers_method(digits):
    ends = [trained(config("paper", replicas=M), digits)[0].history[-1].train_nll for M in (1, 2, 4)]
    assert len(set(ends)) == 3


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_resumes_to_the_bits_of_an_uninterrupted_one(method, digits, tmp_path):
    uninterrupted, _ = trained(config(method), digits)
    with pytest.raises(KeyboardInterrupt):
        train(RunState(config(method)), digits, tmp_path, _Recorder(interrupt_at=STEPS + 2))
    resumed = load_run(tmp_path)
    assert len(resumed.history) == 1
    torch.manual_seed(99)
    train(resumed, digits, tmp_path, _Recorder())
    assert_same_bits(resumed, uninterrupted)
    assert_same_bits(load_run(tmp_path), uninterrupted)


@pytest.mark.parametrize("method", ["momentum", "adam", "paper"])
def test_interrupted_run_goes_on_in_memory_from_its_last_epoch(method, digits):
    state = RunState(config(method, epochs=3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(state, digits, None, _Recorder(interrupt_at=STEPS + 2))
    assert len(state.history) == 2
    train(state, digits, None, _Recorder())
    assert_same_bits(state, trained(config(method, epochs=3), digits)[0])


@pytest.mark.parametrize("method", ["sgd", "paper"])
def test_run_with_dropout_resumes_to_the_same_bits_too(method, digits, tmp_path, monkeypatch):
    def network(*_: Any, **__: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    monkeypatch.setattr(loop, "reference_convnet", network)
    trained(config(method, epochs=1), digits, tmp_path)
    resumed = load_run(tmp_path).continued(config(method))
    torch.manual_seed(99)
    train(resumed, digits, tmp_path, _Recorder())
    assert_same_bits(resumed, trained(config(method), digits)[0])


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_run_interrupted_in_any_epoch_resumes_where_it_was_saved(finished, digits, tmp_path):
    settings = config("paper-random", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(RunState(settings), digits, tmp_path, _Recorder(interrupt_at=finished * STEPS + 1))
    resumed = load_run(tmp_path) or RunState(settings)
    assert len(resumed.history) == finished
    recorder = _Recorder()
    train(resumed, digits, tmp_path, recorder)
    assert recorder.starts[0]["completed_steps"] == finished * STEPS
    assert len(recorder.steps) == (3 - finished) * STEPS
    assert [line["epoch"] for line in recorder.epochs] == list(range(finished + 1, 4))
    assert_same_bits(resumed, trained(settings, digits)[0])
    seconds = [epoch.seconds for epoch in resumed.history]
    assert seconds == sorted(seconds)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [asdict(epoch) for epoch in resumed.history]


def test_run_that_is_given_more_epochs_ends_like_a_longer_one(digits, tmp_path):
    trained(config("momentum", epochs=1), digits, tmp_path)
    longer = load_run(tmp_path).continued(config("momentum", epochs=3))
    train(longer, digits, tmp_path, _Recorder())
    assert_same_bits(longer, trained(config("momentum", epochs=3), digits)[0])


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_evaluation_is_counted_and_an_incomplete_batch_is_dropped(method, digits):
    state, _ = trained(config(method), digits)
    cost = 2 if method in COMMON_DATA else 1
    first = BATCH + cost * BATCH * (STEPS - 1)  # replicas have not parted at the first step
    assert [epoch.gradient_evaluations for epoch in state.history] == [first, first + cost * BATCH * STEPS]


def test_one_replica_needs_no_second_evaluation(digits):
    state, _ = trained(config("paper-common", replicas=1, epochs=1), digits)
    assert state.history[0].gradient_evaluations == BATCH * STEPS


@pytest.mark.parametrize("method", ["sgd", "paper"])
def test_training_nll_and_test_accuracy_are_over_the_whole_sets(method, digits):
    state, recorder = trained(config(method), digits)
    model = reference_convnet(digits.input_shape, digits.classes)
    model.load_state_dict(state.model)
    with torch.no_grad():
        probabilities = model(digits.train_inputs).double().softmax(dim=1)
        nll = -probabilities.gather(1, digits.train_labels[:, None]).log().mean()
        accuracy = (model(digits.test_inputs).argmax(dim=1) == digits.test_labels).double().mean()
    last = state.history[-1]
    assert last.train_nll == pytest.approx(float(nll), rel=1e-5)
    assert last.test_accuracy == pytest.approx(float(accuracy), abs=1e-12)
    assert recorder.epochs[-1] == {"epoch": 2, "train_nll": last.train_nll, "test_accuracy": last.test_accuracy}


def test_every_epoch_visits_all_samples_in_another_order(digits):
    state, recorder = trained(config(learning_rate=1e-30, batch_size=20, epochs=3), digits)
    losses = [step["loss"] for step in recorder.steps]
    epochs = [losses[start : start + 5] for start in (0, 5, 10)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3
    # The parameters stand still, so the mean over all batches is the NLL of the training set.
    for epoch, entry in zip(epochs, state.history, strict=True):
        assert sum(epoch) / 5 == pytest.approx(entry.train_nll, rel=1e-5)
        assert entry.train_loss == pytest.approx(entry.train_nll, rel=1e-5)


def test_order_of_the_data_depends_on_the_seed(digits, monkeypatch):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # initialised once, so that only the order differs
    monkeypatch.setattr(loop, "reference_convnet", lambda *_, **__: network)
    first, second = (trained(config(learning_rate=1e-30, seed=seed), digits)[1].steps for seed in (0, 1))
    assert [step["loss"] for step in first] != [step["loss"] for step in second]


def test_observer_is_told_of_the_run_every_step_and_every_epoch(digits):
    _, recorder = trained(config("paper"), digits)
    assert recorder.starts == [
        {"label": "paper, M = 4, rate 0.1, seed 0", "epochs": 2, "steps_per_epoch": STEPS, "completed_steps": 0}
    ]
    assert len(recorder.steps) == 2 * STEPS
    assert all(math.isfinite(step["loss"]) and step["learning_rate"] == 0.1 for step in recorder.steps)
    assert [line["epoch"] for line in recorder.epochs] == [1, 2]
    assert recorder.finished_runs == 1


def test_sharpness_is_known_from_secants_on_common_data(digits):
    common, own, sgd = (trained(config(method), digits)[0].history[-1] for method in ("paper-common", "paper", "sgd"))
    assert math.isfinite(common.sharpness)
    assert common.sharpness_residual >= 0.0
    assert own.sharpness is own.sharpness_residual is sgd.sharpness is sgd.sharpness_residual is None
    assert 0 <= common.fallbacks <= 2 * STEPS - 1
    assert sgd.fallbacks is None


def test_fallbacks_count_from_the_start_of_the_run(digits, tmp_path, monkeypatch):
    def fall_back(optimizer: ReplicaNewton, gradient: Tensor, *_: object) -> Callable[[slice], Tensor]:
        optimizer.fallbacks += 1
        return gradient.__getitem__

    monkeypatch.setattr(ReplicaNewton, "_direction", fall_back)
    trained(config("paper"), digits, tmp_path)
    resumed = load_run(tmp_path).continued(config("paper", epochs=3))
    train(resumed, digits, tmp_path, _Recorder())
    assert [epoch.fallbacks for epoch in resumed.history] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_finished_run_is_left_as_it_is(digits, tmp_path):
    state, _ = trained(config(epochs=1), digits, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    recorder = _Recorder()
    train(load_run(tmp_path), digits, tmp_path, recorder)
    assert recorder.steps == recorder.epochs == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert state.finished


@pytest.mark.parametrize("method", METHODS)
def test_run_that_diverges_ends_there_and_is_not_tried_again(method, digits, tmp_path):
    state, recorder = trained(config(method, learning_rate=1e20, epochs=5), digits, tmp_path)
    assert state.diverged
    assert state.finished
    assert len(state.history) == 1
    assert math.isnan(state.history[-1].train_nll)
    assert recorder.finished_runs == 1
    assert BATCH < state.history[-1].gradient_evaluations <= 2 * BATCH * STEPS
    assert json.loads((tmp_path / METRICS).read_text())["train_nll"] is None
    assert state.summary(5)["train_nll"] == [None]
    again = _Recorder()
    train(load_run(tmp_path), digits, tmp_path, again)
    assert again.steps == again.epochs == []


@pytest.mark.parametrize("method", METHODS)
def test_largest_rate_allowed_diverges_rather_than_raises(method, digits):
    state, _ = trained(config(method, learning_rate=1e30), digits)
    assert state.diverged


def test_batch_larger_than_the_training_set_is_refused_before_anything_happens(digits, tmp_path):
    recorder = _Recorder()
    with pytest.raises(RunError, match="at most the 100 training samples, got 128"):
        train(RunState(config(batch_size=128)), digits, tmp_path / "run", recorder)
    assert recorder.starts == []
    assert not (tmp_path / "run").exists()


def test_training_without_a_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(config(epochs=1), digits, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_and_is_done_without_dropout(training):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(50, 6, generator=generator), torch.arange(50) % 6
    model = nn.Sequential(nn.Dropout(0.5))  # the identity in evaluation
    model.train(training)
    nll, accuracy = evaluate(model, inputs, labels)
    assert model.training is training
    assert nll == pytest.approx(float(nn.functional.cross_entropy(inputs, labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((inputs.argmax(dim=1) == labels).double().mean()))


@pytest.mark.parametrize("size", [1, 7, 50, 51])
def test_evaluation_in_parts_is_that_of_the_whole(size, monkeypatch):
    inputs, labels = torch.linspace(-3.0, 3.0, 300).reshape(50, 6).sin(), torch.arange(50) % 6
    whole = evaluate(nn.Identity(), inputs, labels)
    monkeypatch.setattr(loop, "EVALUATION_BATCH", size)
    assert evaluate(nn.Identity(), inputs, labels) == pytest.approx(whole, rel=1e-6)
