"""The command `replica-newton`: train one network, or compare methods on one task."""

import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler

import replica_newton
from replica_newton.checkpoints import CheckpointError
from replica_newton.graceful_exit import GracefulExit
from replica_newton.launch import run_together
from replica_newton.report.figures import save_convergence
from replica_newton.report.html import write_report
from replica_newton.report.progress import TrainingProgress
from replica_newton.report.summary import headline
from replica_newton.report.tables import load_table, results_table
from replica_newton.report.watching import check_trackers, report_curvature, watching
from replica_newton.topology import Simulated, TopologyError
from replica_newton.topology.estimate import estimate as estimate_load
from replica_newton.topology.processes import Processes
from replica_newton.trackers import TRACKERS
from replica_newton.training.command import cast, joined
from replica_newton.training.comparison import Comparison, plan
from replica_newton.training.datasets import DATA_FOLDER_VARIABLE, DATASETS, DataError, load_dataset
from replica_newton.training.loop import train as train_run
from replica_newton.training.methods import METHODS
from replica_newton.training.run import MAX_SEED, METRICS, RunConfig, RunError, RunState, load_run

USAGE_ERROR = 2
INTERRUPTED = 130
Number = TypeVar("Number", int, float)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Activation(StrEnum):
    """Activations of the reference network."""

    relu = "relu"
    tanh = "tanh"


class Where(StrEnum):
    """Topologies."""

    simulated = "simulated"
    tree = "tree"
    server = "server"


