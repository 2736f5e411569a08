"""Data sets: tiny files of every kind, every rule that they can break, and the real data where it is present."""

import contextlib
import gzip
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from replica_newton.training import datasets
from replica_newton.training.datasets import (
    DATA_FOLDER_VARIABLE,
    DATASETS,
    DEBIAN_FASHION_MNIST,
    DataError,
    Dataset,
    load_dataset,
)

TRAIN, TEST = 12, 5
IMAGE_SHAPES = {"mnist": (28, 28), "fashion-mnist": (28, 28), "cifar10": (32, 32, 3)}
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Read here, because a fixture hides the variable from the tests.
REAL_DATA_FOLDER = os.environ.get(DATA_FOLDER_VARIABLE)


@pytest.fixture(autouse=True)
def no_data_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_FOLDER_VARIABLE, raising=False)
    layout = datasets._LAYOUTS["fashion-mnist"]._replace(system_folders=(tmp_path / "system",))
    monkeypatch.setitem(datasets._LAYOUTS, "fashion-mnist", layout)


def arrays(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Tiny Keras-style arrays of random images and labels."""
    generator = np.random.default_rng(seed)
    return {
        "x_train": generator.integers(0, 256, (TRAIN, *IMAGE_SHAPES[name]), dtype=np.uint8),
        "y_train": generator.integers(0, 10, TRAIN, dtype=np.uint8),
        "x_test": generator.integers(0, 256, (TEST, *IMAGE_SHAPES[name]), dtype=np.uint8),
        "y_test": generator.integers(0, 10, TEST, dtype=np.uint8),
    }


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_npz(file: Path, content: dict[str, np.ndarray]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **content)
    return file


def write_idx(folder: Path, content: dict[str, np.ndarray], *, zipped: bool = False, dotted: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in IDX_FILES.items():
        spelling = name.replace("-idx", ".idx") if dotted else name
        data = idx_bytes(content[key])
        (folder / (spelling + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return folder


def write_cifar(folder: Path, content: dict[str, np.ndarray]) -> Path:
    """CIFAR-10's binary version: the training records in five files of unequal size."""
    folder.mkdir(parents=True, exist_ok=True)

    def records(part: str) -> list[bytes]:
        pairs = zip(content[f"x_{part}"], content[f"y_{part}"], strict=True)
        return [
            bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3)) for image, label in pairs
        ]

    train = records("train")
    for batch, start in enumerate((0, 2, 4, 6, 8)):
        end = len(train) if batch == 4 else start + 2
        (folder / f"data_batch_{batch + 1}.bin").write_bytes(b"".join(train[start:end]))
    (folder / "test_batch.bin").write_bytes(b"".join(records("test")))
    return folder


def standardised(content: dict[str, np.ndarray], part: str) -> np.ndarray:
    """Reference in float64: divide by 255, subtract the training mean, divide by the training deviation; NCHW."""

    def scaled(images: np.ndarray) -> np.ndarray:
        images = images[..., None] if images.ndim == 3 else images
        return images.transpose(0, 3, 1, 2) / 255

    train = scaled(content["x_train"])
    mean, deviation = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    return (scaled(content[f"x_{part}"]) - mean) / np.where(deviation > 1e-9, deviation, 1)


def check_equal(dataset: Dataset, content: dict[str, np.ndarray]) -> None:
    for part, inputs, labels in (
        ("train", dataset.train_inputs, dataset.train_labels),
        ("test", dataset.test_inputs, dataset.test_labels),
    ):
        assert inputs.dtype == torch.float32
        assert inputs.is_contiguous()
        assert labels.dtype == torch.int64
        np.testing.assert_allclose(inputs.numpy(), standardised(content, part), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(labels.numpy(), content[f"y_{part}"].reshape(-1))


def fails(expected: str, name: str, path: Path | None = None, train_limit: int | None = None) -> DataError:
    """The error of a data set that cannot be loaded: one line, with the expected words."""
    with pytest.raises(DataError) as caught:
        load_dataset(name, path, train_limit=train_limit)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    return caught.value


def test_digits_split_is_the_documented_permutation() -> None:
    digits, order = load_digits(), np.random.RandomState(0).permutation(1797)
    images = digits.images[..., None].astype(np.uint8)
    content = {
        "x_test": images[order[:360]],
        "y_test": digits.target[order[:360]],
        "x_train": images[order[360:]],
        "y_train": digits.target[order[360:]],
    }
    dataset = load_dataset("digits")
    check_equal(dataset, content)
    assert (dataset.name, dataset.source, dataset.classes) == ("digits", "scikit-learn", 10)
    assert dataset.input_shape == (1, 8, 8)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (1437, 360)


def test_digits_order_is_pinned() -> None:
    dataset = load_dataset("digits")
    assert dataset.train_labels[:8].tolist() == [6, 5, 3, 4, 4, 4, 8, 8]
    assert dataset.test_labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]


