"""The command: what it writes, one clear line for every bad input, help, Ctrl-C, and real data where it is present."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer

import replica_newton
from replica_newton import cli
from replica_newton.training.datasets import DATA_FOLDER_VARIABLE
from replica_newton.training.methods import METHODS
from replica_newton.training.models import reference_convnet
from replica_newton.training.run import load_run

COMMAND = Path(sysconfig.get_path("scripts")) / "replica-newton"
SMALL = shlex.split("--train-limit 128 --batch-size 32")
# Read here, because a fixture hides the variable from the tests.
REAL_DATA_FOLDER = os.environ.get(DATA_FOLDER_VARIABLE)


class Outcome(NamedTuple):
    """What a call of the command ended with."""

    status: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def empty_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DATA_FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """The command in this process: `invoke("train --epochs 1", *more_arguments)`."""

    def call(line: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["replica-newton", *shlex.split(line), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), re.sub(r"\x1b\[[\d;]*m", "", captured.out), captured.err)

    return call


def start(line: str, *arguments: object) -> "subprocess.Popen[str]":
    """The command in a process of its own, with Ctrl-C as in a terminal, wherever the tests were started."""
    return subprocess.Popen(
        [COMMAND, *shlex.split(line), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(line: str, *arguments: object) -> Outcome:
    """The command in a process that gets Ctrl-C once its first epoch is over."""
    with start(line, *arguments) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, first + out, err)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def read_json(text: str) -> Any:
    """Content of JSON, which has no nan and no infinity."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [read_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def bad_files(folder: Path) -> None:
    """What the bad inputs name: a file where a folder belongs, and data sets that are none."""
    (folder / "file").touch()
    (folder / "garbage.npz").write_bytes(b"garbage")
    (folder / "empty-folder").mkdir()
    images, labels = np.zeros((40, 28, 28), np.uint8), np.zeros(40, np.uint8)
    good = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(folder / "good.npz", **good)
    np.savez(folder / "float.npz", **(good | {"x_train": images.astype(np.float32)}))
    np.savez(folder / "labels.npz", **(good | {"y_test": labels + 10}))
    content = (folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(content[: len(content) // 2])


BAD_ANYWHERE = [
    ("--dataset nope", "the data set must be one of digits, mnist, fashion-mnist, cifar10, got 'nope'"),
    ("--dataset mnist", DATA_FOLDER_VARIABLE),
    ("--dataset mnist --data nowhere.npz", "nowhere.npz"),
    ("--dataset mnist --data garbage.npz", "garbage.npz"),
    ("--dataset mnist --data truncated.npz", "truncated.npz"),
    ("--dataset mnist --data float.npz", "float.npz"),
    ("--dataset mnist --data labels.npz", "labels.npz"),
    ("--dataset mnist --data empty-folder", "empty-folder"),
    ("--dataset cifar10 --data good.npz", "good.npz"),
    ("--dataset mnist --data good.npz --batch-size 64", "at most the 40 training samples, got 64"),
    ("--data good.npz", "good.npz"),
    ("--replicas 3", "replicas must divide the batch size 64, got 3"),
    ("--replicas 0", "replicas must be >= 1, got 0"),
    ("--replicas many", "replicas"),
    ("--epochs 0", "epochs must be >= 1, got 0"),
    ("--batch-size 0", "batch size must be >= 1, got 0"),
    ("--batch-size 2048", "at most the 1437 training samples, got 2048"),
    ("--train-limit 0", "got 0"),
    ("--train-limit 32", "at most the 32 training samples, got 64"),
    ("--activation sigmoid", "--activation"),
    ("--threads 0", "greater than or equal to 1, got 0"),
    ("--out file", "file must be a folder, got a file"),
    ("--out file/below", "file/below"),
    ("--bogus 1", "--bogus"),
    ("--out", "--out"),
    ("surplus", "surplus"),
]
BAD = [
    *[(f"{command} {line}", named) for command in ("train", "compare") for line, named in BAD_ANYWHERE],
    *[(f"train --method {name}", "method must be one of") for name in ("newton", "SGD", "sgd,paper", "''")],
    *[(f"train --learning-rate {rate}", "learning rate must be positive") for rate in ("-0.1", "0", "nan", "inf")],
    ("train --learning-rate 1e300", "at most 1e+30, got 1e+300"),
    ("train --learning-rate fast", "--learning-rate"),
    ("train --seed a", "--seed"),
    ("train --seed 99999999999999999999", "seed must be in 0"),
    ("train --processes 4", "processes must go with --topology tree or server, got 4"),
    ("train --topology ring --processes 4", "--topology"),
    ("estimate --parameters -3", "greater than or equal to 1, got -3"),
    ("train --topology tree", "needs --processes, --replicas or torchrun"),
    ("train --topology tree --processes 3 --replicas 4", "replicas must be 3 with 3 processes and 0 servers, got 4"),
    ("train --topology tree --processes 3", "replicas must divide the batch size 64, got 3"),
    ("train --topology tree --processes 5 --servers 1", "servers must be 0 for topology tree, got 1"),
    ("train --device gpu", "device must be cpu, cuda or cuda:0 and so on, got 'gpu'"),
    ("train --device meta", "device must be cpu, cuda or cuda:0 and so on, got 'meta'"),
    ("train --device cuda:99", "GPUs of CUDA here, got 'cuda:99'"),
    ("compare --device tpu", "device must be cpu, cuda or cuda:0 and so on, got 'tpu'"),
    ("spectrum --checkpoint missing --device tpu", "device must be cpu, cuda or cuda:0 and so on, got 'tpu'"),
    ("train --topology tree --processes 4 --method sgd", "topology must be simulated for method sgd, got tree"),
    ("train --topology tree --processes 4 --method momentum", "must be simulated for method momentum, got tree"),
    ("train --topology server --processes 5 --method adam", "topology must be simulated for method adam, got server"),
    ("train --topology server --processes 1", "got 1 processes and 1 servers"),
    ("train --replicas 8 --servers 1", "servers must be 0 for topology simulated, got 1"),
    ("compare --methods sgd,newton", "method must be one of"),
    ("compare --methods ''", "method must be one of"),
    ("compare --seeds a", "seeds must be integers separated by commas, got 'a'"),
    ("compare --seeds 0,1.5", "seeds must be integers separated by commas, got '0,1.5'"),
    ("compare --seeds 0,-1", "seed must be in 0"),
    ("compare --replicas 2,3", "replicas must divide the batch size 64, got 3"),
    *[(f"compare --learning-rates 0.1,{rate}", "learning rate must be positive") for rate in ("-1", "nan")],
    ("compare --learning-rates a", "learning rates must be numbers separated by commas, got 'a'"),
    ("train --monitor 0", "--monitor"),
    ("train --monitor 5 --topology server --processes 3", "monitor must go with --topology simulated or tree, got ser"),
    ("train --tracker nope", "tracker must be one of jsonl, tensorboard, wandb, mlflow, trackio, got 'nope'"),
    ("train --tracker jsonl --tracker jsonl", "every tracker must be named once, got jsonl, jsonl"),
    ("spectrum", "--checkpoint"),
    ("spectrum --checkpoint nowhere", "nowhere: no such checkpoint"),
    ("spectrum --checkpoint empty-folder", "empty-folder: no such checkpoint"),
    ("spectrum --checkpoint garbage.npz", "garbage.npz: not a readable checkpoint"),
    ("spectrum --checkpoint file --top 0", "top must be >= 1, got 0"),
    ("spectrum --checkpoint file --replicas 0", "replicas must be >= 1, got 0"),
    ("spectrum --checkpoint file --sweeps 0", "sweeps must be >= 1, got 0"),
    ("spectrum --checkpoint file --tolerance 0", "tolerance must be in (0, 1), got 0.0"),
    ("spectrum --checkpoint file --dataset nope", "got 'nope'"),
    ("launch", "launch"),
    ("--bogus", "--bogus"),
]


@pytest.mark.parametrize(("line", "named"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_written(invoke, tmp_path, line, named):
    bad_files(tmp_path)
    before = contents(tmp_path)
    outcome = invoke(line)
    assert outcome.status == 2
    assert outcome.out == ""
    assert re.fullmatch(r"replica-newton: \S.*\n", outcome.err)
    assert named in outcome.err
    assert contents(tmp_path) == before


def test_folder_that_may_not_be_written_is_refused_before_training(invoke, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    # Not by chmod, which stops nobody who runs the tests as root.
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    for command in ("train", "compare"):
        outcome = invoke(f"{command} --out locked")
        assert outcome == (2, "", "replica-newton: locked must be writable\n")


def test_name_of_two_lines_is_shown_on_one(invoke, tmp_path):
    (tmp_path / "two\nlines").touch()
    assert invoke("train --out", "two\nlines").err == "replica-newton: two lines must be a folder, got a file\n"


def test_full_disk_is_reported_in_one_line(invoke, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    outcome = invoke("train --method sgd --epochs 1 --out run", *SMALL)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(r"replica-newton: .*No space left on device.*\n", outcome.err)


def test_process_of_its_own_ends_with_one_line_too(tmp_path):
    with start("train --dataset nope --out run") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"replica-newton: the data set must be .*, got 'nope'\n", err)
    assert contents(tmp_path) == {}


def test_without_a_command_the_help_is_shown(invoke):
    outcome = invoke("")
    assert (outcome.status, outcome.err) == (2, "")
    assert re.search(r"\btrain\b(.|\n)*\bcompare\b", outcome.out)


def test_version_is_that_of_the_package(invoke):
    assert invoke("--version") == (0, f"{replica_newton.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "train",
            {"--dataset", "--data", "--method", "--replicas", "--epochs", "--seed", "--out", "--resume"}
            | {"--monitor", "--tracker"},
        ),
        ("compare", {"--dataset", "--data", "--methods", "--replicas", "--epochs", "--seeds", "--out"}),
    ],
)
def test_help_mentions_every_option_with_an_explanation_and_an_example(invoke, name, options):
    outcome = invoke(f"{name} --help")
    assert outcome.status == 0
    parameters = typer.main.get_command(cli.app).commands[name].params
    assert options <= {option for parameter in parameters for option in parameter.opts}
    for parameter in parameters:
        assert re.search(rf"{parameter.opts[0]}\s", outcome.out)
        assert parameter.help
    words = " ".join(outcome.out.replace("│", " ").split())
    assert f"Examples: replica-newton {name} --method" in words
    assert all(method in words for method in METHODS)


def test_examples_of_the_help_are_commands_that_exist():
    for name, command in typer.main.get_command(cli.app).commands.items():
        lines = re.findall(r"\[bold\](.*?)\[/bold\]", command.epilog)
        assert len(lines) >= 2
        for line in lines:
            program, called, *arguments = shlex.split(line)
            assert (program, called) == ("replica-newton", name)
            command.make_context(name, arguments)


def test_train_writes_metrics_and_a_checkpoint(invoke, tmp_path):
    outcome = invoke("train --method paper --replicas 4 --epochs 2 --out a/run", *SMALL)
    assert (outcome.status, outcome.err) == (0, "")
    assert {path.name for path in (tmp_path / "a/run").iterdir()} == {"metrics.jsonl", "checkpoints"}
    lines = metrics(tmp_path / "a/run")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["gradient_evaluations"] for line in lines] == [128, 256]
    assert len(outcome.out.splitlines()) == 3
    assert outcome.out.splitlines()[-1] == "Metrics: a/run/metrics.jsonl"


def test_train_without_a_folder_names_it_after_the_run(invoke, tmp_path):
    assert invoke("train --method sgd --replicas 1 --epochs 1 --seed 3", *SMALL).status == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-sgd-M1-rate0.3-seed3"]


def test_train_does_not_overwrite_a_run_unless_it_resumes_it(invoke, tmp_path):
    line = "train --method momentum --replicas 1 --out run --epochs"
    invoke(f"{line} 1", *SMALL)
    before = contents(tmp_path)
    outcome = invoke(f"{line} 2", *SMALL)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(r"replica-newton: run holds a run already: .*--resume.*\n", outcome.err)
    assert contents(tmp_path) == before
    assert invoke(f"{line} 2 --resume", *SMALL).status == 0
    assert invoke("train --method momentum --replicas 1 --out whole --epochs 2 --resume", *SMALL).status == 0
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "named"), [("--seed 1", "seed 0, got 1"), ("--train-limit 96", "train limit 128, got 96")]
)
def test_run_is_not_resumed_with_other_settings(invoke, tmp_path, change, named):
    invoke("train --method sgd --epochs 1 --out run", *SMALL)
    before = contents(tmp_path)
    outcome = invoke("train --method sgd --epochs 2 --out run --resume", *SMALL, *shlex.split(change))
    assert outcome == (2, "", f"replica-newton: the saved run has {named}\n")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["train --resume --method sgd --replicas 1 --out run", "compare --out ."])
