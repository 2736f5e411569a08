"""What the benchmark says: every number of its page, by name, from the records alone."""

import itertools
import math
from collections.abc import Iterable
from statistics import median, median_low
from typing import Any

from replica_newton.benchmark.optimizers import LARGE_BATCH, METHODS, OURS
from replica_newton.benchmark.plan import Entry, Plan
from replica_newton.benchmark.results import Records
from replica_newton.benchmark.run import Record
from replica_newton.benchmark.tasks import TASKS
from replica_newton.training.run import finite_or_none

OPPONENTS = {"first_order": "the best first-order method", "all": "the best of all peers"}
BARS = (
    # Opponents, at most so many times their loss, on so large a share of the tasks.
    ("first_order", 0.95, 2 / 3),
    ("first_order", 1.05, 1.0),
    ("all", 1.05, 2 / 3),
    ("all", 1.15, 1.0),
)
REACHED = 0.67
"""Share of its evaluations within which best-tuned Adam's final loss is to be reached, where batches are large."""
IDENTITY, MOMENTUM = "identity", "momentum"
REPLICAS, NEUTRAL = (1, 2, 4, 8), 1.05
"""Numbers of replicas of the rule that takes curvature from them, and the loss over that of half as many, at most."""
Entries = dict[str, dict[str, Entry]]


def entries(plan: Plan, records: Records) -> Entries:
    """Every method on every task.

    Args:
        plan: of the benchmark.
        records: all of its runs.

    Returns:
        By task, by method.

    Raises:
        ValueError: if a run is missing.
    """
    found: Entries = {task: {} for task in plan.tasks}
    for task, method in plan.pairs():
        entry = plan.entry(records, task, method)
        if entry is None:
            raise ValueError(f"the benchmark must be finished: {method} on {task} is not")
        found[task][method] = entry
    for run in plan.own_runs():
        if run not in records:
            raise ValueError(f"the benchmark must be finished: {OURS} on {run.task} with seed {run.seed} is not")
    return found


def best_records(plan: Plan, records: Records, entry: Entry) -> list[Record]:
    """The runs of a method at its best rate.

    Args:
        plan: of the benchmark.
        records: all of its runs.
        entry: the method on a task.

    Returns:
        One record a seed.
    """
    runs = [plan.run(entry.task, entry.method, entry.rate, seed) for seed in range(plan.extent.seeds)]
    return [records[run] for run in runs]


def median_record(plan: Plan, records: Records, entry: Entry) -> Record:
    """The run of the median seed at a method's best rate.

    Args:
        plan: of the benchmark.
        records: all of its runs.
        entry: the method on a task.

    Returns:
        The record whose final NLL is the (lower) median.
    """
    finals = entry.finals[entry.rate]
    return best_records(plan, records, entry)[finals.index(median_low(finals))]


def findings(plan: Plan, records: Records) -> dict[str, Any]:
    """Everything that follows from the runs, as JSON has it; None stands for what diverged.

    Args:
        plan: of the benchmark.
        records: all of its runs.

    Returns:
        Sections "extent", "tasks" (by name: what it is and a row a method), "ratios" (by task, by opponents), "bars",
        "reached" (by task of large batches: how soon ours has Adam's final NLL),
        "identity" (ours without a metric over best-tuned SGD with momentum, by task),
        "doublings" (twice the replicas over as many, for the rule that takes curvature from them),
        "safety" (how many runs of ours, and how many diverged) and "ablations" (by method, by task: its NLL over ours).

    Raises:
        ValueError: if a run is missing.
    """
    found = entries(plan, records)
    used = [records[run] for run in {plan_run for plan_run in plan.runs(records) if plan_run in records}]
    ratios = {
        task: {opponents: _ratio(rows, opponents) for opponents in OPPONENTS}
        for task, rows in found.items()
        if OURS in rows
    }
    return {
        "extent": {
            "seeds": plan.extent.seeds,
            "quick": plan.extent.quick,
            "runs": len(used),
            "diverged": sum(record.diverged for record in used),
            "processor_hours": sum(record.seconds for record in used) / 3600.0,
        },
        "tasks": {task: _task(plan, records, task, rows) for task, rows in found.items()},
        "ratios": ratios,
        "bars": [_bar(ratios.values(), *bar) for bar in BARS] if ratios else [],
        "reached": {
            task: _reached(plan, records, rows)
            for task, rows in found.items()
            if {OURS, "adam"} <= rows.keys() and TASKS[task].batch_size >= LARGE_BATCH
        },
        "identity": _identity(found),
        "doublings": _doublings(found),
        "safety": _safety(plan, records),
        "ablations": _ablations(found),
    }


def _task(plan: Plan, records: Records, task: str, rows: dict[str, Entry]) -> dict[str, Any]:
    found = TASKS[task]
    any_record = median_record(plan, records, next(iter(rows.values()))) if rows else None
    return {
        "label": found.label,
        "network": found.network,
        "data": any_record.data if any_record else found.data,
        "batch_size": found.batch_size,
        "epochs": found.epochs,
        "processor_hours": sum(record.seconds for run, record in records.items() if run.task == task) / 3600.0,
        "methods": {method: _row(plan, records, entry) for method, entry in rows.items()},
    }


