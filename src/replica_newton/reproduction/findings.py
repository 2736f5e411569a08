"""What the runs say: every number of the page that comes from training, by name."""

import math
from collections.abc import Collection, Iterable, Mapping
from itertools import product
from statistics import median
from typing import Any

from replica_newton.reproduction.design import ACTIVATIONS, PEER_RATES, RATES, UNTUNED, Candidate
from replica_newton.reproduction.experiment import Record
from replica_newton.reproduction.peers import PeerTuning
from replica_newton.reproduction.plan import Plan
from replica_newton.reproduction.poster import Curves, distance, orderings, poster_curves
from replica_newton.reproduction.readings import LITERAL, Reading, reading_named
from replica_newton.reproduction.results import Request, Results
from replica_newton.training.run import finite_or_none

SHOWN_CANDIDATES = 6
PEER_NAMES = {
    "sgd": "SGD",
    "momentum": "SGD, momentum 0.9",
    "adam": "Adam",
    "sharpness-rate": "SGD at 1/λ_max",
    "replica-newton": "ReplicaNewton, no rate given",
    "saddle-free": "saddle-free step",
}
UNTUNED_ROLES = {method for method, *_ in UNTUNED}


def findings(plan: Plan, results: Results) -> dict[str, Any]:
    """Everything that follows from the runs, as JSON has it; None stands for nan, and for what diverged.

    Args:
        plan: of the study.
        results: all of its runs; panels may be missing.

    Returns:
        By section: "extent", "set_up", "search", "figure2", "whole_length", "orderings", "panels", "peers", "plateau".

    Raises:
        ValueError: if the study is not finished.
    """
    best = plan.best(results)
    if best is None:
        raise ValueError("the study must be finished")
    figure2 = {dataset: _figure2(plan, results, dataset, best) for dataset in plan.datasets}
    return {
        "extent": {
            "datasets": list(plan.datasets),
            "epochs": plan.extent.epochs,
            "panel_epochs": plan.extent.panel_epochs,
            "train_limit": plan.extent.train_limit,
            "runs": len(results.records),
            "hours": sum(record.seconds for record in results.records.values()) / 3600.0,
        },
        "set_up": {dataset: _set_up(plan, results, dataset) for dataset in plan.datasets},
        "search": _search(plan, results, best),
        "figure2": figure2,
        "whole_length": _whole_length(figure2.values()),
        "orderings": {role: _orderings_met(figure2.values(), role) for role in ("poster", "closest", "literal")},
        "panels": {dataset: _panels(plan, results, dataset) for dataset in plan.datasets},
        "peers": {dataset: _peers(plan, results, dataset, best) for dataset in plan.datasets},
        "plateau": _plateau(plan, results),
    }


def figure2_curves(plan: Plan, results: Results, dataset: str, candidate: Candidate | None) -> Curves:
    """Our curves beside the poster's panel of one data set.

    Args:
        plan: of the study.
        results: all of its runs.
        dataset: which panel.
        candidate: reading and rate; None for the literal reading at SGD's rate.

    Returns:
        Training NLL of every epoch for SGD (under 1) and M = 2, 4, 6, 8.
    """
    requests = plan.figure_requests(results, dataset, candidate or _literal(plan, results, dataset))
    return _curves(results, requests)


def panel_curves(plan: Plan, results: Results, dataset: str) -> dict[tuple[str, str, float], Curves]:
    """Our curves at both rates and with both activations.

    Args:
        plan: of the study.
        results: all of its runs.
        dataset: which panels.

    Returns:
        Curves by data set, activation and rate; those that have been run, for the panels come last in the study.
    """
    requests = list(plan.panel_requests(results, dataset, plan.set_up(results, dataset)))
    finished = [one for one in requests if results.get(one.experiment, one.epochs) is not None]
    return {
        (dataset, activation, rate): _curves(
            results, [one for one in finished if (one.experiment.activation, one.experiment.rate) == (activation, rate)]
        )
        for activation, rate in product(ACTIVATIONS, RATES)
    }


def peer_records(plan: Plan, results: Results, dataset: str, best: Candidate) -> dict[str, tuple[str, Record]]:
    """The runs compared at equal gradient evaluations: first-order methods at their best rate, and the replicas.

    Args:
        plan: of the study.
        results: all of its runs.
        dataset: which panel.
        best: the closest reading.

    Returns:
        Label and run by role: a method, "literal" or "closest".
    """
    literal = plan.figure_requests(results, dataset, _literal(plan, results, dataset))[-1]
    closest = plan.figure_requests(results, dataset, best)[-1]
    requests = {
        **{request.experiment.method: request for request in plan.best_peers(results, dataset)},
        "literal": literal,
        "closest": closest,
    }
    named = {}
    for role, request in requests.items():
        record = _record(results, request)
        rate = "" if role in UNTUNED_ROLES else f", rate {request.experiment.rate:g}"
        name = PEER_NAMES.get(role, f"{role} reading, M = {request.experiment.replicas}")
        named[role] = (name + rate, record)
    return named


