import json
import re
from pathlib import Path

import numpy as np
import pytest

from replica_newton import cli
from replica_newton.reproduction import command, design, plan
from replica_newton.reproduction.readings import LITERAL, Reading


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of images in the shape of MNIST, each a square in a place of its own, in noise."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 2100), ("test", 50)):
        labels = random.integers(0, 10, size)
        images = random.integers(0, 120, (size, 28, 28))
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[9 * row : 9 * row + 8, 7 * column : 7 * column + 6] += 120
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, **arrays)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["replica-newton", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A study of three readings on few images, in a folder of its own."""
    readings = (LITERAL, Reading(parting="reset"), Reading(start="different", parting="fixed", orthogonal="dropped"))
    monkeypatch.setattr(plan, "READINGS", readings)
    monkeypatch.setattr(command, "TRAIN_SAMPLES", {"mnist": 2100, "cifar10": 50_000})
    rounds = (design.Round(None, 1, (8,)), design.Round(2, 2, (2, 8)))
    quick = design.QUICK
    fields = {**vars(quick), "epochs": 3, "calibration_epochs": 1, "rounds": rounds, "tuning_epochs": 1}
    monkeypatch.setattr(command, "QUICK", design.Extent(**fields))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.timeout(600)
def test_one_command_writes_the_whole_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], blobs: Path
) -> None:
    options = ("--quick", "--dataset", "mnist", "--data", blobs, "--workers", 2)
    assert run(monkeypatch, *options) == 0
    said = capsys.readouterr().out
    folder = Path("runs/reproduction-quick-mnist")
    page = (folder / "reproduction.md").read_text()
    assert f"Page: {folder / 'reproduction.md'}" in said
    assert "surfaces: measured" in said

    figures = re.findall(r"\((reproduction/[^)]+\.(?:png|gif))\)", page)
    assert len(figures) == 9
    assert all((folder / figure).stat().st_size > 5000 for figure in figures)
    summary = json.loads((folder / "reproduction" / "summary.json").read_text())
    assert set(summary) == {"format", "findings", "runs", "measurements"}
    for section in ("set_up", "search", "figure2", "panels", "peers", "plateau"):
        assert f"`findings.{section}`" in page
        assert section in summary["findings"]
    last = summary["findings"]["figure2"]["mnist"]["literal"]["last"]["8"]
    curve = next(
        one["train_nll"]
        for one in summary["runs"]
        if one["experiment"]["method"] == LITERAL.name
        and one["experiment"]["replicas"] == 8
        and one["experiment"]["rate"] == summary["findings"]["set_up"]["mnist"]["chosen"]["rate"]
        and one["experiment"]["activation"] == summary["findings"]["set_up"]["mnist"]["chosen"]["activation"]
    )
    assert last == curve[-1]

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(monkeypatch, *options) == 0
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before, "a finished study is only drawn again, the same"
    assert "epochs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "digits"), "the data set must be one of mnist, cifar10, got 'digits'"),
        (("--dataset", "mnist", "--data", "missing.npz"), "missing.npz"),
        (("--workers", 0), "Invalid value for '--workers'"),
        (("--dataset", "mnist", "--out", "file"), "file must be a folder, got a file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_part_of_a_data_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, blobs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--dataset", "mnist", "--data", blobs) == 2
    assert "mnist must have 60,000 training images, got 2,100" in capsys.readouterr().err


def test_a_damaged_summary_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = Path("out/reproduction/summary.json")
    summary.parent.mkdir(parents=True)
    summary.write_text("{")
    assert run(monkeypatch, "--out", "out") == 2
    assert "not a readable summary" in capsys.readouterr().err
    assert summary.read_text() == "{"
