"""Made-up results: what a run reaches is a function of its settings."""

import math
from collections.abc import Callable

import pytest

from replica_newton.benchmark.plan import Plan
from replica_newton.benchmark.results import Records
from replica_newton.benchmark.run import Record, Run

Final = Callable[[Run], float]


def record_of(run: Run, final: float) -> Record:
    """A record with a final NLL; infinite stands for a run that diverged."""
    value = final if math.isfinite(final) else math.nan
    curve = tuple((100 * (i + 1), 0.1 * (i + 1), value * (5 - i)) for i in range(5))
    return Record(run, f"data of {run.task}", value, value, 1.1 * value, curve, 500, 50, 0.5)


def complete(plan: Plan, final: Final) -> tuple[Records, list[Run]]:
    """All records that a plan asks for, and the runs in the order in which they were asked for."""
    records: Records = {}
    order: list[Run] = []
    while True:
        missing = [run for run in plan.runs(records) if run not in records and not run.tentative]
        if not missing:
            return records, order
        records[missing[0]] = record_of(missing[0], final(missing[0]))
        order.append(missing[0])


@pytest.fixture
def completed() -> Callable[[Plan, Final], tuple[Records, list[Run]]]:
    """`complete`, for tests, which cannot import this file."""
    return complete
