"""What the terminal says of a finished run or measurement of the study."""

from typing import Any

from replica_newton.report.formats import format_nll
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.study import Task


def describe(task: Task, outcome: Any) -> str:  # noqa: ARG001
    """Its outcome in a few words.

    Args:
        task: what is finished.
        outcome: a run's `Record`, or what was measured.

    Returns:
        For example "NLL 0.05 after 5 epochs".
    """
    if not isinstance(outcome, Record):
        return "measured"
    if outcome.diverged:
        return f"diverged in epoch {len(outcome.train_nll)}"
    return f"NLL {format_nll(outcome.train_nll[-1])} after {len(outcome.train_nll)} epochs"
