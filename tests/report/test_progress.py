import io
import time

import pytest
from rich.console import Console

from replica_newton.report.progress import TrainingProgress


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=20, color_system=None, _environ={})


def train(progress, *, label="paper, M = 4", epochs=2, steps=3):
    progress.start_run(label, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            progress.step(loss=0.25, sharpness=12.5, learning_rate=0.05)
        progress.finish_epoch(epoch=epoch, train_nll=0.5 / epoch, test_accuracy=0.9)
    progress.finish_run()


def now(progress, width=80):
    """What the terminal shows at this moment."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(progress._render())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_pipe_gets_one_line_an_epoch(pipe):
    with TrainingProgress(pipe) as progress:
        train(progress, label="[red]paper[/red] :smile:")
    assert pipe.file.getvalue().splitlines() == [
        "[red]paper[/red] :smile:, epoch 1/2: NLL 0.500, test 90.0 %, 0:00",
        "[red]paper[/red] :smile:, epoch 2/2: NLL 0.250, test 90.0 %, 0:00",
    ]


def test_pipe_lines_count_the_runs(pipe):
    with TrainingProgress(pipe) as progress:
        progress.set_total_runs(5, completed=2)
        train(progress, epochs=1)
        train(progress, epochs=1)
    assert [line.split()[0] for line in pipe.file.getvalue().splitlines()] == ["[3/5]", "[4/5]"]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_nothing_is_printed_when_disabled(kind, request):
    console = request.getfixturevalue(kind)
    with TrainingProgress(console, enabled=False) as progress:
        progress.set_total_runs(1)
        train(progress)
    assert console.file.getvalue() == ""


def test_terminal_keeps_one_line_a_run(terminal):
    with TrainingProgress(terminal) as progress:
        train(progress)
        train(progress, label="SGD")
    text = terminal.file.getvalue()
    assert text.count("paper, M = 4, epoch 2/2: NLL 0.250, test 90.0 %") == 1
    assert text.count("SGD, epoch 2/2: NLL 0.250") == 1
    assert "epoch 1/2: NLL 0.500, test 90.0 %, 0:00" not in text


def test_display_during_a_run(terminal):
    progress = TrainingProgress(terminal)
    progress.set_total_runs(4, completed=1)
    progress.start_run("paper, M = 4, seed 0", epochs=2, steps_per_epoch=4)
    assert "loss –   sharpness –   rate –" in now(progress)[2]
    for _ in range(3):
        progress.step(loss=0.25, sharpness=None, learning_rate=None)
    assert "loss 0.25   sharpness –   rate –" in now(progress)[2]
    progress.step(loss=0.125, sharpness=12.34567, learning_rate=0.05)
    progress.finish_epoch(epoch=1, train_nll=0.5, test_accuracy=0.9)
    label, bar, numbers, epoch, runs = now(progress)
    assert label == "paper, M = 4, seed 0"
    assert bar.split()[:2] == ["epoch", "2/2"]
    assert "50%" in bar
    assert numbers.strip() == "loss 0.125   sharpness 12.35   rate 0.05"
    assert epoch.strip() == "epoch 1/2: NLL 0.500, test 90.0 %"
    # One run finished and half of the next: 1.5 of 4.
    assert runs.split()[:2] == ["runs", "1/4"]
    assert "38%" in runs


def test_time_left_counts_only_the_steps_since_the_start(terminal, monkeypatch):
    progress = TrainingProgress(terminal)
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("replica_newton.report.progress.time.monotonic", lambda: next(clock))
    progress.start_run("paper", epochs=10, steps_per_epoch=10, completed_steps=80)
    for _ in range(5):
        progress.step(loss=0.25, sharpness=None, learning_rate=None)
    # 5 steps took 30 s, 15 are left.
    bar = now(progress)[1]
    assert bar.endswith("1:30 left")
    assert bar.split()[:2] == ["epoch", "9/10"]
    assert "85%" in bar


def test_fits_a_narrow_terminal(terminal):
    progress = TrainingProgress(terminal)
    progress.set_total_runs(100)
    progress.start_run("a label that is much longer than the terminal is wide " * 2, epochs=100, steps_per_epoch=1)
    assert len(now(progress, width=60)) == 4


def test_display_ends_when_training_fails(terminal):
    progress = TrainingProgress(terminal)

    def fail():
        with progress:
            assert progress._live.is_started
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not progress._live.is_started


def test_a_step_costs_less_than_20_microseconds(terminal):
    with TrainingProgress(terminal) as progress:
        progress.start_run("paper", epochs=1, steps_per_epoch=20_000)
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(2_000):
                progress.step(loss=0.25, sharpness=12.5, learning_rate=0.05)
            best = min(best, (time.perf_counter() - start) / 2_000)
    assert best < 20e-6