def test_damaged_checkpoint_is_named_in_one_line(invoke, tmp_path, command):
    folder = tmp_path / ("run" if command.startswith("train") else "runs/sgd-M1-rate0.3-seed0")
    manifest = folder / "checkpoints/checkpoint-000001/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(b"garbage")
    before = contents(tmp_path)
    outcome = invoke(command, *SMALL)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(r"replica-newton: .*: no whole checkpoint, checkpoint-000001 is damaged .*\n", outcome.err)
    assert contents(tmp_path) == before


def test_run_that_diverged_says_so(invoke, tmp_path):
    outcome = invoke("train --method sgd --learning-rate 1e20 --epochs 3 --out run", *SMALL)
    assert outcome.status == 0
    assert "NLL diverged" in outcome.out.splitlines()[-2]
    assert [line["train_nll"] for line in metrics(tmp_path / "run")] == [None]


def test_compare_writes_summary_figures_and_report_and_then_has_nothing_to_do(invoke, tmp_path):
    line = "compare --methods sgd,paper --replicas 2,4 --seeds 0,1 --epochs 1 --out cmp"
    first = invoke(line, *SMALL)
    assert (first.status, first.err) == (0, "")
    folder = tmp_path / "cmp"
    written = {"runs", "summary.json", "convergence.png", "convergence.svg", "report.html"}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "convergence.svg").read_text()
    assert shlex.join(["replica-newton", *shlex.split(line), *SMALL]) in (folder / "report.html").read_text()
    assert len(read_json((folder / "summary.json").read_text())["runs"]) == 6
    assert "[6/6] paper, M = 4" in first.out
    assert first.out.splitlines()[-1] == "Report: cmp/report.html"
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.rglob("process-0.pt")}
    second = invoke(line, *SMALL)
    assert second.status == 0
    assert "epoch 1/1" not in second.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("process-0.pt")} == checkpoints


