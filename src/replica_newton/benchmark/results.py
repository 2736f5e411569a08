"""What has been found, kept in one file that grows."""

import json
from pathlib import Path
from typing import Any

from replica_newton.benchmark.run import Record, Run
from replica_newton.files import replace_file, rounded
from replica_newton.training.run import RunError

FORMAT = 1
Records = dict[Run, Record]


def load_records(path: Path) -> Records:
    """What a file of results holds.

    Args:
        path: written by `save_records`; may be missing.

    Returns:
        The records by run.

    Raises:
        RunError: if the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        records = [Record.from_json(entry) for entry in content["runs"]] if found == FORMAT else []
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: not a readable summary ({error!r}); delete it to start anew") from error
    if found != FORMAT:
        raise RunError(f"{path} must have format {FORMAT}, got {found}; delete it to start anew")
    return {record.run: record for record in records}


def save_records(path: Path, records: Records, **further: Any) -> None:
    """Write the records, whole or not at all: one line a run.

    Args:
        path: of the file.
        records: what has been found.
        further: sections that follow from them.
    """
    ordered = sorted(records.items(), key=lambda one: one[0].key)
    lines = [json.dumps(rounded(record.to_json()), separators=(",", ":")) for _, record in ordered]
    sections = [f'"format": {FORMAT}']
    sections += [f"{json.dumps(name)}: {json.dumps(rounded(value))}" for name, value in further.items()]
    sections.append('"runs": [\n' + ",\n".join(lines) + "\n]")
    replace_file(path, ("{" + ",\n".join(sections) + "}\n").encode())


def as_kept(record: Record) -> Record:
    """A record in the digits that the file keeps: no choice may depend on whether the benchmark was interrupted.

    Args:
        record: of a run.

    Returns:
        The record as it will be read.
    """
    return Record.from_json(rounded(record.to_json()))


def check_data(records: Records, data: dict[str, str]) -> None:
    """Refuse to compare runs on different data.

    Args:
        records: what has been found.
        data: by task, what would be trained on now.

    Raises:
        RunError: if a run was trained on something else.
    """
    for run, record in records.items():
        if run.train_limit is None and data.get(run.task, record.data) != record.data:
            raise RunError(
                f"{run.task} was run on {record.data}, now it would be {data[run.task]}: start anew by --fresh"
            )
