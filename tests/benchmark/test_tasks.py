from pathlib import Path

import numpy as np
import pytest
import torch

from replica_newton.benchmark.data import CONTEXT, images_to_rebuild, text
from replica_newton.benchmark.models import CausalTransformer, autoencoder
from replica_newton.benchmark.tasks import TASKS


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the shape of MNIST, with both extremes of the range."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    random = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = random.integers(0, 256, (16, 28, 28), dtype=np.uint8)
        arrays[f"x_{part}"][0, 0, :2] = (0, 255)
        arrays[f"y_{part}"] = random.integers(0, 10, 16, dtype=np.uint8)
    np.savez(path, **arrays)
    return path


def test_the_targets_of_the_text_are_its_next_characters() -> None:
    found = text()
    assert found.inputs.shape == found.targets.shape == (len(found.inputs), CONTEXT)
    assert torch.equal(found.inputs[:, 1:], found.targets[:, :-1])
    assert int(found.inputs.max()) < found.classes <= 150
    assert "sha256" in found.description
    assert len(found.inputs) > 8 * len(found.test_inputs) > 4000
    fewer = found.limited(10)
    assert len(fewer.inputs) == 10
    assert fewer.description.endswith("the first 10 samples")
    assert found.limited(10**9) is found


def test_the_transformer_sees_no_later_character() -> None:
    torch.manual_seed(0)
    network = CausalTransformer(20, 8, width=16, heads=2)
    before = torch.randint(20, (3, 8))
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 20
    changed = (network(before) - network(after)).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("name", ["text-transformer", "autoencoder"])
def test_the_networks_have_the_size_that_is_said(name: str) -> None:
    network = CausalTransformer(103, CONTEXT) if name == "text-transformer" else autoencoder(784)
    size = sum(parameter.numel() for parameter in network.parameters())
    assert 100_000 < size < 200_000 if name == "text-transformer" else size == 471_674


def test_the_floor_is_what_the_best_reconstruction_reaches(images: Path) -> None:
    found, criterion = images_to_rebuild("mnist", images), TASKS["autoencoder"].criterion
    best = torch.logit(found.targets.double(), eps=1e-12)
    assert float(criterion(best, found.targets.double())) == pytest.approx(found.floor, rel=1e-6)
    assert float(found.inputs.min()) == 0.0
    assert float(found.inputs.max()) == 1.0
    assert found.limited(8).floor != found.floor


@pytest.mark.parametrize("name", TASKS)
def test_every_batch_can_be_shared_by_eight_replicas(name: str) -> None:
    task = TASKS[name]
    for samples in (8, 100, 1437, 60_000):
        assert 0 < task.batch_for(samples) <= samples
        assert task.batch_for(samples) % 8 == 0
    assert task.batch_for(60_000) == task.batch_size


def test_built_in_data_need_no_path() -> None:
    assert [name for name, task in TASKS.items() if task.built_in] == [
        "digits-mlp",
        "digits-mlp-full",
        "text-transformer",
    ]
    assert len(TASKS["digits-mlp"].read(Path("missing.npz")).inputs) == 1437