def plateau_steps(plan: Plan, results: Results) -> dict[str, list[int | None]]:
    """Steps on the initial plateau, by label: one value a seed, None where it was not left.

    Args:
        plan: of the study.
        results: all of its runs.

    Returns:
        The steps.
    """
    steps: dict[str, list[int | None]] = {}
    best = plan.best(results)
    for request in plan.plateau_requests(results):
        experiment = request.experiment
        role = {LITERAL.name: "literal reading", best.reading if best else "": "closest reading"}.get(experiment.method)
        name = f"{role}, M = {experiment.replicas}" if role else PEER_NAMES[experiment.method]
        record = _record(results, request)
        within = record.steps_on_plateau
        limit = request.epochs * plan.steps_per_epoch(request.experiment.dataset)
        steps.setdefault(name, []).append(within if within is not None and within <= limit else None)
    return steps


def _set_up(plan: Plan, results: Results, dataset: str) -> dict[str, Any]:
    distances = plan.set_up_distances(results, dataset)
    ranked = sorted(distances, key=distances.__getitem__)
    tried = [one._asdict() | {"distance": distances[one]} for one in ranked]
    return {"epochs": plan.extent.calibration_epochs, "chosen": tried[0], "tried": tried}


def _search(plan: Plan, results: Results, best: Candidate) -> dict[str, Any]:
    rounds = []
    set_ups = plan.set_ups(results)
    literal = [Candidate(LITERAL.name, rate) for rate in plan.extent.search_rates]
    for number, one in enumerate(plan.extent.rounds):
        distances = plan.search_distances(results, number) or {}
        ranked = sorted(distances, key=distances.__getitem__)
        rounds.append(
            {
                "candidates": len(ranked),
                "epochs": one.epochs,
                "replicas": list(one.replicas),
                "datasets": list(plan.datasets),
                "diverged": _diverged(plan, results, number),
                "no_effect": _no_effect(plan, results, number),
                "literal": {f"{one.rate:g}": plan.candidate_distance(results, one, number, set_ups) for one in literal},
                "closest": [_candidate(one) | {"distance": distances[one]} for one in ranked[:SHOWN_CANDIDATES]],
            }
        )
    first = plan.search_distances(results, 0) or {}
    return {
        "readings": len({one.reading for one in first}),
        "rounds": rounds,
        "best": _candidate(best),
        "medians": {
            name: {
                str(value): median(found for one, found in first.items() if _value(one, name) == value)
                for value in dict.fromkeys(_value(one, name) for one in first)
            }
            for name in (*Reading.__dataclass_fields__, "rate")
        },
    }


def _figure2(plan: Plan, results: Results, dataset: str, best: Candidate) -> dict[str, Any]:
    poster = poster_curves(dataset)
    epochs = plan.extent.epochs
    shortened = {M: values[:epochs] for M, values in poster.items()}
    entry: dict[str, Any] = {"poster": _outcome(dataset, shortened)}
    for role, candidate in (("closest", best), ("literal", None)):
        entry[role] = _outcome(dataset, figure2_curves(plan, results, dataset, candidate))
        requests = plan.figure_requests(results, dataset, candidate or _literal(plan, results, dataset))
        entry[role]["mean_network"] = {
            str(one.experiment.replicas): finite_or_none(_record(results, one).final_nll) for one in requests
        }
    sgd = figure2_curves(plan, results, dataset, best)[1]
    return entry | {"distance_if_all_were_sgd": distance(dataset, {M: sgd for M in poster if M > 1})}


def _whole_length(panels: Collection[dict[str, Any]]) -> dict[str, float]:
    """Distances over all epochs and data sets, of the replicas' curves with every M."""
    distances = {
        "closest": [one["closest"]["distance"] for one in panels],
        "literal": [one["literal"]["distance"] for one in panels],
        "no_effect": [one["distance_if_all_were_sgd"] for one in panels],
    }
    return {role: math.sqrt(sum(one**2 for one in values) / len(values)) for role, values in distances.items()}


