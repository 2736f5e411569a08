"""The IDX reader: round trips, and every rule that a file can break."""

import contextlib
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from replica_newton.training.idx import DataError, read_idx

IN_TMP_PATH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = idx_bytes(np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8))
LABELS = idx_bytes(np.arange(12, dtype=np.uint8))
ZIPPED = gzip.compress(IMAGES, mtime=0)  # the same bytes, hence the same test names, in every process


@IN_TMP_PATH
@given(array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)), zipped=st.booleans())
def test_round_trip(tmp_path: Path, array: np.ndarray, zipped: bool) -> None:
    file = tmp_path / "array"
    file.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    np.testing.assert_array_equal(read_idx(file, array.ndim), array, strict=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an IDX file must begin with two zero bytes, got b''"),
        (b"PK\x03\x04", "an IDX file must begin with two zero bytes, got b'PK'"),
        (b"\0\0\x0d\x03" + IMAGES[4:], r"the IDX type code must be b'\x08', got b'\r'"),
        (b"\0\0", r"the IDX type code must be b'\x08', got b''"),
        (b"\0\0\x08", "the IDX array must have 3 dimension(s), got []"),
        (LABELS, "the IDX array must have 3 dimension(s), got [1]"),
        (IMAGES[:15], "the IDX header must have 16 bytes, got 15"),
        (IMAGES[:-1], "an IDX array of shape (12, 28, 28) must have 9424 bytes, got 9423"),
        (IMAGES + b"\0", "an IDX array of shape (12, 28, 28) must have 9424 bytes, got 9425"),
        (IMAGES[:4] + b"\xff" * 12, f"must have {16 + (2**32 - 1) ** 3} bytes, got 16"),
        (idx_bytes(np.zeros((0, 28, 28), np.uint8)), "the IDX array must not be empty, got shape (0, 28, 28)"),
        (gzip.compress(IMAGES[:-1], mtime=0), "must have 9424 bytes, got 9423"),
    ],
)
def test_rules(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "array"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(file, 3)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (ZIPPED[:5], "Compressed file ended before the end-of-stream marker was reached"),
        (ZIPPED[:-9], "Compressed file ended before the end-of-stream marker was reached"),
        (ZIPPED[:-8] + bytes(8), "CRC check failed"),
        (ZIPPED[:10] + b"\xff" * 40, "Error -3 while decompressing data"),
        (ZIPPED + b"more", "Not a gzipped file"),
    ],
)
def test_damaged_gzip(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "array.gz"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(file, 3)
    assert str(caught.value).startswith(f"{file}: must be a readable, intact IDX file, got: {expected}")
    assert caught.value.__cause__ is not None


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="intact IDX file, got: No such file or directory") as caught:
        read_idx(tmp_path / "absent", 3)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@IN_TMP_PATH
@given(
    content=st.sampled_from([LABELS, gzip.compress(LABELS, mtime=0)]),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.binary(),
)
def test_damage_raises_nothing_but_data_errors(tmp_path: Path, content: bytes, place: float, flip: bytes) -> None:
    start = int(place * len(content))
    file = tmp_path / "array"
    file.write_bytes(content[:start] + flip + content[start + len(flip) :])
    with contextlib.suppress(DataError):
        # Damage to a label itself cannot be seen.
        assert read_idx(file, 1).ndim == 1
