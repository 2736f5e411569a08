"""What the command `replica-newton reproduce` needs: a study from its options."""

import shutil
from pathlib import Path

from replica_newton.reproduction.design import FULL, QUICK, TRAIN_SAMPLES
from replica_newton.reproduction.page import SUMMARY
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.study import Study
from replica_newton.training.datasets import load_dataset
from replica_newton.training.run import RunError, check_places

WORK = Path("runs")


def open_study(
    dataset: str | None, data: Path | None, *, quick: bool, out: Path | None, workers: int
) -> tuple[Study, Path]:
    """The study that the options ask for; nothing is written.

    Args:
        dataset: one data set; None for all.
        data: where they are.
        quick: whether to run little of everything.
        out: folder of the page; None for its default.
        workers: runs at a time.

    Returns:
        The study, and the folder of the page.

    Raises:
        RunError: if there is no such data set, the folder is a file, or the data are nowhere.
    """
    if dataset is not None and dataset not in TRAIN_SAMPLES:
        raise RunError(f"the data set must be one of {', '.join(TRAIN_SAMPLES)}, got {dataset!r}")
    name = "-".join(["reproduction", *(["quick"] if quick else []), *([dataset] if dataset else [])])
    folder = out or (WORK / name if quick or dataset else Path("docs"))
    check_places(folder, data)
    datasets = (dataset,) if dataset else tuple(TRAIN_SAMPLES)
    study = Study(
        plan=Plan(datasets, QUICK if quick else FULL),
        data=dict.fromkeys(datasets, data),
        summary=folder / "reproduction" / SUMMARY,
        checkpoints=WORK / name / "checkpoints",
        workers=workers,
    )
    return study, folder


def check_data(study: Study) -> None:
    """Fail before anything is run rather than in the middle.

    Args:
        study: whose data are looked at, if something is left to run.

    Raises:
        RunError: if a data set is not the whole one.
        DataError: if one cannot be found or read.
    """
    for name, path in study.data.items():
        samples = len(load_dataset(name, path).train_labels)
        if samples != TRAIN_SAMPLES[name]:
            raise RunError(f"{name} must have {TRAIN_SAMPLES[name]:,} training images, got {samples:,}")


def forget(study: Study) -> None:
    """Delete what has been run.

    Args:
        study: whose summary and checkpoints go.
    """
    study.summary.unlink(missing_ok=True)
    shutil.rmtree(study.checkpoints, ignore_errors=True)