def _orderings_met(panels: Iterable[dict[str, Any]], role: str) -> int:
    """How many of the orderings that hold on the poster hold for a role, over all data sets."""
    return sum(
        panel["poster"]["orderings"][statement] and holds
        for panel in panels
        for statement, holds in panel[role]["orderings"].items()
    )


def _outcome(dataset: str, curves: Curves) -> dict[str, Any]:
    return {
        "distance_of_sgd": distance(dataset, {1: curves[1]}),
        "distance": distance(dataset, {M: values for M, values in curves.items() if M > 1}),
        "last": {str(M): finite_or_none(values[-1]) for M, values in curves.items()},
        "lowest_epoch": {str(M): 1 + values.index(min(values)) for M, values in curves.items()},
        "orderings": orderings(curves),
    }


def _panels(plan: Plan, results: Results, dataset: str) -> list[dict[str, Any]]:
    return [
        {
            "activation": activation,
            "rate": rate,
            "last": {str(M): finite_or_none(values[-1]) for M, values in curves.items()},
        }
        for (_, activation, rate), curves in panel_curves(plan, results, dataset).items()
    ]


def _peers(plan: Plan, results: Results, dataset: str, best: Candidate) -> list[dict[str, Any]]:
    entries = []
    for role, (label, record) in peer_records(plan, results, dataset, best).items():
        entries.append(
            {
                "role": role,
                "label": label,
                "rate": record.experiment.rate,
                "tuning": _tuning(plan.peer(results, dataset, role), results) if role in PEER_RATES else None,
                "last": finite_or_none(record.train_nll[-1]),
                "final_nll": finite_or_none(record.final_nll),
                "test_accuracy": finite_or_none(record.test_accuracy),
                "gradient_evaluations": record.gradient_evaluations[-1],
            }
        )
    return sorted(entries, key=lambda one: math.inf if one["last"] is None else one["last"])


def _tuning(peer: PeerTuning, results: Results) -> dict[str, Any]:
    """What was tried to find a method's rate; None where it diverged."""
    rates, losses = peer.short_losses(results)
    if losses is None:
        raise ValueError(f"the study must be finished; the tuning of {peer.method} is not")
    whole = [_record(results, one) for one in peer.whole_requests(results)]
    return {
        "short": [{"rate": rate, "last": finite_or_none(loss)} for rate, loss in zip(rates, losses, strict=True)],
        "at_end_of_grid": losses.index(min(losses)) in {0, len(rates) - 1},
        "whole": [
            {"rate": one.experiment.rate, "last": finite_or_none(one.train_nll[-1]), "epochs": len(one.train_nll)}
            for one in whole
        ],
    }


def _plateau(plan: Plan, results: Results) -> dict[str, Any]:
    request = next(iter(plan.plateau_requests(results)))
    return {
        "dataset": plan.datasets[0],
        "rate": request.experiment.rate,
        "limit": request.epochs * plan.steps_per_epoch(request.experiment.dataset),
        "seeds": len(plan.extent.plateau_seeds),
        "steps": plateau_steps(plan, results),
    }


def _diverged(plan: Plan, results: Results, number: int) -> int:
    """Candidates of a round of which a run diverged."""
    return len(
        {
            (request.experiment.method, request.experiment.rate)
            for request in plan.round_requests(results, number)
            if _record(results, request).diverged
        }
    )


def _no_effect(plan: Plan, results: Results, number: int) -> float:
    """Distance of a reading that changes nothing, whatever M: all its curves are those of SGD."""
    one = plan.extent.rounds[number]
    squares = []
    for dataset in plan.datasets:
        sgd = figure2_curves(plan, results, dataset, None)[1][: one.epochs]
        squares.append(distance(dataset, dict.fromkeys(one.replicas, sgd)) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def _candidate(one: Candidate) -> dict[str, Any]:
    return {"reading": one.reading, "rate": one.rate}


def _value(one: Candidate, name: str) -> str | float:
    return one.rate if name == "rate" else str(getattr(reading_named(one.reading), name))


def _literal(plan: Plan, results: Results, dataset: str) -> Candidate:
    """The literal reading at SGD's rate."""
    set_up = plan.set_up(results, dataset)
    return Candidate(LITERAL.name, set_up.rate if set_up else RATES[-1])


def _curves(results: Results, requests: Iterable[Request]) -> Mapping[int, tuple[float, ...]]:
    return {request.experiment.replicas: _record(results, request).train_nll for request in requests}


def _record(results: Results, request: Request) -> Record:
    record = results.get(request.experiment, request.epochs)
    if record is None:
        raise ValueError(f"the study must be finished; {request.experiment.key} is missing")
    return record
