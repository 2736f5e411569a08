import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replica_newton.reproduction import plan as plan_module
from replica_newton.reproduction.design import Extent, Round
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.readings import LITERAL, Reading
from replica_newton.reproduction.results import Measurement, Results, load_results, save_results
from replica_newton.reproduction.study import Study, Task
from replica_newton.training.run import RunError

TINY = Extent(
    epochs=2,
    panel_epochs=2,
    calibration_epochs=1,
    search_rates=(0.01,),
    rounds=(Round(None, 1, (8,)), Round(2, 1, (2, 8))),
    tuning_epochs=1,
    plateau_epochs=1,
    plateau_seeds=(0,),
    train_limit=256,
)


class Silent:
    """An observer that remembers what is finished, and stops the study after some of it."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.finished: list[Task] = []
        self.shares: list[float] = []
        self.stop_after = stop_after

    def update(self, done: float, total: float, running: list[tuple[str, float, int]]) -> None:
        """Remember the share that is done."""
        assert all(0.0 <= epochs <= of for _, epochs, of in running)
        self.shares.append(done / total)

    def finish(self, task: Task, outcome: Any) -> None:
        """Remember the task, and stop if it is time."""
        assert isinstance(outcome, Record) != isinstance(task, Measurement)
        self.finished.append(task)
        if len(self.finished) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the shape of MNIST."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    random = np.random.default_rng(0)
    np.savez(
        path,
        x_train=random.integers(0, 256, (600, 28, 28), dtype=np.uint8),
        y_train=random.integers(0, 10, 600, dtype=np.uint8),
        x_test=random.integers(0, 256, (50, 28, 28), dtype=np.uint8),
        y_test=random.integers(0, 10, 50, dtype=np.uint8),
    )
    return path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three readings in place of 128, and one measurement."""
    readings = (LITERAL, Reading(parting="reset"), Reading(start="different", parting="fixed"))
    monkeypatch.setattr(plan_module, "READINGS", readings)
    monkeypatch.setattr(Plan, "measurements", lambda _: [Measurement("surfaces", "mnist", "relu", 512)])


def study(folder: Path, images: Path) -> Study:
    return Study(Plan(("mnist",), TINY), {"mnist": images}, folder / "summary.json", folder / "checkpoints", 2)


def without_seconds(results: Results) -> list[dict[str, Any]]:
    records = [record.to_json() | {"seconds": 0.0} for record in results.records.values()]
    return sorted(records, key=lambda one: json.dumps(one["experiment"]))


@pytest.mark.usefixtures("few")
def test_a_study_that_is_interrupted_ends_at_the_same_results(images: Path, tmp_path: Path) -> None:
    whole = study(tmp_path / "whole", images)
    observer = Silent()
    results = whole.run(observer)
    assert whole.missing(results) == []
    assert "surfaces" in results.measurements
    assert len(observer.finished) >= len(results.records) + 1
    assert observer.shares == sorted(observer.shares) or max(observer.shares) <= 1.0 + 1e-9

    broken = study(tmp_path / "broken", images)
    with pytest.raises(KeyboardInterrupt):
        broken.run(Silent(stop_after=7))
    before = load_results(broken.summary)
    assert 5 <= len(before.records) <= 7
    rest = Silent()
    assert without_seconds(broken.run(rest)) == without_seconds(results)
    assert len(rest.finished) <= len(observer.finished) - 7

    again = Silent()
    assert without_seconds(broken.run(again)) == without_seconds(load_results(whole.summary))
    assert again.finished == []


@pytest.mark.usefixtures("few")
def test_a_killed_process_is_named_and_loses_nothing(images: Path, tmp_path: Path) -> None:
    one = study(tmp_path, images)

    class Killer(Silent):
        """Kills a worker when three tasks are finished."""

        def finish(self, task: Task, outcome: Any) -> None:
            """Remember, and kill."""
            super().finish(task, outcome)
            if len(self.finished) == 3:
                for process in _children():
                    os.kill(process, signal.SIGKILL)

    with pytest.raises(RunError, match=r"a process of the study has died .*the same command goes on"):
        one.run(Killer())
    assert len(load_results(one.summary).records) >= 3
    assert one.missing(one.run(Silent())) == []


def _children() -> list[int]:
    """The largest process that this one has started: one of the workers, which have data and networks."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                memory = int((folder / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            if int(status[1]) == os.getpid():
                found.append((memory, int(folder.name)))
    return [process for _, process in sorted(found)[-1:]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable summary"),
        ('{"format": 1}', "not a readable summary"),
        ('{"format": 1, "runs": [{"experiment": {}}], "measurements": {}}', "not a readable summary"),
        ('{"format": 99, "runs": [], "measurements": {}}', "must have format 1, got 99"),
    ],
)
def test_a_damaged_summary_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        load_results(path)
    assert path.read_text() == content


def test_a_missing_summary_is_an_empty_one(tmp_path: Path) -> None:
    assert load_results(tmp_path / "none.json") == Results()


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    results = Results(measurements={"surfaces": {"a": [1.0, None], "b": 1.23456789}})
    save_results(tmp_path / "summary.json", results, findings={"x": 1 / 3})
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["findings"] == {"x": 0.333333}
    assert load_results(tmp_path / "summary.json").measurements == {"surfaces": {"a": [1.0, None], "b": 1.23457}}