def _row(plan: Plan, records: Records, entry: Entry) -> dict[str, Any]:
    method, runs = METHODS[entry.method], best_records(plan, records, entry)
    finals = entry.finals[entry.rate]

    def middle(name: str) -> float | None:
        values = [getattr(record, name) for record in runs]
        found: float | None = finite_or_none(median(math.inf if math.isnan(value) else value for value in values))
        return found

    return {
        "label": method.label,
        "family": method.family,
        "rate": entry.rate,
        "rates": [entry.rates[0], entry.rates[-1]] if method.tuned else None,
        "at_the_edge": entry.at_the_edge,
        "final_nll": finite_or_none(median(finals)),
        "lowest": finite_or_none(min(finals)),
        "highest": finite_or_none(max(finals)),
        "diverged": sum(record.diverged for record in runs),
        **{name: middle(name) for name in ("last_epoch_nll", "test_nll", "evaluations", "steps", "seconds")},
    }


def _ratio(rows: dict[str, Entry], opponents: str) -> dict[str, Any] | None:
    """Ours over the best opponent: medians, and seed by seed; None where there is no opponent."""
    families = {"first-order"} if opponents == "first_order" else {"first-order", "second-order"}
    peers = [entry for method, entry in rows.items() if METHODS[method].family in families]
    if not peers:
        return None
    best = min(peers, key=lambda entry: entry.final)
    ours, theirs = (entry.finals[entry.rate] for entry in (rows[OURS], best))
    paired = [_over(one, other) for one, other in zip(ours, theirs, strict=True)]
    return {
        "opponent": METHODS[best.method].label,
        "ratio": finite_or_none(_over(median(ours), median(theirs))),
        "lowest": finite_or_none(min(paired)),
        "highest": finite_or_none(max(paired)),
        "seeds_lower": sum(value < 1.0 for value in paired),
        "seeds": len(paired),
    }


def _reached(plan: Plan, records: Records, rows: dict[str, Entry]) -> dict[str, Any]:
    """How soon our batches' losses are as low as the final NLL of Adam, both of the median seed.

    Returns:
        "share", gradient evaluations until then over all that Adam spends, None if they never are; "limit"; "met". The
        share is an upper bound: losses are those before the average is taken, for every twentieth of the budget.
    """
    ours, adam = (median_record(plan, records, rows[method]) for method in (OURS, "adam"))
    shares = [spent / adam.evaluations for spent, _, nll in ours.curve if nll <= adam.final_nll]
    share = min(shares, default=None)
    return {"share": share, "limit": REACHED, "met": share is not None and share <= REACHED}


def _identity(found: Entries) -> dict[str, Any]:
    """The step without a metric beside best-tuned SGD with momentum."""
    ratios = {
        task: _over(rows[IDENTITY].final, rows[MOMENTUM].final)
        for task, rows in found.items()
        if {IDENTITY, MOMENTUM} <= rows.keys()
    }
    within = sum(ratio <= 1.0 for ratio in ratios.values())
    return {
        "ratios": {task: finite_or_none(ratio) for task, ratio in ratios.items()},
        "within": within,
        "met": within == len(ratios),
    }


def _doublings(found: Entries) -> list[dict[str, Any]]:
    """From M replicas to twice as many at equal evaluations: on how many tasks the loss stays or falls."""
    doublings = []
    for few, many in itertools.pairwise(REPLICAS):
        ratios = [
            _over(rows[f"M={many}"].final, rows[f"M={few}"].final)
            for rows in found.values()
            if {f"M={few}", f"M={many}"} <= rows.keys()
        ]
        if ratios:
            within = sum(ratio <= NEUTRAL for ratio in ratios)
            counts = {"from": few, "to": many, "limit": NEUTRAL, "within": within, "tasks": len(ratios)}
            doublings.append(counts | {"worst": finite_or_none(max(ratios)), "met": within == len(ratios)})
    return doublings


def _safety(plan: Plan, records: Records) -> dict[str, int]:
    """Runs of our default with all seeds."""
    runs = plan.own_runs()
    diverged = sum(records[run].diverged for run in runs)
    return {"runs": len(runs), "seeds": len({run.seed for run in runs}), "diverged": diverged}


def _over(ours: float, theirs: float) -> float:
    """Ours over theirs; infinite where ours diverged, also if both did."""
    return ours / theirs if math.isfinite(ours) else math.inf


def _bar(
    ratios: Iterable[dict[str, dict[str, Any] | None]], opponents: str, limit: float, share: float
) -> dict[str, Any]:
    """On how many tasks ours is at most so many times the best opponent."""
    found = [one[opponents] for one in ratios]
    values = [math.inf if one["ratio"] is None else one["ratio"] for one in found if one is not None]
    within = sum(value <= limit for value in values)
    return {
        "opponents": OPPONENTS[opponents],
        "limit": limit,
        "share": share,
        "within": within,
        "tasks": len(values),
        # A third of seven tasks is no number of tasks: rounding must not decide.
        "met": bool(values) and within >= share * len(values) - 1e-9,
    }


def _ablations(found: Entries) -> dict[str, dict[str, float | None]]:
    ablations: dict[str, dict[str, float | None]] = {}
    for task, rows in found.items():
        if OURS not in rows:
            continue
        ours = rows[OURS].final
        for method, entry in rows.items():
            if METHODS[method].family == "ablation":
                ratio = _over(entry.final, ours)
                ablations.setdefault(method, {})[task] = finite_or_none(ratio)
    return ablations
