"""The commands `reproduce` and `benchmark`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from replica_newton.cli.root import app
from replica_newton.cli.shared import (
    PROCESSORS,
    DataOption,
    FreshOption,
    WorkersOption,
    command_line,
    end_interrupted,
    make_folder,
)


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
    workers: WorkersOption = PROCESSORS,
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
    make_folder(study.summary.parent)
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
        page = write_page(study.plan, results, folder, command_line())
        console.print(f"Page: {page}", highlight=False, soft_wrap=True)
    if interrupted:
        end_interrupted("; the same command goes on")


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
    workers: WorkersOption = PROCESSORS,
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
    make_folder(study.summary.parent)
    if fresh:
        study.summary.unlink(missing_ok=True)
    check(study)
    console = Console()
    with JobProgress(console, "benchmark", describe) as progress:
        try:
            records = study.run(progress)
        except KeyboardInterrupt:
            end_interrupted("; the same command goes on")
    page = write_page(study.plan, records, folder, command_line())
    console.print(f"Page: {page}", highlight=False, soft_wrap=True)
