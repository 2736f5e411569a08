"""`replica-newton train` over processes, started here or by two agents of torchrun: the numbers of one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from replica_newton.launch import Place
from replica_newton.training.command import device_named
from replica_newton.training.datasets import load_dataset
from replica_newton.training.loop import train
from replica_newton.training.run import CHECKPOINTS, METRICS, RunConfig, RunError, RunState

SAMPLES, BATCH = 256, 32
DATA = ["--train-limit", str(SAMPLES), "--batch-size", str(BATCH)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"]

pytestmark = pytest.mark.timeout(900)


class _Silent:
    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def start(folder: Path, *arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*launcher, "-m", "replica_newton", "train", *DATA, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to the tests that run at the same time."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port below 32,000 is free")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def check_parity(lines: list[dict[str, Any]], method: str, replicas: int) -> None:
    """That metrics are those of replicas simulated in this process, to the rounding of fp32."""
    config = RunConfig("digits", method, replicas=replicas, epochs=len(lines), batch_size=BATCH, train_limit=SAMPLES)
    alone = RunState(config)
    torch.set_num_threads(1)
    train(alone, load_dataset("digits", train_limit=SAMPLES), None, _Silent())
    for ours, theirs in zip(lines, alone.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours["train_nll"] == pytest.approx(theirs.train_nll, rel=1e-4)
        assert ours["test_accuracy"] == pytest.approx(theirs.test_accuracy, abs=0.004)  # one sample in 360
        assert (ours["gradient_evaluations"], ours["fallbacks"]) == (theirs.gradient_evaluations, theirs.fallbacks)


def test_servers_told_to_leave_go_on_to_the_numbers_of_one_process(tmp_path: Path) -> None:
    run = ["--topology", "server", "--processes", 3, "--method", "paper-common", "--out", "run", "--epochs"]
    with start(tmp_path, *run, 1000) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, "epoch 1/1000" in first) == (143, True)
    assert re.fullmatch(r"replica-newton: terminated in epoch \d+; go on by --resume\n", err)
    done = len(metrics(tmp_path / "run"))
    assert 1 <= done < 1000
    assert {path.name for path in (tmp_path / "run").iterdir()} == {METRICS, CHECKPOINTS}
    with start(tmp_path, *run, done + 1, "--resume") as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert len(re.findall(r"epoch \d+/", out)) == 1, "one process speaks, and of the epoch that was missing"
    assert out.splitlines()[-1] == "Metrics: run/metrics.jsonl"
    check_parity(metrics(tmp_path / "run"), "paper-common", 2)


def test_a_worker_beside_a_server_is_dropped_and_training_goes_on(tmp_path: Path) -> None:
    with start(tmp_path, "--topology", "server", "--processes", 5, "--out", "run", "--epochs", 8) as process:
        assert "epoch 1/8" in process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"rank 4 is lost, noticed in [a-z ]+: generation 1 goes on with 3 replicas", out)
    assert len(metrics(tmp_path / "run")) == 8


def test_two_agents_of_torchrun_train_as_one_process(tmp_path: Path) -> None:
    launcher = (*TORCHRUN, f"--rdzv-endpoint=localhost:{free_port()}", "--local-addr=127.0.0.1", "--max-restarts=0")
    agents = [
        start(tmp_path, "--topology", "tree", "--out", "run", "--epochs", 2, "--method", "paper", launcher=launcher)
        for _ in range(2)
    ]
    ended = [(*agent.communicate(timeout=400), agent.returncode) for agent in agents]
    assert [status for *_, status in ended] == [0, 0], ended
    out = "".join(out for out, *_ in ended)
    assert len(re.findall(r"epoch \d+/2", out)) == 2
    assert out.count("Metrics: run/metrics.jsonl") == 1
    manifest = json.loads(next((tmp_path / "run").glob("checkpoints/*2/manifest.json")).read_text())
    assert len(manifest["files"]) == 4
    check_parity(metrics(tmp_path / "run"), "paper", 4)


def test_what_processes_find_wrong_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "garbage.npz").write_bytes(b"garbage")
    data = ["--dataset", "mnist", "--data", "garbage.npz"]
    with start(tmp_path, "--topology", "tree", "--processes", 2, "--out", "run", *data) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"replica-newton: .*garbage\.npz.*\n", err)
    assert not (tmp_path / "run").exists()


def test_processes_of_a_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
    places = [Place.from_environment(environment | {"RANK": str(3 + n), "LOCAL_RANK": str(n)}) for n in range(3)]
    assert [device_named("cuda", place).index for place in (None, *places)] == [0, 0, 1, 0]
    assert [device_named("cuda:1", place).index for place in (None, *places)] == [1, 1, 1, 1]
    assert {device_named("cpu", place) for place in places} == {torch.device("cpu")}
    with pytest.raises(RunError, match="device must be cpu or one of the 2 GPUs of CUDA here, got 'cuda:2'"):
        device_named("cuda:2", None)
