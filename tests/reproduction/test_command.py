from pathlib import Path

import numpy as np
import pytest

from replica_newton import cli


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Too few images in the shape of MNIST."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 2100), ("test", 50)):
        arrays[f"x_{split}"] = random.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"y_{split}"] = random.integers(0, 10, size, dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, **arrays)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["replica-newton", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "digits"), "the data set must be one of mnist, cifar10, got 'digits'"),
        (("--dataset", "mnist", "--data", "missing.npz"), "that is there, got missing.npz"),
        (("--workers", 0), "greater than or equal to 1, got 0"),
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, part: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--dataset", "mnist", "--data", part) == 2
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