def test_threads_are_set_for_torch(invoke, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert invoke("train --method sgd --epochs 1 --threads 2 --out run", *SMALL).status == 0
    assert invoke("compare --methods sgd --epochs 1 --out cmp", *SMALL).status == 0
    assert asked == [2, 1]


def test_ctrl_c_leaves_a_run_that_resumes_to_the_bits_of_an_uninterrupted_one(invoke, tmp_path):
    run = "train --method paper-common --replicas 4 --out"
    outcome = interrupted(f"{run} cut --epochs 2000", *SMALL)
    assert outcome.status == 130
    assert re.fullmatch(r"replica-newton: interrupted after epoch \d+ of 2000; go on by --resume\n", outcome.err)
    before = metrics(tmp_path / "cut")
    assert 1 <= len(before) < 2000
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"metrics.jsonl", "checkpoints"}
    epochs = len(before) + 2
    assert invoke(f"{run} cut --epochs {epochs} --resume", *SMALL).status == 0
    assert metrics(tmp_path / "cut")[: len(before)] == before
    assert invoke(f"{run} whole --epochs {epochs}", *SMALL).status == 0
    assert timeless(metrics(tmp_path / "cut")) == timeless(metrics(tmp_path / "whole"))


def test_ctrl_c_leaves_a_comparison_that_goes_on_where_it_was(invoke, tmp_path):
    line = "compare --methods sgd,paper --replicas 4 --out cmp --epochs"
    outcome = interrupted(f"{line} 1000", *SMALL)
    assert (outcome.status, outcome.err) == (130, "replica-newton: interrupted; the same command goes on\n")
    assert outcome.out.splitlines()[-1] == "Report: cmp/report.html"
    (sgd,) = read_json((tmp_path / "cmp/summary.json").read_text())["runs"]
    epochs = len(sgd["train_nll"]) + 1  # few enough to be waited for
    assert 2 <= epochs <= 1000
    assert invoke(f"{line} {epochs}", *SMALL).status == 0
    runs = read_json((tmp_path / "cmp/summary.json").read_text())["runs"]
    assert [(run["method"], len(run["train_nll"])) for run in runs] == [("sgd", epochs), ("paper", epochs)]
    assert [runs[0][name][:-1] for name in ("train_nll", "seconds")] == [sgd["train_nll"], sgd["seconds"]]


