import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replica_newton.reproduction.experiment import (
    Experiment,
    Record,
    initial_network,
    run_experiment,
    scaled_dataset,
)
from replica_newton.reproduction.readings import LITERAL, Reading
from replica_newton.reproduction.trainers import LARGEST_MEASURED_RATE, TRAINERS, SharpnessRate
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.loop import batches

METHODS = [(name, 8 if name in {"sharpness-rate", "saddle-free"} else 1) for name in TRAINERS]
METHODS += [(LITERAL.name, 4), (LITERAL.name, 6), (Reading(start="different", parting="own").name, 2)]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=520)


def experiment(method: str = "sgd", replicas: int = 1, rate: float = 0.05, **settings: object) -> Experiment:
    return replace(Experiment("digits", method, replicas, rate, "relu"), **settings)


@pytest.mark.parametrize(("method", "replicas"), METHODS)
def test_a_run_goes_on_at_the_same_bits(method: str, replicas: int, digits: Dataset, tmp_path: Path) -> None:
    one = experiment(method, replicas, 0.01)
    whole = run_experiment(one, 3, digits)
    run_experiment(one, 1, digits, tmp_path)
    continued = run_experiment(one, 3, digits, tmp_path)
    assert replace(continued, seconds=0.0) == replace(whole, seconds=0.0)
    assert len(whole.train_nll) == 3
    assert all(math.isfinite(value) for value in whole.train_nll)


def test_a_finished_run_is_not_run_again(digits: Dataset, tmp_path: Path) -> None:
    first = run_experiment(experiment(), 2, digits, tmp_path)
    told: list[float] = []
    assert run_experiment(experiment(), 2, digits, tmp_path, told.append) == first
    assert told == []


def test_sgd_is_that_of_torch(digits: Dataset) -> None:
    one = experiment(seed=3)
    record = run_experiment(one, 2, digits)
    model = initial_network(one, digits)
    optimizer = torch.optim.SGD(model.parameters(), one.rate)
    for epoch in range(2):
        losses = []
        for indices in batches(len(digits.train_labels), 256, 3, epoch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(digits.train_inputs[indices]), digits.train_labels[indices])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert record.train_nll[epoch] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert record.gradient_evaluations == (512, 1024)


def test_common_data_costs_a_second_gradient_from_the_second_step_on(digits: Dataset) -> None:
    record = run_experiment(experiment(Reading(data="common").name, 8, 1e-3), 1, digits)
    assert record.gradient_evaluations == (256 + 2 * 256,)


def test_six_replicas_share_252_samples(digits: Dataset) -> None:
    assert experiment(LITERAL.name, 6).batch_size == 252
    assert run_experiment(experiment(LITERAL.name, 6, 1e-3), 1, digits).gradient_evaluations == (2 * 252,)


def test_a_run_that_diverges_ends_there(digits: Dataset, tmp_path: Path) -> None:
    one = experiment(rate=1e8)
    record = run_experiment(one, 5, digits, tmp_path)
    assert record.diverged
    assert len(record.train_nll) < 5
    assert math.isnan(record.train_nll[-1])
    assert math.isnan(record.final_nll)
    assert record.reaches(1000)
    again = run_experiment(one, 5, digits, tmp_path)
    assert again.to_json() == record.to_json()


def test_a_record_survives_json(digits: Dataset) -> None:
    for rate in (0.05, 1e8):
        record = run_experiment(experiment(rate=rate), 2, digits)
        read = Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
        assert read.experiment == record.experiment
        assert read.to_json() == record.to_json()


def test_the_plateau_is_left_when_twenty_losses_are_low(digits: Dataset) -> None:
    assert run_experiment(experiment("adam", rate=0.01), 3, digits).steps_on_plateau is None, "six steps are too few"
    learning = run_experiment(experiment("adam", rate=0.01), 30, digits)
    assert learning.steps_on_plateau is not None
    assert 20 <= learning.steps_on_plateau <= 60
    assert run_experiment(experiment(rate=1e-6), 15, digits).steps_on_plateau is None


def test_an_epoch_has_every_sample_once_and_an_order_of_its_own() -> None:
    first = torch.cat(list(batches(100, 10, 7, 0)))
    assert sorted(first.tolist()) == list(range(100))
    assert not torch.equal(first, torch.cat(list(batches(100, 10, 7, 1))))
    assert not torch.equal(first, torch.cat(list(batches(100, 10, 8, 0))))
    assert torch.equal(first, torch.cat(list(batches(100, 10, 7, 0))))
    assert [len(indices) for indices in batches(99, 10, 0, 0)] == [10] * 9


def test_replicas_that_start_apart_have_weights_of_their_own(digits: Dataset) -> None:
    weights = [
        torch.nn.utils.parameters_to_vector(initial_network(experiment(), digits, m).parameters()) for m in range(3)
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(("scaling", "low", "high"), [("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0)])
def test_images_are_scaled_to_their_range(scaling: str, low: float, high: float) -> None:
    dataset = scaled_dataset("digits", None, scaling)  # type: ignore[arg-type]
    assert float(dataset.train_inputs.min()) == pytest.approx(low, abs=1e-6)
    assert float(dataset.train_inputs.max()) == pytest.approx(high, abs=1e-6)
    plain = scaled_dataset("digits", None, "standard")
    correlation = torch.corrcoef(torch.stack([plain.test_inputs.flatten(), dataset.test_inputs.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(1.0, abs=1e-5)


def test_the_measured_rate_is_one_over_the_sharpness_and_at_most_one(digits: Dataset) -> None:
    trainer = SharpnessRate(initial_network(experiment(), digits), 8, 0.01)
    inputs, targets = digits.train_inputs[:256], digits.train_labels[:256]
    evaluated = [trainer.step(inputs, targets)[1] for _ in range(11)]
    assert evaluated == [3 * 256] + [256] * 9 + [3 * 256]
    observation = trainer.monitor.last
    assert observation is not None
    expected = min(1.0 / observation.sharpness, LARGEST_MEASURED_RATE) if observation.sharpness > 0 else None
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