def test_digits_every_class_is_in_both_sets_in_about_equal_parts() -> None:
    dataset = load_dataset("digits")
    assert torch.bincount(dataset.train_labels).min() >= 130
    assert torch.bincount(dataset.test_labels).min() >= 25


def test_digits_refuses_a_path(tmp_path: Path) -> None:
    fails(f"{tmp_path}: digits are built in", "digits", tmp_path)


def test_training_moments(tmp_path: Path) -> None:
    dataset = load_dataset("cifar10", write_npz(tmp_path / "c.npz", arrays("cifar10")))
    inputs = dataset.train_inputs.double()
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    deviation = inputs.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_constant_channel_is_only_shifted_and_scaled(tmp_path: Path) -> None:
    content = arrays("cifar10")
    content["x_train"][..., 1] = 77
    dataset = load_dataset("cifar10", write_npz(tmp_path / "c.npz", content))
    assert torch.equal(dataset.train_inputs[:, 1], torch.zeros(TRAIN, 32, 32))
    check_equal(dataset, content)


def test_limit_takes_the_first_images_and_their_moments(tmp_path: Path) -> None:
    content = arrays("mnist")
    path = write_npz(tmp_path / "m.npz", content)
    kept = content | {"x_train": content["x_train"][:3], "y_train": content["y_train"][:3]}
    check_equal(load_dataset("mnist", path, train_limit=3), kept)
    check_equal(load_dataset("mnist", path, train_limit=TRAIN), content)


@pytest.mark.parametrize("limit", [-1, 0, TRAIN + 1])
def test_refuses_a_limit_out_of_range(tmp_path: Path, limit: int) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist"))
    fails(f"{path}: train_limit must be in 1 … {TRAIN}, got {limit}", "mnist", path, train_limit=limit)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_npz(tmp_path: Path, name: str) -> None:
    path = write_npz(tmp_path / "any.npz", arrays(name))
    dataset = load_dataset(name, path)
    check_equal(dataset, arrays(name))
    assert (dataset.name, dataset.source) == (name, str(path))


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint64", ">i4"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_npz_labels_may_be_any_integers(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    content = arrays("cifar10")
    content |= {key: content[key].astype(dtype).reshape(shape) for key in ("y_train", "y_test")}
    check_equal(load_dataset("cifar10", write_npz(tmp_path / "c.npz", content)), content)


def test_npz_images_may_be_in_fortran_order(tmp_path: Path) -> None:
    content = arrays("mnist")
    content["x_train"] = np.asfortranarray(content["x_train"])
    check_equal(load_dataset("mnist", write_npz(tmp_path / "m.npz", content)), content)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx(tmp_path: Path, name: str, zipped: bool, dotted: bool) -> None:
    content = arrays(name)
    dataset = load_dataset(name, write_idx(tmp_path / "raw", content, zipped=zipped, dotted=dotted))
    check_equal(dataset, content)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.source == str(tmp_path / "raw")


def test_cifar_binary(tmp_path: Path) -> None:
    content = arrays("cifar10")
    dataset = load_dataset("cifar10", write_cifar(tmp_path / "raw", content))
    check_equal(dataset, content)
    assert dataset.input_shape == (3, 32, 32)


def test_cifar_planes_are_red_green_blue_row_by_row(tmp_path: Path) -> None:
    red, green, blue = bytes([10] * 1024), bytes([20] * 1024), bytes(range(32)) * 32
    for batch in range(1, 6):
        (tmp_path / f"data_batch_{batch}.bin").write_bytes(bytes([batch]) + red + green + blue)
    (tmp_path / "test_batch.bin").write_bytes(bytes([7]) + green + red + blue)
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.train_labels.tolist() == [1, 2, 3, 4, 5]
    assert dataset.test_labels.tolist() == [7]
    # Red and green are constant in the training set: there the inputs are (pixel - mean) / 255.
    torch.testing.assert_close(dataset.test_inputs[0, 0], torch.full((32, 32), 10 / 255))
    torch.testing.assert_close(dataset.test_inputs[0, 1], torch.full((32, 32), -10 / 255))
    column = (torch.arange(32.0) - 15.5) / np.std(np.arange(32))
    torch.testing.assert_close(dataset.test_inputs[0, 2], column.expand(32, 32))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("mnist", ["mnist.npz", ".", "mnist", "MNIST/raw"]),
        (
            "fashion-mnist",
            [
                "fashion-mnist.npz",
                "fashion_mnist.npz",
                "fashion-mnist",
                "fashion_mnist",
                "FashionMNIST/raw",
                "system",
            ],
        ),
        ("cifar10", ["cifar10.npz", ".", "cifar-10-batches-bin"]),
    ],
)
def test_order_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, places: list[str]
) -> None:
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path))
    write_folder = write_cifar if name == "cifar10" else write_idx
    for seed, place in reversed(list(enumerate(places))):
        write = write_npz if place.endswith(".npz") else write_folder
        write(tmp_path / place, arrays(name, seed))
        dataset = load_dataset(name)
        assert dataset.source == str(tmp_path / place)
        check_equal(dataset, arrays(name, seed))