def test_train_with_a_monitor_and_a_tracker_writes_what_they_saw_and_goes_on(invoke, tmp_path):
    line = "train --method sgd --monitor 2 --tracker jsonl --resume --out run --epochs"
    assert invoke(f"{line} 1", *SMALL).status == 0
    assert invoke(f"{line} 2", *SMALL).status == 0
    seen = [read_json(text) for text in (tmp_path / "run/curvature.jsonl").read_text().splitlines()]
    assert [one["step"] for one in seen] == [1, 3, 5, 7]
    assert all(one["curvature/sharpness"] == max(one[f"curvature/eigenvalue_{i}"] for i in range(1, 9)) for one in seen)
    logged = [read_json(text) for text in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [one["step"] for one in logged if "loss" in one] == list(range(1, 9))
    assert [one["train_nll"] for one in logged if "train_nll" in one] == [
        m["train_nll"] for m in metrics(tmp_path / "run")
    ]
    page = (tmp_path / "run/curvature.html").read_text()
    assert "4 probes" in page
    assert page.count("<svg") == 1
    assert (tmp_path / "run/curvature.png").read_bytes()[1:4] == b"PNG"
    assert invoke("train --method sgd --out plain --epochs 2", *SMALL).status == 0
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(tmp_path / "plain"))


