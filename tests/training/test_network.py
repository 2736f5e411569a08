"""Saved networks: whatever `train` or `torch.save` wrote comes back, anything else is one clear line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replica_newton import save_checkpoint
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.models import reference_convnet
from replica_newton.training.network import load_network
from replica_newton.training.run import RunConfig, RunError, RunState, save_run


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=32)


def test_a_run_comes_back_with_its_own_activation(tmp_path: Path, digits: Dataset):
    model = reference_convnet(digits.input_shape, activation="tanh")
    config = RunConfig("digits", "sgd", activation="tanh")
    save_run(RunState(config, model=model.state_dict(), random_state=torch.get_rng_state()), tmp_path)
    loaded = load_network(tmp_path, digits)
    assert torch.equal(loaded(digits.train_inputs), model(digits.train_inputs))
    assert not loaded.training
    with pytest.raises(RunError, match="the saved run was trained on digits, got mnist"):
        load_network(tmp_path, replace(digits, name="mnist"))


def test_a_network_comes_back_from_checkpoints_of_a_script(tmp_path: Path, digits: Dataset):
    model = reference_convnet(digits.input_shape)
    save_checkpoint(tmp_path, 1, model, torch.optim.SGD(model.parameters()))
    loaded = load_network(tmp_path, digits)
    assert torch.equal(loaded(digits.train_inputs), model(digits.train_inputs))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_plain_state_dict_comes_back_with_the_activation_asked_for(tmp_path: Path, digits: Dataset, activation: str):
    model = reference_convnet(digits.input_shape, activation=activation)
    torch.save(model.state_dict(), tmp_path / "network.pt")
    loaded = load_network(tmp_path / "network.pt", digits, activation=activation)
    assert torch.equal(loaded(digits.train_inputs), model(digits.train_inputs))


def not_finite(digits: Dataset) -> dict:
    state = reference_convnet(digits.input_shape).state_dict()
    state["0.weight"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: [1, 2], "must hold a state_dict, got list"),
        (lambda _: {}, "must hold a state_dict, got dict"),
        (lambda _: {"a": 1}, "must hold a state_dict of tensors, got other values"),
        (lambda _: reference_convnet().state_dict(), "must hold the reference convnet for 1×8×8 inputs"),
        (not_finite, "must hold finite parameters, got nan or infinity"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, digits: Dataset, make, message: str):
    torch.save(make(digits), tmp_path / "file.pt")
    with pytest.raises(RunError, match=message):
        load_network(tmp_path / "file.pt", digits)


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path: Path, digits: Dataset):
    with pytest.raises(RunError, match=r"nowhere\.pt: no such checkpoint"):
        load_network(tmp_path / "nowhere.pt", digits)
    with pytest.raises(RunError, match="no such checkpoint"):
        load_network(tmp_path, digits)
    (tmp_path / "damaged.pt").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"damaged\.pt: not a readable checkpoint \(.+\)"):
        load_network(tmp_path / "damaged.pt", digits)
