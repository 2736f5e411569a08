"""Data sets of small images, read from local files and standardised: digits, MNIST, Fashion-MNIST and CIFAR-10.

Nothing is downloaded. Every reader checks what it reads: a wrong or damaged file is an error, never bad data.
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replica_newton.training.idx import DataError, read_idx, reading, require

__all__ = ["DATASETS", "DATA_FOLDER_VARIABLE", "DEBIAN_FASHION_MNIST", "DataError", "Dataset", "load_dataset"]

DATASETS: tuple[str, ...] = ("digits", "mnist", "fashion-mnist", "cifar10")
DATA_FOLDER_VARIABLE = "REPLICA_NEWTON_DATA"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

_CLASSES = 10
_DIGITS_TEST_SIZE = 360
_DIGITS_FULL_SCALE = 16
_BYTE_FULL_SCALE = 255
_IDX_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_MNIST_IMAGE = (28, 28)
_CIFAR_IMAGE = (32, 32, 3)
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes
_CIFAR_TRAIN_FILES = tuple(f"data_batch_{batch}.bin" for batch in range(1, 6))
_CIFAR_TEST_FILE = "test_batch.bin"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification: standardised images and their classes, split into training and test sets.

    Attributes:
        name: One of `DATASETS`.
        train_inputs: `(n, channels, height, width)` float32, contiguous; each channel of the training set has
            mean 0 and standard deviation 1.
        train_labels: `(n,)` int64, in `0 … classes - 1`.
        test_inputs: As `train_inputs`, shifted and scaled by the moments of the training set.
        test_labels: As `train_labels`.
        classes: The number of classes.
        source: The file or folder that the data was read from; `"scikit-learn"` for digits.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    source: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.train_inputs.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device."""
        names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class _Split(NamedTuple):
    """A training or test set as stored: images `(n, channels, height, width)` and labels `(n,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.integer[Any]]


_Splits = tuple[_Split, _Split]  # training and test set


def load_dataset(name: str, path: Path | None = None, *, train_limit: int | None = None) -> Dataset:
    """Data set of a given name, checked and standardised.

    Each channel is shifted by the mean and divided by the standard deviation of the training images that are kept, both
    exact up to one rounding in float64. A channel that never varies is divided by its full scale instead (255; 16 for
    digits).

    - `digits`: the 1797 images of 8×8 pixels inside scikit-learn, in the order of the fixed permutation
      `numpy.random.RandomState(0).permutation(1797)`: the first 360 are the test set, the other 1437 the training set.
    - `mnist`, `fashion-mnist`: four IDX files, gzipped or not, or one .npz file.
    - `cifar10`: the six files of the binary version, or one .npz file.

    An .npz file holds `x_train`, `y_train`, `x_test` and `y_test`, as Keras has them: images uint8 `(n, 28, 28)` or
    `(n, 32, 32, 3)`, labels integers `(n,)` or `(n, 1)`.

    Args:
        name: One of `DATASETS`.
        path: An .npz file, a folder with the files, or a folder that holds one of these under its usual name. By
            default, the folder named by the environment variable `REPLICA_NEWTON_DATA` is searched, and then for
            Fashion-MNIST the folder of Debian's package `dataset-fashion-mnist`.
        train_limit: How many training images to keep, the first ones; all by default.

    Returns:
        The data set, in the order of its files.

    Raises:
        DataError: If the name is unknown, no data is found, a file cannot be read or is not what it should be, or
            `train_limit` is not in 1 … the number of training images.

    Source: LeCun, Cortes and Burges (MNIST); Xiao, Rasul and Vollgraf 2017 (Fashion-MNIST); Krizhevsky 2009 (CIFAR-10);
    Alpaydin and Kaynak 1998 (digits).
    """
    if name not in DATASETS:
        raise DataError(f"the data set must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        require(path is None, str(path), "digits are built in and must be given no path")
        source, full_scale = "scikit-learn", _DIGITS_FULL_SCALE
        train, test = _read_digits()
    else:
        place = _locate(name, path)
        source, full_scale = str(place), _BYTE_FULL_SCALE
        train, test = _read(place, _LAYOUTS[name])
    if train_limit is not None:
        size = len(train.labels)
        require(1 <= train_limit <= size, source, f"train_limit must be in 1 … {size}, got {train_limit}")
        train = _Split(train.images[:train_limit], train.labels[:train_limit])
    train_inputs, test_inputs = _standardise(train.images, test.images, full_scale)
    train_labels, test_labels = (torch.from_numpy(split.labels.astype(np.int64)) for split in (train, test))
    return Dataset(name, train_inputs, train_labels, test_inputs, test_labels, _CLASSES, source)


def _standardise(train: NDArray[np.uint8], test: NDArray[np.uint8], full_scale: int) -> tuple[Tensor, Tensor]:
    """Both sets as float32, each channel less the training set's mean and divided by its standard deviation."""
    # A division of the pixels by their full scale first would cancel.
    moments = np.array([_moments(train[:, channel]) for channel in range(train.shape[1])])
    mean, deviation = moments.T[:, :, None, None]
    scale = np.where(deviation > 0, deviation, full_scale)

    def standardised(images: NDArray[np.uint8]) -> Tensor:
        # With `out`, NumPy computes in float64 block by block: there is never a float64 copy of the images.
        inputs = np.empty(images.shape, np.float32)
        np.subtract(images, mean, out=inputs)
        np.divide(inputs, scale, out=inputs)
        return torch.from_numpy(inputs)

    return standardised(train), standardised(test)


