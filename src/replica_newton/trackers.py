"""Where the numbers of a run go, step by step: a file of JSON lines, or a tracking library behind the same two methods.

Everything stays on this machine: Weights & Biases runs offline, MLflow writes to a folder, trackio to its own.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from replica_newton.files import replace_file

PROJECT = "replica-newton"


class Tracker(Protocol):
    """Something that keeps numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers.

        Args:
            step: optimizer steps taken, from the start of the run; never smaller than in the call before.
            values: by name, finite.
        """
        ...

    def close(self) -> None:
        """Write what is not written yet; nothing is logged afterwards."""
        ...


class JsonLinesTracker:
    """One JSON object a line: `{"step": 20, "loss": 0.31}`.

    Args:
        path: the file; its folder is created when it is missing.
        first_step: lines of an earlier run beyond this step are dropped; the others are kept and added to.
    """

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        kept = [line for line in _lines(path) if line["step"] <= first_step] if first_step else []
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line; see `Tracker`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; see `Tracker`."""
        self._file.close()


class TensorBoardTracker:
    """Event files for TensorBoard: `tensorboard --logdir FOLDER`.

    Args:
        folder: of the event files.
        first_step: what an earlier run logged beyond this step is hidden.

    Raises:
        ImportError: if the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(missing_package("tensorboard")) from error
        purged = first_step + 1 if first_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purged)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value; see `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write and close the event file; see `Tracker`."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, offline unless asked otherwise; `wandb sync` sends it later.

    Args:
        folder: where wandb makes its own folder.
        name: of the run.
        mode: of wandb: "offline", "online" or "disabled".

    Raises:
        ImportError: if the package wandb is not installed.
    """

    def __init__(self, folder: Path, *, name: str, mode: str = "offline") -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(missing_package("wandb")) from error
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True)
        self._run: Any = wandb.init(project=PROJECT, name=name, dir=str(folder), mode=mode, settings=settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history; see `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run; see `Tracker`."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow in a folder of this machine: `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`.

    Args:
        folder: of the database.
        name: of the run.

    Raises:
        ImportError: if the package mlflow is not installed.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ImportError(missing_package("mlflow")) from error
        folder.mkdir(parents=True, exist_ok=True)
        self._client: Any = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name(PROJECT)
        if experiment is None:
            artifacts = (folder.resolve() / "artifacts").as_uri()
            experiment_id = self._client.create_experiment(PROJECT, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        self._metric = Metric
        self.run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One metric for each value; see `Tracker`."""
        now = int(1000 * time.time())
        self._client.log_batch(self.run_id, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """End the run; see `Tracker`."""
        self._client.set_terminated(self.run_id)


class TrackioTracker:
    """A local run of trackio: `trackio show`. It lies where trackio keeps its runs (`TRACKIO_DIR`).

    Args:
        name: of the run.

    Raises:
        ImportError: if the package trackio is not installed.
    """

    def __init__(self, *, name: str) -> None:
        try:
            import trackio
        except ImportError as error:
            raise ImportError(missing_package("trackio")) from error
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            self._finish = trackio.finish  # of the run alone, it would be ended and announced again at exit
            self._run: Any = trackio.init(PROJECT, name=name, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One entry; see `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run; see `Tracker`."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


TRACKERS: dict[str, Callable[[Path, str, int], Tracker]] = {
    "jsonl": lambda folder, _, first: JsonLinesTracker(folder / "steps.jsonl", first_step=first),
    "tensorboard": lambda folder, _, first: TensorBoardTracker(folder / "tensorboard", first_step=first),
    "wandb": lambda folder, name, _: WandbTracker(folder, name=name),
    "mlflow": lambda folder, name, _: MlflowTracker(folder / "mlflow", name=name),
    "trackio": lambda _, name, __: TrackioTracker(name=name),
}
"""Trackers by name: made from the folder and name of a run, and the number of steps taken before."""


def missing_package(name: str) -> str:
    """What to say where the package of a tracker is not installed.

    Args:
        name: of the tracker and of the package.

    Returns:
        One line that says how to install it.
    """
    return f"the tracker {name} needs a package of that name: pip install 'replica-newton[{name}]'"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file; what a killed process left half-written is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
