"""The IDX file format of MNIST and Fashion-MNIST: a reader that checks every byte it relies on."""

import gzip
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["DataError", "read_idx", "reading", "require"]

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8_CODE = b"\x08"


class DataError(ValueError):
    """A data set that cannot be read, or is not what it should be; the message names the file and the rule."""


def require(condition: bool, origin: Path | str, rule: str) -> None:
    """Check of one rule about a file.

    Args:
        condition: Whether the rule is met.
        origin: The file, or the array in a file, that the rule is about.
        rule: The rule and the value got, in one line.

    Raises:
        DataError: If the rule is not met.
    """
    if not condition:
        raise DataError(f"{origin}: {rule}")


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Context in which any error is an error of reading `file`; keep nothing but library calls in it.

    Args:
        file: The file or folder being read.
        kind: What it must be, in a noun.

    Yields:
        Nothing.

    Raises:
        DataError: In place of any error in the block, chained from it.
    """
    try:
        yield
    # A damaged archive makes the zip, gzip and array readers raise almost any error, EOFError and MemoryError included.
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        # Some of NumPy's messages run over several lines.
        raise DataError(f"{file}: must be a readable, intact {kind}, got: {' '.join(reason.split())}") from error


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Array of unsigned bytes in an IDX file, gzipped or not.

    The content, not the name, tells whether a file is gzipped: an IDX file begins with 0x00, a gzip file with 0x1f.

    Args:
        file: The file to read.
        dimensions: How many dimensions the array must have: 3 for images, 1 for labels.

    Returns:
        The array, read-only, with the shape that the file states.

    Raises:
        DataError: If the file cannot be read or decompressed, has another magic number, type or number of dimensions,
            is empty, or has fewer or more bytes than its shape needs.

    Source: "The IDX file format", http://yann.lecun.com/exdb/mnist/.
    """
    with reading(file, "IDX file"):
        content = file.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    require(content[:2] == b"\0\0", file, f"an IDX file must begin with two zero bytes, got {content[:2]!r}")
    require(content[2:3] == _UINT8_CODE, file, f"the IDX type code must be {_UINT8_CODE!r}, got {content[2:3]!r}")
    got = content[3:4]
    require(got == bytes([dimensions]), file, f"the IDX array must have {dimensions} dimension(s), got {list(got)}")
    header = 4 + 4 * dimensions
    require(len(content) >= header, file, f"the IDX header must have {header} bytes, got {len(content)}")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    require(0 not in shape, file, f"the IDX array must not be empty, got shape {shape}")
    size = header + math.prod(shape)
    require(len(content) == size, file, f"an IDX array of shape {shape} must have {size} bytes, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
