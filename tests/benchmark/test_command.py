import json
from importlib import util
from pathlib import Path

import pytest

from replica_newton import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["replica-newton", "benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "imagenet"), "the task must be one of mnist-relu,"),
        (("--method", "sgd,newton"), "the method must be one of sgd,"),
        (("--task", "mnist-relu", "--method", "lbfgs"), "lbfgs must apply to one of mnist-relu"),
        (("--task", "mnist-relu", "--method", "sgd", "--data", "missing.npz"), "missing.npz"),
        (("--seeds", 0), "Invalid value for '--seeds'"),
        (("--task", "digits-mlp", "--method", "sgd", "--out", "file"), "file must be a folder, got a file"),
        (("--data", "nowhere", "--out", "out"), "data must be in a file or folder that is there, got nowhere"),
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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    monkeypatch.setattr("replica_newton.benchmark.optimizers.find_spec", lambda _: None)
    assert run(monkeypatch, "--method", "sgd,soap,muon") == 2
    assert "soap, muon need pytorch-optimizer: pip install 'replica-newton[benchmark]'" in capsys.readouterr().err


def test_a_quick_benchmark_is_run_once_and_then_only_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--quick", "--task", "digits-mlp-full", "--method", "sgd,M=1", "--workers", 2)
    assert run(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert said.count(" NLL ") == 4
    page = Path("runs/benchmark-quick/benchmarks.md")
    assert f"Page: {page}" in said
    runs = json.loads(Path("runs/benchmark-quick/benchmarks/summary.json").read_text())["runs"]
    # M = 1 is SGD, at a rate of SGD's quick grid.
    finals = {one["run"]["method"]: one["final_nll"] for one in runs if one["run"]["rate"] == 0.1}
    assert finals["sgd"] == pytest.approx(finals["M=1"], rel=1e-4)

    before = page.read_text()
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count(" NLL ") == 0
    assert page.read_text() == before
