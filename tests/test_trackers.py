"""What each tracker keeps, read back by its own library; those that are not installed are skipped by name."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from replica_newton.trackers import (
    PROJECT,
    TRACKERS,
    JsonLinesTracker,
    MlflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandbTracker,
)

VALUES = {1: {"loss": 0.5, "sharpness": 3.0}, 2: {"loss": 0.25}, 5: {"loss": 0.125, "eigenvalue_1": -2.0}}


def log_all(tracker) -> None:
    for step, values in VALUES.items():
        tracker.log(step, values)
    tracker.close()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leveldb_records(log: bytes, *, start: int) -> list[bytes]:
    """Records of a LevelDB log, which is what wandb keeps its runs in; `start` bytes of the first block are cut off."""
    records, parts, at = [], b"", 0
    while at + 7 <= len(log):
        left = (1 << 15) - (at + start) % (1 << 15)
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def test_json_lines_hold_every_value(tmp_path: Path):
    log_all(JsonLinesTracker(tmp_path / "new" / "steps.jsonl"))
    assert read(tmp_path / "new" / "steps.jsonl") == [{"step": step, **values} for step, values in VALUES.items()]


def test_json_lines_are_there_before_the_end(tmp_path: Path):
    tracker = JsonLinesTracker(tmp_path / "steps.jsonl")
    tracker.log(3, {"loss": 1.0})
    assert read(tmp_path / "steps.jsonl") == [{"step": 3, "loss": 1.0}]
    tracker.close()


def test_a_resumed_run_goes_on_after_its_first_step_and_drops_what_came_later(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    log_all(JsonLinesTracker(path))
    path.write_text(path.read_text() + '{"step": 6, "lo')
    tracker = JsonLinesTracker(path, first_step=2)
    tracker.log(3, {"loss": 9.0})
    tracker.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    JsonLinesTracker(path).close()
    assert path.read_text() == ""


def test_tensorboard_reads_every_value_back(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_all(TensorBoardTracker(tmp_path / "events"))
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (5, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("eigenvalue_1")] == [(5, -2.0)]


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_all(TensorBoardTracker(tmp_path))
    tracker = TensorBoardTracker(tmp_path, first_step=2)
    tracker.log(3, {"loss": 9.0})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 9.0)]


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    from wandb.proto import wandb_internal_pb2

    log_all(WandbTracker(tmp_path, name="a run"))
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in leveldb_records(path.read_bytes()[7:], start=7):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            rows.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item})
    kept = {row["_step"]: {name: row[name] for name in row if not name.startswith("_")} for row in rows}
    assert kept == VALUES


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_every_value_back_from_its_folder(tmp_path: Path):
    tracking = pytest.importorskip("mlflow.tracking")
    trackers = [MlflowTracker(tmp_path, name=name) for name in ("first", "second")]
    for tracker in trackers:
        log_all(tracker)
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    for tracker, name in zip(trackers, ("first", "second"), strict=True):
        run = client.get_run(tracker.run_id)
        assert (run.info.run_name, run.info.status) == (name, "FINISHED")
        history = client.get_metric_history(tracker.run_id, "loss")
        assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.5), (2, 0.25), (5, 0.125)]
    assert run.info.experiment_id == client.get_experiment_by_name(PROJECT).experiment_id


@pytest.mark.filterwarnings("default")
def test_trackio_keeps_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(os.environ, "TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    log_all(TrackioTracker(name="a run"))
    logs = SQLiteStorage.get_logs(PROJECT, "a run")
    assert {log["step"]: log["loss"] for log in logs if "loss" in log} == {1: 0.5, 2: 0.25, 5: 0.125}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("tensorboard", "torch.utils.tensorboard"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow.entities"),
        ("trackio", "trackio"),
    ],
)
def test_without_its_package_a_tracker_says_what_to_install(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"the tracker {name} needs .*: pip install 'replica-newton\[{name}\]'"):
        TRACKERS[name](tmp_path, "a run", 0)


def test_json_lines_need_no_package(tmp_path: Path):
    log_all(TRACKERS["jsonl"](tmp_path, "a run", 0))
    assert len(read(tmp_path / "steps.jsonl")) == 3