def _moments(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation, from exact integer sums: the deviation is zero only if all pixels are equal."""
    count = pixels.size
    total = int(pixels.sum(dtype=np.int64))
    total_of_squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
    variance = (count * total_of_squares - total**2) / count**2
    return total / count, variance**0.5


def _read_digits() -> _Splits:
    """Training and test sets of scikit-learn's digits."""
    from sklearn.datasets import load_digits  # here, because it is slow to import and no other data set needs it

    digits = load_digits()
    # NumPy freezes the numbers of RandomState for good; those of its newer generators may change.
    order = np.random.RandomState(0).permutation(len(digits.target))
    images, labels = digits.images[order, None].astype(np.uint8), digits.target[order]
    test, train = slice(_DIGITS_TEST_SIZE), slice(_DIGITS_TEST_SIZE, None)
    return _Split(images[train], labels[train]), _Split(images[test], labels[test])


def _check_images(images: NDArray[Any], image_shape: tuple[int, ...], origin: Path | str) -> None:
    """Check that an array holds images as bytes, each of the given shape."""
    shape = ", ".join(map(str, image_shape))
    require(
        images.dtype == np.uint8 and images.shape[1:] == image_shape,
        origin,
        f"images must be uint8 of shape (n, {shape}), got {images.dtype} of shape {images.shape}",
    )
    require(len(images) > 0, origin, "must hold one image or more, got 0")


def _checked_labels(labels: NDArray[Any], count: int, origin: Path | str) -> NDArray[np.integer[Any]]:
    """Labels of shape `(count,)`, each the number of a class."""
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    require(
        labels.dtype.kind in "iu" and labels.ndim == 1,
        origin,
        f"labels must be integers of shape (n,) or (n, 1), got {labels.dtype} of shape {labels.shape}",
    )
    require(len(labels) == count, origin, f"must hold {count} labels, one for each image, got {len(labels)}")
    wrong = np.unique(labels[(labels < 0) | (labels >= _CLASSES)])
    require(wrong.size == 0, origin, f"labels must be in 0 … {_CLASSES - 1}, got {wrong[:5].tolist()}")
    return labels


def _read_npz(file: Path, image_shape: tuple[int, ...]) -> _Splits:
    """Training and test sets in an .npz file with Keras's array names."""
    # NumPy takes a file that is not a zip archive for a pickle, and then advises to trust it: zipfile looks first.
    with reading(file, ".npz file"), zipfile.ZipFile(file), np.load(file, allow_pickle=False) as archive:
        found = list(archive.files)
        arrays = {name: np.asarray(archive[name]) for name in _NPZ_ARRAYS if name in found}
    missing = [name for name in _NPZ_ARRAYS if name not in arrays]
    require(not missing, file, f"must hold the arrays {list(_NPZ_ARRAYS)}, got {found}, without {missing}")

    def split(part: str) -> _Split:
        images = arrays[f"x_{part}"]
        _check_images(images, image_shape, f"{file}: x_{part}")
        labels = _checked_labels(arrays[f"y_{part}"], len(images), f"{file}: y_{part}")
        channels_last = images.reshape(*images.shape[:3], -1)
        return _Split(channels_last.transpose(0, 3, 1, 2), labels)

    return split("train"), split("test")


def _idx_names(part: str) -> list[str]:
    """The usual names of one IDX file, such as `train-images-idx3`."""
    return [f"{stem}-ubyte{suffix}" for stem in (part, part.replace("-idx", ".idx")) for suffix in ("", ".gz")]


def _read_idx_folder(folder: Path) -> _Splits:
    """Training and test sets in the four IDX files of MNIST."""

    def find(part: str) -> Path:
        files = [folder / name for name in _idx_names(part)]
        found = next((file for file in files if file.exists()), None)
        if found is None:
            raise DataError(f"{folder}: must hold one of {_idx_names(part)}, got none of them")
        return found

    def split(images_part: str, labels_part: str) -> _Split:
        images_file, labels_file = find(images_part), find(labels_part)
        images = read_idx(images_file, 3)
        _check_images(images, _MNIST_IMAGE, images_file)
        return _Split(images[:, None], _checked_labels(read_idx(labels_file, 1), len(images), labels_file))

    return split(*_IDX_PARTS[:2]), split(*_IDX_PARTS[2:])


def _read_cifar_file(file: Path) -> _Split:
    """One file of CIFAR-10's binary version: records of a label and the red, green and blue planes of an image."""
    with reading(file, "CIFAR-10 binary file"):
        content = np.fromfile(file, np.uint8)
    require(
        content.size > 0 and content.size % _CIFAR_RECORD == 0,
        file,
        f"must hold one or more records of {_CIFAR_RECORD} bytes, got {content.size} bytes",
    )
    records = content.reshape(-1, _CIFAR_RECORD)
    return _Split(records[:, 1:].reshape(-1, 3, 32, 32), _checked_labels(records[:, 0], len(records), file))


def _read_cifar_folder(folder: Path) -> _Splits:
    """Training and test sets in the six files of CIFAR-10's binary version."""
    batches = [_read_cifar_file(folder / file) for file in _CIFAR_TRAIN_FILES]
    images, labels = zip(*batches, strict=True)
    return _Split(np.concatenate(images), np.concatenate(labels)), _read_cifar_file(folder / _CIFAR_TEST_FILE)


class _Layout(NamedTuple):
    """Where a data set lies and how it is read.

    Attributes:
        npz_image_shape: The shape of one image in an .npz file.
        read_folder: The reader of a folder of files.
        folder_files: The names that such files may have; a folder with any of them is taken for the data set.
        places: The .npz files and folders that are looked for in a data folder, best first.
        system_folders: Folders that system packages install, looked into after the data folder.
    """

    npz_image_shape: tuple[int, ...]
    read_folder: Callable[[Path], _Splits]
    folder_files: tuple[str, ...]
    places: tuple[str, ...]
    system_folders: tuple[Path, ...] = ()


_MNIST = _Layout(
    npz_image_shape=_MNIST_IMAGE,
    read_folder=_read_idx_folder,
    folder_files=tuple(name for part in _IDX_PARTS for name in _idx_names(part)),
    places=("mnist.npz", ".", "mnist", "MNIST/raw"),
)
_LAYOUTS = {
    "mnist": _MNIST,
    # Its IDX files have the names of MNIST's, so only a folder of its own tells them apart: "." is not searched.
    "fashion-mnist": _MNIST._replace(
        places=(
            "fashion-mnist.npz",
            "fashion_mnist.npz",
            "fashion-mnist",
            "fashion_mnist",
            "FashionMNIST/raw",
        ),
        system_folders=(DEBIAN_FASHION_MNIST,),
    ),
    "cifar10": _Layout(
        npz_image_shape=_CIFAR_IMAGE,
        read_folder=_read_cifar_folder,
        folder_files=(*_CIFAR_TRAIN_FILES, _CIFAR_TEST_FILE),
        places=("cifar10.npz", ".", "cifar-10-batches-bin"),
    ),
}


def _read(place: Path, layout: _Layout) -> _Splits:
    """Training and test sets in a folder of files or an .npz file."""
    return layout.read_folder(place) if _is_folder(place) else _read_npz(place, layout.npz_image_shape)


def _locate(name: str, path: Path | None) -> Path:
    """The first place that holds a data set; a path to a file is that place, whatever it holds."""
    layout = _LAYOUTS[name]
    if path is None:
        data_folder = os.environ.get(DATA_FOLDER_VARIABLE)
        in_data_folder = [Path(data_folder) / place for place in layout.places] if data_folder else []
        searched = [*in_data_folder, *layout.system_folders]
    elif _is_folder(path):
        searched = [path, *(path / place for place in layout.places if place != ".")]
    else:
        return path
    found = next((place for place in searched if _holds(place, layout)), None)
    if found is None:
        where = ", ".join(map(str, searched)) or f"nowhere, as {DATA_FOLDER_VARIABLE} is not set"
        raise DataError(
            f"{name} must be in an .npz file or a folder given by --data, or in a folder named by "
            f"{DATA_FOLDER_VARIABLE}; searched: {where}"
        )
    return found


def _holds(place: Path, layout: _Layout) -> bool:
    """Whether a place is an .npz file, or a folder with any of the files of a data set."""
    with reading(place, "file or folder"):
        if place.is_dir():
            return any((place / file).exists() for file in layout.folder_files)
        return place.suffix == ".npz" and place.exists()


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; a path that may not be looked at is an error."""
    with reading(path, "file or folder"):
        return path.is_dir()