DatasetOption = Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)} (digits are built in).")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help=f".npz file, or folder with IDX or CIFAR-10 binary files; by default the folder in {DATA_FOLDER_VARIABLE}."
    ),
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training set.")]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Samples in the global batch, split over the replicas; by default 256, for digits (a small set) 64."
    ),
]
ActivationOption = Annotated[Activation, typer.Option(help="Activation of the reference network.")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Threads of torch. Bits are the same for the same number; more than one helps an idle machine alone.",
    ),
]
_PROCESSORS = os.cpu_count() or 1
WorkersOption = Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each; by default one a processor.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Forget what has been run before.")]
LimitOption = Annotated[int | None, typer.Option(help="Train on this many samples only, the first ones.")]
_METHODS_HELP = "; ".join(f"[bold]{name}[/bold]: {method.description}" for name, method in METHODS.items())


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Second-order training from the differences between data-parallel replicas (Arnold and Wang, 2017)."""
    if show:
        Console().print(replica_newton.__version__, highlight=False)
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n[bold]replica-newton train --method paper --replicas 8[/bold]\n\n"
    "[bold]replica-newton train --dataset mnist --data mnist.npz --method adam --out runs/adam[/bold]\n\n"
    "[bold]replica-newton train --out runs/adam --dataset mnist --data mnist.npz --method adam --resume[/bold]\n\n"
    "[bold]replica-newton train --method paper --topology server --servers 2 --processes 6[/bold]\n\n"
    "[bold]replica-newton train --method sgd --monitor 10 --tracker jsonl[/bold]"
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
    where = "" if topology is Where.simulated else f"-{topology}"
    name = f"{dataset}-{method}-M{config.replicas}-rate{config.learning_rate:g}-seed{seed}{where}"
    folder = out or Path("runs") / name
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} must be a folder, got a file")
    if monitor is not None and topology is not Where.simulated:
        raise RunError(f"monitor must go with --topology simulated, got {topology}")
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
        loaded = load_dataset(dataset, data, train_limit=train_limit)
        config.check_fits(len(loaded.train_labels))
        _make_folder(folder)
        speaks = where_replicas_live.position == where_replicas_live.layout.first_worker
        console = Console(quiet=not speaks)
        completed = len(state.history) * (len(loaded.train_labels) // config.batch_size) + state.progress.steps
        trackers = tracker if tracker and speaks else []
        with (
            watching(folder, completed, monitor=monitor, trackers=trackers) as looking_on,
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
                    _interrupted(f"after epoch {len(state.history)} of {epochs}; go on by --resume")
                raise
            if graceful.leaving and speaks:
                sys.stderr.write(f"replica-newton: terminated in epoch {len(state.history) + 1}; go on by --resume\n")
        console.print(f"Metrics: {folder / METRICS}", highlight=False, soft_wrap=True)
        drawn = report_curvature(config, folder, _environment()) if monitor is not None else None
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
    loaded = load_dataset(dataset, data, train_limit=train_limit)
    folder = out or Path("runs") / f"compare-{dataset}"
    comparison = Comparison.open(folder, base, loaded)
    missing = comparison.missing(planned)
    _make_folder(folder)

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
        report = write_report(summary, folder, _environment())
        console.print(results_table(summary))
        console.print(headline(summary), highlight=False)
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    if interrupted:
        _interrupted("; the same command goes on")


@app.command(
    epilog="Examples:\n\n[bold]replica-newton reproduce --quick --dataset mnist --data mnist.npz[/bold]\n\n"
    "[bold]replica-newton reproduce --data FOLDER[/bold]   (mnist.npz and cifar10.npz, or their files, in FOLDER)"
)
def reproduce(
    dataset: Annotated[
        str | None, typer.Option(help="One data set, mnist or cifar10; by default both, as in the paper.")
    ] = None,
    data: DataOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look at everything in a few minutes.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the page; by default docs for the whole study, else one in runs/."),
    ] = None,
    workers: WorkersOption = _PROCESSORS,
    fresh: FreshOption = False,
) -> None:
    """Redo the paper's figures, every reading of it, and what explains them: some hours on two cores.

    Runs what is missing in OUT/reproduction/summary.json, and writes OUT/reproduction.md with its figures; also when it
    is interrupted while it runs the last figure's panels.
    """
    # Imported here: it loads matplotlib and much else that the other commands do without.
    from replica_newton.report.job_progress import JobProgress
    from replica_newton.reproduction.command import check_data, forget, open_study
    from replica_newton.reproduction.page import write_page
    from replica_newton.reproduction.progress import describe
    from replica_newton.reproduction.results import load_results

    study, folder = open_study(dataset, data, quick=quick, out=out, workers=workers)
    _make_folder(study.summary.parent)
    if fresh:
        forget(study)
    if study.missing(load_results(study.summary)):
        check_data(study)
    console, interrupted = Console(), False
    with JobProgress(console, "study", describe) as progress:
        try:
            results = study.run(progress)
        except KeyboardInterrupt:
            results, interrupted = load_results(study.summary), True
    if study.presentable(results):
        page = write_page(study.plan, results, folder, shlex.join(["replica-newton", *sys.argv[1:]]))
        console.print(f"Page: {page}", highlight=False, soft_wrap=True)
    if interrupted:
        _interrupted("; the same command goes on")


@app.command(
    epilog="Examples:\n\n[bold]replica-newton benchmark --quick --task digits-mlp,text-transformer[/bold]\n\n"
    "[bold]replica-newton benchmark --task mnist-relu --method sgd,adam,replica-newton --data mnist.npz[/bold]\n\n"
    "[bold]replica-newton benchmark --data FOLDER[/bold]   (mnist.npz and cifar10.npz, or their files, in FOLDER)"
)
def benchmark(
    task: Annotated[str | None, typer.Option(help="Tasks, separated by commas; by default all.")] = None,
    method: Annotated[str | None, typer.Option(help="Methods, separated by commas; by default all.")] = None,
    data: DataOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look at everything in about five minutes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="By default 3, and 10 of ours; with --quick 1.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the page; by default docs for the whole benchmark, else one in runs/."),
    ] = None,
    workers: WorkersOption = _PROCESSORS,
    fresh: FreshOption = False,
) -> None:
    """Compare optimizers on many tasks, each at the best of its rates: some hours on two cores.

    Runs what is missing in OUT/benchmarks/summary.json, and writes OUT/benchmarks.md with its figures. An unknown task
    or method is answered by the list of all. Needs the extra replica-newton[benchmark].
    """
    from replica_newton.benchmark.command import check, open_benchmark
    from replica_newton.benchmark.page import write_page
    from replica_newton.benchmark.study import describe
    from replica_newton.report.job_progress import JobProgress

    study, folder = open_benchmark(task, method, data, quick=quick, seeds=seeds, out=out, workers=workers)
    _make_folder(study.summary.parent)
    if fresh:
        study.summary.unlink(missing_ok=True)
    check(study)
    console = Console()
    with JobProgress(console, "benchmark", describe) as progress:
        try:
            records = study.run(progress)
        except KeyboardInterrupt:
            _interrupted("; the same command goes on")
    page = write_page(study.plan, records, folder, shlex.join(["replica-newton", *sys.argv[1:]]))
    console.print(f"Page: {page}", highlight=False, soft_wrap=True)


@app.command(
    epilog="Examples:\n\n[bold]replica-newton estimate --parameters 25000000 --replicas 8[/bold]\n\n"
    "[bold]replica-newton estimate --parameters 25000000 --replicas 8 --topology server --servers 2[/bold]"
)
def estimate(
    parameters: Annotated[int, typer.Option(min=1, help="Number of parameters N.")],
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas M.")] = 8,
    topology: Annotated[str, typer.Option(help="Topology: tree, server or simulated.")] = "tree",
    servers: Annotated[int, typer.Option(min=1, help="Number of servers, of a parameter server.")] = 1,
) -> None:
    """Say what a step sends and what a process keeps, before anything is run."""
    try:
        loads = estimate_load(topology, parameters, replicas, servers=servers)  # type: ignore[arg-type]
    except ValueError as error:
        raise RunError(str(error)) from error
    Console().print(load_table(loads, parameters, replicas))


@app.command(
    epilog="Examples:\n\n[bold]replica-newton spectrum --checkpoint runs/digits-paper-M8-rate0.05-seed0[/bold]\n\n"
    "[bold]replica-newton spectrum --checkpoint network.pt --dataset mnist --data mnist.npz --top 20 --density[/bold]"
)
def spectrum(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder of a run, its checkpoint, or a state_dict of the reference convnet.")
    ],
    dataset: DatasetOption = "digits",
    data: DataOption = None,
    top: Annotated[int, typer.Option(help="Eigenpairs of largest magnitude to find.")] = 20,
    replicas: Annotated[int, typer.Option(help="Simulated replicas M: directions probed in a sweep.")] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact Hessian-vector products, twice the price, in place of paired probes.")
    ] = False,
    density: Annotated[
        bool, typer.Option("--density", help="The density of all eigenvalues too, by stochastic Lanczos quadrature.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Residual ‖Hx − θx‖/|θ| at which a pair has converged.")] = 0.01,
    sweeps: Annotated[int, typer.Option(help="At most so many sweeps.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples evaluated at a time; changes memory, not results.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random directions.")] = 0,
    activation: Annotated[
        Activation, typer.Option(help="Activation of a network in a state_dict; a run knows its own.")
    ] = Activation.relu,
    train_limit: Annotated[
        int | None, typer.Option(help="Use this many training samples only, the first ones.")
    ] = None,
    threads: ThreadsOption = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the files; by default spectrum, beside it.")] = None,
) -> None:
    """Find the top Hessian eigenpairs of a saved network over its training set, at one gradient a direction.

    Writes spectrum.json, spectrum.npz (eigenvalues, residuals, eigenvectors), spectrum.png and spectrum.svg.
    """
    # Imported here: it loads matplotlib.
    from replica_newton.spectrum.command import SpectrumOptions, compute_and_write
    from replica_newton.training.network import load_network

    options = SpectrumOptions(top, replicas, exact, density, tolerance, sweeps, batch_size, seed)
    torch.set_num_threads(threads)
    loaded = load_dataset(dataset, data, train_limit=train_limit)
    model = load_network(checkpoint, loaded, activation=activation.value)
    options.check_fits(model)
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "spectrum"
    _make_folder(folder)
    try:
        compute_and_write(model, loaded, options, folder, Console(), checkpoint)
    except KeyboardInterrupt:
        _interrupted("before the spectrum was found; nothing was written")


def main() -> None:
    """Entry point: bad input gets one line on standard error and exit status 2."""
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        message = error.format_message()
        if not message:  # no command at all: the help has been shown
            sys.exit(USAGE_ERROR)
        _fail(message)
    except (RunError, DataError, CheckpointError, TopologyError, OSError) as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"replica-newton: {line}\n")
    sys.exit(USAGE_ERROR)


def _interrupted(what: str) -> NoReturn:
    sys.stderr.write(f"replica-newton: interrupted {what}\n".replace(" ;", ";"))
    raise typer.Exit(INTERRUPTED)


def _batch_size(dataset: str) -> int:
    return 64 if dataset == "digits" else 256


def _make_folder(folder: Path) -> None:
    """Fail before training rather than after its first epoch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{folder} must be writable")


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


def _environment() -> dict[str, str]:
    return {
        "replica-newton": replica_newton.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "command": shlex.join(["replica-newton", *sys.argv[1:]]),
    }