def test_fashion_mnist_is_never_files_beside_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, arrays("mnist"))
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path))
    fails("fashion-mnist must be in", "fashion-mnist")
    check_equal(load_dataset("fashion-mnist", tmp_path), arrays("mnist"))


def test_system_folder_without_a_data_folder(tmp_path: Path) -> None:
    write_idx(tmp_path / "system", arrays("fashion-mnist"), zipped=True)
    check_equal(load_dataset("fashion-mnist"), arrays("fashion-mnist"))


@pytest.mark.parametrize(
    ("name", "place", "write"),
    [("cifar10", "cifar-10-batches-bin", write_cifar), ("mnist", "mnist.npz", write_npz)],
)
def test_path_may_be_the_parent(tmp_path: Path, name: str, place: str, write: Callable[..., Path]) -> None:
    write(tmp_path / place, arrays(name))
    assert load_dataset(name, tmp_path).source == str(tmp_path / place)


def test_path_goes_before_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "data" / "mnist.npz", arrays("mnist", 1))
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path / "data"))
    check_equal(load_dataset("mnist", write_npz(tmp_path / "mine.npz", arrays("mnist", 2))), arrays("mnist", 2))


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_to_search(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv(DATA_FOLDER_VARIABLE, value)
    message = str(fails(f"searched: nowhere, as {DATA_FOLDER_VARIABLE} is not set", "mnist"))
    assert "--data" in message


def test_nothing_found_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path))
    places = (tmp_path / "cifar10.npz", tmp_path, tmp_path / "cifar-10-batches-bin")
    message = str(fails(f"searched: {', '.join(map(str, places))}", "cifar10"))
    assert "--data" in message


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_nothing_found_in_the_folder_given(tmp_path: Path, name: str) -> None:
    message = str(fails(f"searched: {tmp_path}, ", name, tmp_path))
    searched = message.partition("searched: ")[2].split(", ")
    assert len(set(searched)) == len(searched)


def test_refuses_an_unknown_name() -> None:
    fails(f"must be one of {', '.join(DATASETS)}, got 'imagenet'", "imagenet")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x_train": np.zeros((TRAIN, 28, 28), np.float32)}, "x_train: images must be uint8 of shape (n, 28, 28)"),
        ({"x_train": np.zeros((TRAIN, 28, 27), np.uint8)}, "got uint8 of shape (12, 28, 27)"),
        ({"x_test": np.zeros((TEST, 784), np.uint8)}, "x_test: images must be uint8 of shape (n, 28, 28)"),
        ({"x_test": np.uint8(3)}, "got uint8 of shape ()"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8)}, "x_train: must hold one image or more, got 0"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, "x_test: must hold one image or more, got 0"),
        ({"y_train": np.zeros(TRAIN, np.float64)}, "y_train: labels must be integers"),
        ({"y_train": np.zeros(TRAIN, bool)}, "got bool of shape (12,)"),
        ({"y_train": np.zeros((TRAIN, 10), np.uint8)}, "got uint8 of shape (12, 10)"),
        ({"y_train": np.int64(3)}, "got int64 of shape ()"),
        ({"y_train": np.zeros(TRAIN - 1, np.uint8)}, "y_train: must hold 12 labels, one for each image, got 11"),
        ({"y_test": np.zeros(TEST + 1, np.uint8)}, "y_test: must hold 5 labels, one for each image, got 6"),
        ({"y_test": np.array([0, 9, 10, 1, 255], np.uint8)}, "y_test: labels must be in 0 … 9, got [10, 255]"),
        ({"y_test": np.array([0, 9, -1, 1, 2])}, "labels must be in 0 … 9, got [-1]"),
        ({"y_test": np.array([0, 9, 2**64 - 1, 1, 2], np.uint64)}, f"got [{2**64 - 1}]"),
    ],
)
def test_npz_wrong_array(tmp_path: Path, change: dict[str, np.ndarray], expected: str) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist") | change)
    error = fails(expected, "mnist", path)
    assert str(error).startswith(f"{path}: ")


