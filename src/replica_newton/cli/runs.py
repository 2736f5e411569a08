"""The commands `train` and `compare`."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler

from replica_newton.cli.root import app
from replica_newton.cli.shared import (
    USAGE_ERROR,
    Activation,
    ActivationOption,
    BatchOption,
    DataOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    LimitOption,
    ThreadsOption,
    end_interrupted,
    environment,
    make_folder,
)
from replica_newton.graceful_exit import GracefulExit
from replica_newton.launch import run_together
from replica_newton.report.figures import save_convergence
from replica_newton.report.html import write_report
from replica_newton.report.progress import TrainingProgress
from replica_newton.report.summary import headline
from replica_newton.report.tables import results_table
from replica_newton.report.watching import check_trackers, report_curvature, watching
from replica_newton.topology import Simulated
from replica_newton.topology.processes import Processes
from replica_newton.trackers import TRACKERS
from replica_newton.training.command import cast, device_named, joined
from replica_newton.training.comparison import Comparison, plan
from replica_newton.training.datasets import load_dataset
from replica_newton.training.loop import train as train_run
from replica_newton.training.methods import METHODS
from replica_newton.training.run import METRICS, RunConfig, RunError, RunState, check_places, load_run

Number = TypeVar("Number", int, float)


class Where(StrEnum):
    """Topologies."""

    simulated = "simulated"
    tree = "tree"
    server = "server"


_METHODS_HELP = "; ".join(f"[bold]{name}[/bold]: {method.description}" for name, method in METHODS.items())


@app.command(
    epilog="Examples:\n\n[bold]replica-newton train --method paper --replicas 8[/bold]\n\n"
    "[bold]replica-newton train --dataset mnist --data mnist.npz --method adam --out runs/adam[/bold]\n\n"
    "[bold]replica-newton train --out runs/adam --dataset mnist --data mnist.npz --method adam --resume[/bold]\n\n"
    "[bold]replica-newton train --method paper --topology server --servers 2 --processes 6[/bold]\n\n"
    "[bold]replica-newton train --method sgd --monitor 10 --tracker jsonl[/bold]\n\n"
    "[bold]replica-newton train --dataset cifar10 --data cifar10.npz --method metric --device cuda[/bold]"
)
def train(
    method: Annotated[str, typer.Option(help=f"Method. {_METHODS_HELP}.")] = "paper",
    replicas: Annotated[
        int | None,
        typer.Option(help="Number of replicas M; divides the batch size. By default 8, or 1 where M changes nothing."),
    ] = None,
    dataset: DatasetOption = "digits",
    data: DataOption = None,
    epochs: EpochsOption = 10,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate; by default the method's own.")] = None,
    batch_size: BatchOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial parameters and the order of the data.")] = 0,
    activation: ActivationOption = Activation.relu,
    train_limit: LimitOption = None,
    threads: ThreadsOption = 1,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, or cuda:1 for one of several GPUs; of several processes each takes one in turn."),
    ] = "cpu",
    topology: Annotated[
        Where, typer.Option(help="Where the replicas live: in this process (simulated), or in one each (tree, server).")
    ] = Where.simulated,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes to start, M replicas and the servers; torchrun sets it for those it starts."
        ),
    ] = None,
    servers: Annotated[
        int | None, typer.Option(min=1, help="Servers among the processes, of --topology server; by default 1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default in runs/, named after it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, or start it.")] = False,
    monitor: Annotated[
        int | None,
        typer.Option(min=1, help="Probe the curvature every so many steps: a live panel, and OUT/curvature.jsonl."),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help=f"Log every step to {', '.join(TRACKERS)}; may be given several times."),
    ] = None,
) -> None:
    """Train the reference convnet, saving metrics and a checkpoint after every epoch, and at SIGTERM."""
    default = 8 if method in METHODS and METHODS[method].parts_replicas else 1
    who = cast(topology.value, default, replicas=replicas, processes=processes, servers=servers)
    config = RunConfig(
        dataset=dataset,
        method=method,
        replicas=who.replicas,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=_batch_size(dataset) if batch_size is None else batch_size,
        seed=seed,
        activation=activation.value,
        train_limit=train_limit,
        topology=topology.value,
        servers=who.servers,
    )
    torch.set_num_threads(threads)
    own_device = device_named(device, who.place)
    where = "" if topology is Where.simulated else f"-{topology}"
    name = f"{dataset}-{method}-M{config.replicas}-rate{config.learning_rate:g}-seed{seed}{where}"
    folder = out or Path("runs") / name
    check_places(folder)
    if monitor is not None and topology is Where.server:
        raise RunError(f"monitor must go with --topology simulated or tree, got {topology}")
    check_trackers(tracker or [])

    def saved(of: Simulated | Processes | None = None) -> RunState:
        state = load_run(folder, of)
        if state is not None and not resume:
            raise RunError(
                f"{folder} holds a run already: go on with it by --resume, or choose another folder by --out"
            )
        return RunState(config) if state is None else state.continued(config)

    if who.launches:
        saved()
        command = [sys.executable, "-m", "replica_newton", *sys.argv[1:]]
        workers = range(who.servers, config.processes) if who.servers else ()
        ended = run_together(command, config.processes, expendable=workers)
        if ended.message:
            sys.stderr.write(ended.message + "\n")
        raise typer.Exit(ended.status if ended.status >= 0 else USAGE_ERROR)
    with joined(config, who.place) as where_replicas_live:
        state = saved(where_replicas_live)
        loaded = load_dataset(dataset, data, train_limit=train_limit).to(own_device)
        config.check_fits(len(loaded.train_labels))
        make_folder(folder)
        speaks = where_replicas_live.position == where_replicas_live.layout.first_worker
        console = Console(quiet=not speaks)
        completed = len(state.history) * (len(loaded.train_labels) // config.batch_size) + state.progress.steps
        trackers = tracker if tracker and speaks else []
        with (
            watching(folder, completed, monitor=monitor, trackers=trackers, speaks=speaks) as looking_on,
            GracefulExit() as graceful,
            _progress(console, looking_on.panel) as progress,
        ):
            try:
                train_run(
                    state,
                    loaded,
                    folder,
                    looking_on.observer(progress),
                    looking_on.watch,
                    topology=where_replicas_live,
                    leave=graceful.agreed,
                )
            except KeyboardInterrupt:
                if speaks:
                    end_interrupted(f"after epoch {len(state.history)} of {epochs}; go on by --resume")
                raise
            if graceful.leaving and speaks:
                sys.stderr.write(f"replica-newton: terminated in epoch {len(state.history) + 1}; go on by --resume\n")
        console.print(f"Metrics: {folder / METRICS}", highlight=False, soft_wrap=True)
        drawn = report_curvature(config, folder, environment()) if monitor is not None and speaks else None
        if drawn is not None:
            console.print(f"Curvature: {drawn}", highlight=False, soft_wrap=True)


@app.command(
    epilog="Examples:\n\n[bold]replica-newton compare --methods sgd,paper --replicas 1,2,4,8[/bold]\n\n"
    "[bold]replica-newton compare --dataset mnist --data mnist.npz --methods sgd,momentum,adam,paper "
    "--replicas 2,4,8 --learning-rates 0.01,0.03,0.1,0.3 --seeds 0,1,2 --epochs 5 --out runs/mnist[/bold]"
)
def compare(
    methods: Annotated[str, typer.Option(help=f"Methods, separated by commas. {_METHODS_HELP}.")] = "sgd,paper",
    replicas: Annotated[
        str, typer.Option(help="Numbers of replicas M, for the methods whose replicas stand apart.")
    ] = "1,2,4,8",
    dataset: DatasetOption = "digits",
    data: DataOption = None,
    epochs: EpochsOption = 10,
    seeds: Annotated[str, typer.Option(help="Seeds; figure and table show medians over them.")] = "0",
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Rates that every method is run with, its best is shown; by default each method's own."),
    ] = None,
    batch_size: BatchOption = None,
    activation: ActivationOption = Activation.relu,
    train_limit: LimitOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; what it holds already is kept and shown too.")
    ] = None,
) -> None:
    """Train every method with every M, rate and seed, and draw them side by side.

    Runs what is missing in OUT and writes summary.json, convergence.png, convergence.svg and report.html there.
    """
    base = RunConfig(
        dataset=dataset,
        method="sgd",
        epochs=epochs,
        batch_size=_batch_size(dataset) if batch_size is None else batch_size,
        activation=activation.value,
        train_limit=train_limit,
    )
    planned = plan(
        base,
        [name.strip() for name in methods.split(",")],
        _numbers("replicas", replicas, int),
        [None] if learning_rates is None else _numbers("learning rates", learning_rates, float),
        _numbers("seeds", seeds, int),
    )
    torch.set_num_threads(threads)
    own_device = device_named(device)
    loaded = load_dataset(dataset, data, train_limit=train_limit).to(own_device)
    folder = out or Path("runs") / f"compare-{dataset}"
    comparison = Comparison.open(folder, base, loaded)
    missing = comparison.missing(planned)
    make_folder(folder)

    console = Console()
    with _progress(console) as progress:
        progress.set_total_runs(len(planned), len(planned) - missing)
        try:
            comparison.run(planned, loaded, progress)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    summary = comparison.write_summary()
    if any(run["train_nll"] for run in summary["runs"]):
        save_convergence(summary, folder)
        report = write_report(summary, folder, environment())
        console.print(results_table(summary))
        console.print(headline(summary), highlight=False)
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    if interrupted:
        end_interrupted("; the same command goes on")


def _batch_size(dataset: str) -> int:
    return 64 if dataset == "digits" else 256


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise RunError(f"{name} must be {what} separated by commas, got {text!r}") from None


@contextmanager
def _progress(console: Console, below: RenderableType | None = None) -> Iterator[TrainingProgress]:
    """Live display, above which the library's log lines appear, each once."""
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    said: set[str] = set()
    handler.addFilter(lambda record: not (record.getMessage() in said or said.add(record.getMessage())))  # type: ignore[func-returns-value]
    logger = logging.getLogger("replica_newton")
    logger.addHandler(handler)
    try:
        with TrainingProgress(console, below=below) as progress:
            yield progress
    finally:
        logger.removeHandler(handler)