def test_spectrum_of_a_run_and_of_a_state_dict(invoke, tmp_path):
    assert invoke("train --method sgd --activation tanh --epochs 2 --out run", *SMALL).status == 0
    line = "spectrum --top 3 --replicas 4 --train-limit 96 --tolerance 0.05 --checkpoint"
    outcome = invoke(f"{line} run")
    assert (outcome.status, outcome.err) == (0, "")
    names = {"spectrum.json", "spectrum.npz", "spectrum.png", "spectrum.svg"}
    assert {path.name for path in (tmp_path / "run/spectrum").iterdir()} == names
    first = read_json((tmp_path / "run/spectrum/spectrum.json").read_text())
    assert first["converged"]
    assert len(first["eigenvalues"]) == 3
    assert outcome.out.splitlines()[1].startswith("sweep 1: 5 gradients, sharpness")
    assert outcome.out.splitlines()[-1] == "Files: run/spectrum/spectrum.json, .npz, .png, .svg"
    torch.save(load_run(tmp_path / "run").model, tmp_path / "network.pt")
    assert invoke(f"{line} network.pt --activation tanh --exact --out exact").status == 0
    second = read_json((tmp_path / "exact/spectrum.json").read_text())
    assert second["eigenvalues"] == pytest.approx(first["eigenvalues"], rel=5e-3)
    assert invoke("spectrum --checkpoint run --top 9999").err == (
        "replica-newton: top must be at most the 6758 parameters, got 9999\n"
    )


def test_spectrum_that_does_not_converge_says_so(invoke, tmp_path):
    torch.save(reference_convnet((1, 8, 8)).state_dict(), tmp_path / "network.pt")
    outcome = invoke("spectrum --checkpoint network.pt --top 5 --sweeps 1 --train-limit 32 --out found")
    assert outcome.status == 0
    assert "Not converged: 0 of 5 pairs are within the tolerance after 1 sweeps" in outcome.out


@pytest.mark.skipif(
    not (REAL_DATA_FOLDER and (Path(REAL_DATA_FOLDER) / "mnist.npz").exists()),
    reason=f"{DATA_FOLDER_VARIABLE} names no folder with mnist.npz",
)
def test_compare_on_real_mnist_learns(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, REAL_DATA_FOLDER)
    line = "compare --dataset mnist --methods sgd,paper --replicas 4 --epochs 1 --train-limit 2048 --batch-size 64"
    assert invoke(line, "--out", "mnist").status == 0
    summary = read_json((tmp_path / "mnist/summary.json").read_text())
    assert summary["task"]["parameters"] == 16_358
    assert [run["method"] for run in summary["runs"]] == ["sgd", "paper"]
    assert all(run["train_nll"][-1] < math.log(10) for run in summary["runs"])
    assert all(run["test_accuracy"][-1] > 0.1 for run in summary["runs"])
