"""What the command `replica-newton benchmark` needs: a benchmark from its options."""

from dataclasses import replace
from pathlib import Path

from replica_newton.benchmark.optimizers import METHODS, check_methods
from replica_newton.benchmark.page import PLACE, SUMMARY
from replica_newton.benchmark.plan import FULL, QUICK, Plan
from replica_newton.benchmark.results import check_data, load_records
from replica_newton.benchmark.study import Benchmark
from replica_newton.benchmark.tasks import TASKS
from replica_newton.training.run import RunError, check_places

WORK = Path("runs")


def open_benchmark(
    tasks: str | None,
    methods: str | None,
    data: Path | None,
    *,
    quick: bool,
    seeds: int | None,
    out: Path | None,
    workers: int,
) -> tuple[Benchmark, Path]:
    """The benchmark that the options ask for; nothing is written.

    Args:
        tasks: keys of `TASKS`, separated by commas; None for all.
        methods: keys of `METHODS`, separated by commas; None for all.
        data: where the images are.
        quick: whether to run little of everything.
        seeds: how many, of our default too; None for the default.
        out: folder of the page; None for its default.
        workers: runs at a time.

    Returns:
        The benchmark, and the folder of the page.

    Raises:
        RunError: if there is no such task or method, a package is missing, the folder is a file, or the data are
            nowhere.
    """
    chosen_tasks, chosen_methods = _names(tasks, list(TASKS)), _names(methods, list(METHODS))
    for name in chosen_tasks:
        if name not in TASKS:
            raise RunError(f"the task must be one of {', '.join(TASKS)}, got {name!r}")
    check_methods(chosen_methods)
    # In their own order, so that the page does not depend on how they were asked for.
    plan = Plan(
        tuple(name for name in TASKS if name in chosen_tasks),
        tuple(name for name in METHODS if name in chosen_methods),
        QUICK if quick else FULL,
    )
    if not plan.pairs():
        raise RunError(f"{', '.join(plan.methods)} must apply to one of {', '.join(plan.tasks)}: larger batches needed")
    if seeds is not None:
        plan = replace(plan, extent=replace(plan.extent, seeds=seeds, own_seeds=seeds))
    whole = tasks is None and methods is None and not quick
    folder = out or (Path("docs") if whole else WORK / ("benchmark-quick" if quick else "benchmark"))
    check_places(folder, data)
    return Benchmark(plan, data, folder / PLACE / SUMMARY, workers), folder


def check(benchmark: Benchmark) -> None:
    """Fail before anything is run rather than in the middle.

    Args:
        benchmark: whose data are looked at, if something of their task is left to run.

    Raises:
        RunError: if there are runs on other data.
        DataError: if data cannot be found or read.
    """
    records = load_records(benchmark.summary)
    needed = {run.task for run in benchmark.missing(records)}
    check_data(records, {task: TASKS[task].read(benchmark.data).description for task in needed})


def _names(text: str | None, everything: list[str]) -> list[str]:
    return everything if text is None else [name.strip() for name in text.split(",")]
