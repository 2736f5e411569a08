"""What has been asked for and what has been found, kept in one file."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from replica_newton.files import replace_file, rounded
from replica_newton.reproduction.experiment import Experiment, Record
from replica_newton.training.models import Activation
from replica_newton.training.run import RunError

FORMAT = 1


class Request(NamedTuple):
    """A run of so many epochs; tentative ones stand in for a choice that has still to be made, and are only counted."""

    experiment: Experiment
    epochs: int
    stage: str
    tentative: bool = False

    @property
    def key(self) -> str:
        """One word, the same for all lengths of a run."""
        return self.experiment.key

    @property
    def label(self) -> str:
        """What a person reads."""
        return f"{self.stage}: {self.experiment.label}"


class Measurement(NamedTuple):
    """Something measured once, beside the training runs."""

    quantity: Literal["surfaces", "mechanism", "optimal_rate"]
    dataset: str
    activation: Activation
    train_limit: int | None
    epochs: int = 1
    tentative: bool = False

    @property
    def name(self) -> str:
        """Name in the results."""
        return self.quantity if self.quantity == "surfaces" else f"{self.quantity} {self.dataset} {self.activation}"

    @property
    def key(self) -> str:
        """One word, as of a request."""
        return self.name

    @property
    def label(self) -> str:
        """What a person reads."""
        return self.name.replace("_", " ")


@dataclass
class Results:
    """Everything that has been found.

    Attributes:
        records: the runs, by experiment.
        measurements: what has been measured beside them, by name.
    """

    records: dict[Experiment, Record] = field(default_factory=dict)
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, task: Request | Measurement, outcome: Any) -> None:
        """Take in what a task has brought, in six digits.

        A file keeps no more, and no choice may depend on whether the study was interrupted before it.

        Args:
            task: what was asked for.
            outcome: its record, or what was measured.
        """
        if isinstance(task, Measurement):
            self.measurements[task.name] = rounded(outcome)
        else:
            self.records[task.experiment] = Record.from_json(rounded(outcome.to_json()))

    def get(self, experiment: Experiment, epochs: int) -> Record | None:
        """What a run had reached after so many epochs.

        Args:
            experiment: the run.
            epochs: from its start.

        Returns:
            Its record, shortened if it went on; None if it has not come as far.
        """
        record = self.records.get(experiment)
        if record is None or not record.reaches(epochs):
            return None
        return replace(
            record, train_nll=record.train_nll[:epochs], gradient_evaluations=record.gradient_evaluations[:epochs]
        )


def load_results(path: Path) -> Results:
    """What a file of results holds.

    Args:
        path: written by `save_results`; may be missing.

    Returns:
        The results.

    Raises:
        RunError: if the file cannot be read.
    """
    if not path.exists():
        return Results()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        records = [Record.from_json(entry) for entry in content["runs"]] if found == FORMAT else []
        measurements = dict(content["measurements"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: not a readable summary ({error!r}); delete it to start anew") from error
    if found != FORMAT:
        raise RunError(f"{path} must have format {FORMAT}, got {found}; delete it to start anew")
    return Results({record.experiment: record for record in records}, measurements)


def save_results(path: Path, results: Results, **further: Any) -> None:
    """Write the results, whole or not at all: one line a run.

    Args:
        path: of the file.
        results: what has been found.
        further: sections that follow from them.
    """
    records = sorted(results.records.values(), key=lambda record: record.experiment.key)
    sections = [f'"format": {FORMAT}']
    sections += [f"{json.dumps(name)}: {json.dumps(rounded(value), indent=1)}" for name, value in further.items()]
    sections.append('"runs": [\n' + ",\n".join(json.dumps(rounded(record.to_json())) for record in records) + "\n]")
    measured = [f"{json.dumps(name)}: {json.dumps(rounded(one))}" for name, one in sorted(results.measurements.items())]
    sections.append('"measurements": {\n' + ",\n".join(measured) + "\n}")
    replace_file(path, ("{" + ",\n".join(sections) + "}\n").encode())