def test_npz_images_of_another_data_set(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist"))
    fails("images must be uint8 of shape (n, 32, 32, 3), got uint8 of shape (12, 28, 28)", "cifar10", path)


def test_npz_missing_arrays_are_listed_with_the_ones_found(tmp_path: Path) -> None:
    content = {"x_train": np.zeros(1), "train_bytes": np.zeros(1)}
    path = write_npz(tmp_path / "m.npz", content)
    message = str(fails(f"{path}: must hold the arrays", "mnist", path))
    assert "got ['x_train', 'train_bytes'], without ['y_train', 'x_test', 'y_test']" in message


def test_npz_object_array(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist") | {"y_test": np.array([{}, 1, 2, 3, 4], object)})
    error = fails(f"{path}: must be a readable, intact .npz file, got: Object arrays cannot be loaded", "mnist", path)
    assert isinstance(error.__cause__, ValueError)


def test_npz_message_of_several_lines_becomes_one(tmp_path: Path) -> None:
    fields = np.zeros(TEST, [(f"field{number}", np.uint8) for number in range(1000)])
    path = write_npz(tmp_path / "m.npz", arrays("mnist") | {"y_test": fields})
    error = fails("Header info length", "mnist", path)
    assert "\n" in str(error.__cause__)


def test_npz_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in IDX_FILES:
            archive.writestr(f"{name}.npy", b"not an array")
    fails(f"{path}: x_train: images must be uint8", "mnist", path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -30])
def test_npz_truncated(tmp_path: Path, keep: int) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist"))
    path.write_bytes(path.read_bytes()[:keep])
    error = fails(f"{path}: must be a readable, intact .npz file, got: File is not a zip file", "mnist", path)
    assert error.__cause__ is not None


def test_npz_damaged_inside(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist"))
    content = bytearray(path.read_bytes())
    content[3000] ^= 0xFF
    path.write_bytes(content)
    fails(f"{path}: must be a readable, intact .npz file, got: ", "mnist", path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_npz_damage_raises_nothing_but_data_errors(tmp_path: Path, place: float, flip: int) -> None:
    path = write_npz(tmp_path / "m.npz", arrays("mnist"))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= flip
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        # The time stamps in an archive are read by nobody.
        check_equal(load_dataset("mnist", path), arrays("mnist"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"some text\n", b"\x80\x04N."])
def test_npz_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.npz"
    path.write_bytes(content)
    message = str(fails(f"{path}: must be a readable, intact .npz file, got: File is not a zip file", "mnist", path))
    assert "pickle" not in message


def test_npz_absent(tmp_path: Path) -> None:
    path = tmp_path / "absent.npz"
    error = fails(f"{path}: must be a readable, intact .npz file, got: No such file or directory", "mnist", path)
    assert isinstance(error.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("key", "content", "expected"),
    [
        ("y_test", b"", "an IDX file must begin with two zero bytes, got b''"),
        ("x_train", idx_bytes(np.zeros(12, np.uint8)), "the IDX array must have 3 dimension(s), got [1]"),
        ("y_train", idx_bytes(np.zeros((12, 28, 28), np.uint8)), "the IDX array must have 1 dimension(s), got [3]"),
        ("x_test", idx_bytes(np.zeros((5, 28, 29), np.uint8)), "must be uint8 of shape (n, 28, 28), got"),
        ("y_train", idx_bytes(np.zeros(11, np.uint8)), "must hold 12 labels, one for each image, got 11"),
        ("y_test", idx_bytes(np.array([1, 2, 3, 4, 77], np.uint8)), "labels must be in 0 … 9, got [77]"),
        (
            "x_test",
            gzip.compress(bytes(100), mtime=0)[:-9],
            "must be a readable, intact IDX file, got: Compressed file ended",
        ),
    ],
)
def test_idx_wrong_file(tmp_path: Path, key: str, content: bytes, expected: str) -> None:
    file = write_idx(tmp_path, arrays("mnist")) / IDX_FILES[key]
    file.write_bytes(content)
    error = fails(expected, "mnist", tmp_path)
    assert str(error).startswith(f"{file}: ")


@pytest.mark.parametrize("key", IDX_FILES)
def test_idx_absent_file(tmp_path: Path, key: str) -> None:
    (write_idx(tmp_path, arrays("mnist")) / IDX_FILES[key]).unlink()
    message = str(fails(f"{tmp_path}: must hold one of", "mnist", tmp_path))
    assert IDX_FILES[key] in message


def test_idx_folder_in_place_of_a_file(tmp_path: Path) -> None:
    file = write_idx(tmp_path, arrays("mnist")) / IDX_FILES["x_test"]
    file.unlink()
    file.mkdir()
    error = fails(f"{file}: must be a readable, intact IDX file, got: Is a directory", "mnist", tmp_path)
    assert isinstance(error.__cause__, IsADirectoryError)


@pytest.mark.parametrize("file", [*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"])
def test_cifar_absent_file(tmp_path: Path, file: str) -> None:
    (write_cifar(tmp_path, arrays("cifar10")) / file).unlink()
    fails(f"{tmp_path / file}: must be a readable, intact CIFAR-10 binary file, got: No such", "cifar10", tmp_path)


@pytest.mark.parametrize("file", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 6145])
def test_cifar_part_of_a_record(tmp_path: Path, file: str, size: int) -> None:
    (write_cifar(tmp_path, arrays("cifar10")) / file).write_bytes(bytes(size))
    expected = f"{tmp_path / file}: must hold one or more records of 3073 bytes, got {size} bytes"
    fails(expected, "cifar10", tmp_path)


def test_cifar_label_out_of_range(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, arrays("cifar10")) / "data_batch_2.bin"
    file.write_bytes(bytes(3073) + bytes([12]) + bytes(3072))
    fails(f"{file}: labels must be in 0 … 9, got [12]", "cifar10", tmp_path)


def test_cifar_folder_in_place_of_a_file(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, arrays("cifar10")) / "test_batch.bin"
    file.unlink()
    file.mkdir()
    fails(f"{file}: must be a readable, intact CIFAR-10 binary file, got: Is a directory", "cifar10", tmp_path)


def test_path_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path))
    for path, place in ((tmp_path / "mine.npz", "mine.npz"), (None, "mnist.npz")):
        expected = f"{tmp_path / place}: must be a readable, intact file or folder, got: Permission denied"
        assert isinstance(fails(expected, "mnist", path).__cause__, PermissionError)


def real_file(name: str) -> Path:
    """A file of real data in the data folder; a test that asks for it is skipped without it."""
    if not REAL_DATA_FOLDER:
        pytest.skip(f"{DATA_FOLDER_VARIABLE} is not set")
    file = Path(REAL_DATA_FOLDER) / name
    if not file.exists():
        pytest.skip(f"the folder named by {DATA_FOLDER_VARIABLE} holds no {name}")
    return file


def test_real_mnist() -> None:
    dataset = load_dataset("mnist", real_file("mnist.npz"))
    assert dataset.train_inputs.shape == (60000, 1, 28, 28)
    assert dataset.test_inputs.shape == (10000, 1, 28, 28)
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(dataset.train_labels).tolist() == counts
    # The well-known moments 0.1307 and 0.3081 of the pixels in [0, 1]: a black pixel is -0.1307 / 0.3081.
    assert dataset.train_inputs.min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)
    assert dataset.train_inputs.max().item() == pytest.approx((1 - 0.1307) / 0.3081, abs=1e-3)


def test_real_cifar10() -> None:
    dataset = load_dataset("cifar10", real_file("cifar10.npz"))
    assert dataset.train_inputs.shape == (50000, 3, 32, 32)
    assert dataset.test_inputs.shape == (10000, 3, 32, 32)
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10


def test_real_packed_cifar10_is_refused_by_its_arrays() -> None:
    path = real_file("cifar10_jpeg.npz")
    message = str(fails(f"{path}: must hold the arrays", "cifar10", path))
    assert "train_bytes" in message


def test_real_fashion_mnist() -> None:
    if not DEBIAN_FASHION_MNIST.exists():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    dataset = load_dataset("fashion-mnist", DEBIAN_FASHION_MNIST)
    assert dataset.train_inputs.shape == (60000, 1, 28, 28)
    assert dataset.test_inputs.shape == (10000, 1, 28, 28)
    assert dataset.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert torch.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10


def test_a_data_set_goes_to_a_device_as_a_whole() -> None:
    digits = load_dataset("digits")
    moved = digits.to(torch.device("meta"))
    tensors = [one for one in vars(moved).values() if isinstance(one, torch.Tensor)]
    assert len(tensors) == 4
    assert {one.device.type for one in tensors} == {"meta"}
    assert (moved.name, moved.classes, moved.input_shape) == ("digits", 10, digits.input_shape)
