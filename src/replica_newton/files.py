"""Writing a file so that a reader never meets half of it, and numbers as files keep them."""

import os
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write of a whole file: first to a temporary file beside it, which then takes its place.

    Args:
        path: File to write; its folder is created when it is missing.
        content: Everything the file will hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because only a rename within one file system is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def rounded(value: Any, digits: int = 6) -> Any:
    """Some digits of every number.

    Args:
        value: Anything that JSON has.
        digits: How many are significant.

    Returns:
        The same, tuples as lists.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: rounded(one, digits) for name, one in value.items()}
    return [rounded(one, digits) for one in value] if isinstance(value, (list, tuple)) else value
