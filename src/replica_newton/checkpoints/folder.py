"""A folder of checkpoints: a file a process, and a manifest, written last, by which a whole one is known."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replica_newton.files import replace_file
from replica_newton.topology import Layout, Topology

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_LOOK_BACK = 32
"""How many checkpoints are looked at, at most, for one that is whole."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file or the process, and why."""


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on the disk.

    Attributes:
        path: its folder.
        step: steps of training it was saved after.
        layout: of the processes that saved it.
    """

    path: Path
    step: int
    layout: Layout

    def content(self, process: int) -> dict[str, Any]:
        """What a process saved, on the CPU.

        Args:
            process: its rank when it saved.

        Returns:
            The content that it gave to `write_checkpoint`.

        Raises:
            CheckpointError: if the file holds other things than tensors, numbers, strings, lists and dicts.
        """
        path = self.path / _file(process)
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises whatever zip, pickle and the operating system raise
            raise CheckpointError(f"{path} cannot be read: {_line(error)}") from error


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], topology: Topology, *, keep: int = 2) -> Path:
    """Write a checkpoint from all processes, whole or not at all; all return when it is there.

    Args:
        folder: of the checkpoints, one folder for all processes; each checkpoint gets a folder of its own in it.
        step: steps of training so far.
        content: what this process saves; tensors, numbers, strings, lists and dicts.
        topology: of the processes.
        keep: how many of the newest whole checkpoints stay; older ones are deleted.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: if `step` is negative or `keep` not positive.
    """
    if step < 0:
        raise ValueError(f"{step=} must be >= 0")
    if keep < 1:
        raise ValueError(f"{keep=} must be >= 1")
    rank, layout = topology.position, topology.layout

    # A new folder every time: an incomplete one that a lost run left behind is never completed by another's files.
    table = _together(topology, "numbering the checkpoint", lambda: [_next_number(folder) if rank == 0 else 0], 1)
    path = folder / f"checkpoint-{int(table[0, 0]):06d}"
    try:
        table = _together(topology, "saving", lambda: _write_file(path / _file(rank), content), 9)
        files = {_file(process): _entry(row) for process, row in enumerate(table.tolist())}
        manifest = {"format": _FORMAT, "step": step, "layout": asdict(layout), "files": files}
        _together(topology, "writing the manifest", lambda: _write_manifest(path, manifest) if rank == 0 else [], 0)
    except Exception:
        # Complete it may be, where processes were lost after the manifest was written.
        if rank == 0 and not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
        raise
    if rank == 0:
        _delete_old(folder, keep)
    return path


def newest_checkpoint(folder: Path, topology: Topology) -> Saved | None:
    """The newest checkpoint that is whole: the same for all processes, which check its files together.

    Newer ones that are incomplete, truncated or changed are named in a warning and passed over.

    Args:
        folder: of the checkpoints.
        topology: of the processes that load, which may be others than those that saved.

    Returns:
        The checkpoint; None if the folder holds none that was ever complete.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
    """
    rank, processes = topology.position, topology.layout.processes
    found = (
        _together(topology, "listing checkpoints", lambda: _listing(folder) if rank == 0 else [], _LOOK_BACK)[0]
        .int()
        .tolist()
    )
    passed_over: list[tuple[Path, str]] = []
    damaged = ""
    for number in (number for number in found if number):
        path = folder / f"checkpoint-{number:06d}"
        saved, problem = _checked(path, lambda count: range(rank, count, processes))
        bad, was_complete = topology.total(
            torch.tensor([problem is not None, (path / MANIFEST).exists()], dtype=torch.float64)
        ).tolist()
        if saved is not None and not bad:
            for other, problem in passed_over if rank == 0 else ():
                logger.warning("%s is not used: %s", other, problem)
            return saved
        # This process's share of the files may be sound: the reader wants the one that is not.
        problem = _checked(path, range)[1] or "a process finds it damaged"
        passed_over.append((path, problem))
        if was_complete:
            damaged = damaged or f"{path.name} is damaged ({problem})"
    if damaged:
        raise CheckpointError(f"{folder}: no whole checkpoint, {damaged}; delete the folder to train from the start")
    return None


def _together(topology: Topology, doing: str, work: Callable[[], list[float]], width: int) -> Tensor:
    """What all processes found, `(P, width)`; an error in one is an error in all."""
    numbers: list[float] = []
    error: Exception | None = None
    try:
        numbers = work()
    except Exception as caught:
        error = caught
    table = torch.zeros(topology.layout.processes, 1 + width, dtype=torch.float64)
    table[topology.position, 0] = error is not None
    table[topology.position, 1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    table = topology.total(table)
    if error is not None:
        raise error
    failed = table[:, 0].nonzero().flatten().tolist()
    if failed:
        raise CheckpointError(f"{doing} failed in process {', '.join(map(str, failed))}")
    return table[:, 1:]


def _file(process: int) -> str:
    return f"process-{process}.pt"


def _numbers(folder: Path) -> list[int]:
    """Numbers of all checkpoints in a folder, newest first."""
    names = [path.name.partition("-")[2] for path in folder.glob("checkpoint-*")] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _next_number(folder: Path) -> int:
    return max(_numbers(folder), default=0) + 1


def _listing(folder: Path) -> list[float]:
    return [float(number) for number in _numbers(folder)[:_LOOK_BACK]]


def _write_file(path: Path, content: dict[str, Any]) -> list[float]:
    """Size of the file, and its SHA-256 as eight numbers, which fp64 holds exactly."""
    buffer = BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    replace_file(path, data)
    digest = sha256(data).digest()
    return [len(data), *(int.from_bytes(digest[start : start + 4]) for start in range(0, 32, 4))]


def _entry(row: list[float]) -> dict[str, Any]:
    size, *words = map(int, row)
    return {"bytes": size, "sha256": b"".join(word.to_bytes(4) for word in words).hex()}


def _write_manifest(path: Path, manifest: dict[str, Any]) -> list[float]:
    replace_file(path / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return []


def _checked(path: Path, share: Callable[[int], Iterable[int]]) -> tuple[Saved | None, str | None]:
    """The checkpoint, if its manifest and the files in this share of them are sound; else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        saved = Saved(path, int(manifest["step"]), Layout(**manifest["layout"]))
        files = dict(manifest["files"])
        for process in share(saved.layout.processes):
            expected, data = files[_file(process)], (path / _file(process)).read_bytes()
            if len(data) != expected["bytes"]:
                return None, f"{_file(process)} has {len(data)} bytes, not {expected['bytes']}"
            if sha256(data).hexdigest() != expected["sha256"]:
                return None, f"{_file(process)} has another SHA-256 than when it was saved"
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{MANIFEST} or a file cannot be read ({_line(error)})"
    return saved, None


def _delete_old(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ones that were completed; one that cannot be deleted stays."""
    numbers = _numbers(folder)
    kept = [number for number in numbers if (folder / f"checkpoint-{number:06d}" / MANIFEST).exists()][:keep]
    for number in set(numbers) - set(kept):
        path = folder / f"checkpoint-{number:06d}"
        try:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that half of it never looks like a checkpoint
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:160]
