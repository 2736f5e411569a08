"""Runs of a comparison grouped over their seeds, and what the numbers say: shared by figure, report and terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple, TypeAlias

from replica_newton.report.formats import format_nll, format_rate

Summary: TypeAlias = Mapping[str, Any]
"""Content of `summary.json`: the settings under `task`, one entry a run under `runs`."""

_METHOD_NAMES = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "paper": "paper", "saddle-free": "saddle-free"}
_DATASET_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
# All replicas stay at the same parameters, so that the number of replicas changes nothing.
_SAME_PARAMETERS = {"sgd", "momentum", "adam"}


class Range(NamedTuple):
    """Median, smallest and largest value over the seeds; infinite where a run diverged."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Runs of one method, number of replicas and learning rate, taken together over their seeds.

    A value that is not finite counts as the worst one, and a run that diverged counts as diverged in all later epochs:
    otherwise the seeds that survive would make an unstable method look good.

    Attributes:
        method: Name of the method, as in the summary.
        replicas: Number of replicas M.
        learning_rate: Learning rate; `None` when the method chooses its own.
        seeds: Seeds of the runs that finished at least one epoch.
        nll: Training NLL over the seeds, one entry an epoch (the first is epoch 1).
        test_accuracy: Median test accuracy (fraction) after each epoch.
        gradient_evaluations: Median number of samples, up to each epoch, whose gradient was computed.
        final_nll: Last training NLL of each run, over the seeds.
        final_test_accuracy: Median of the last test accuracy of each run.
        final_gradient_evaluations: Median of the total number of gradient evaluations.
        final_seconds: Median training time in seconds.
        diverged: Number of runs that ended with a training NLL that is not finite.
        rates: Number of learning rates that were run for this method and number of replicas.
        best: Whether this learning rate ends with the lowest median training NLL, of those at which fewest runs
            diverged.
    """

    method: str
    replicas: int
    learning_rate: float | None
    seeds: tuple[int, ...]
    nll: tuple[Range, ...]
    test_accuracy: tuple[float, ...]
    gradient_evaluations: tuple[float, ...]
    final_nll: Range
    final_test_accuracy: float
    final_gradient_evaluations: float
    final_seconds: float
    diverged: int
    rates: int = 1
    best: bool = True

    @property
    def epochs(self) -> range:
        """Epochs that at least one run finished, counted from 1."""
        return range(1, len(self.nll) + 1)

    @property
    def name(self) -> str:
        """Method and, where it matters, number of replicas: `SGD`, `paper, M = 4`."""
        name = method_name(self.method)
        alone = self.method in _SAME_PARAMETERS and self.replicas == 1
        return name if alone else f"{name}, M = {self.replicas}"

    @property
    def label(self) -> str:
        """Name with, if several were run, the learning rate, and with what diverged."""
        label = self.name if self.rates == 1 else f"{self.name}, rate {format_rate(self.learning_rate)}"
        if self.diverged == len(self.seeds):
            return f"{label} (diverged)"
        return f"{label} ({self.diverged}/{len(self.seeds)} diverged)" if self.diverged else label

    def nll_at(self, epoch: int) -> Range:
        """Training NLL over the seeds after an epoch.

        Args:
            epoch: Epoch, counted from 1.

        Returns:
            The entry of that epoch; past the last one, the last one (a series that diverged remains so).
        """
        return self.nll[min(epoch, len(self.nll)) - 1]


class Standing(NamedTuple):
    """Comparison after one epoch: `lowest` holds the series (several in a tie) with the lowest median training NLL."""

    epoch: int
    lowest: tuple[Series, ...]


def method_name(method: str) -> str:
    """Name of a method as a reader knows it.

    Args:
        method: Name in the summary.

    Returns:
        For example `SGD` for `sgd`; an unknown name is returned as it is.
    """
    return _METHOD_NAMES.get(method, method)


def dataset_name(dataset: str) -> str:
    """Name of a data set as a reader knows it.

    Args:
        dataset: Name in the summary.

    Returns:
        For example `MNIST` for `mnist`; an unknown name is returned as it is.
    """
    return _DATASET_NAMES.get(dataset, dataset)


def group_runs(summary: Summary) -> list[Series]:
    """Series of a comparison, sorted by method, number of replicas and learning rate.

    Args:
        summary: Content of `summary.json`. Runs without a finished epoch are left out.

    Returns:
        One series for each method, number of replicas and learning rate; exactly one of those that share method and
        number of replicas is marked `best` (in a tie, the lowest learning rate).
    """
    groups: dict[tuple[str, int, float | None], list[Mapping[str, Any]]] = {}
    for run in summary["runs"]:
        if run["train_nll"]:
            groups.setdefault((run["method"], run["replicas"], run["learning_rate"]), []).append(run)
    # Known methods in their usual order, then the others as they first appear.
    order = {method: i for i, method in enumerate(dict.fromkeys([*_METHOD_NAMES, *(key[0] for key in groups)]))}
    keys = sorted(groups, key=lambda key: (order[key[0]], key[1], -1.0 if key[2] is None else key[2]))
    rivals: dict[tuple[str, int], list[Series]] = {}
    for method, replicas, learning_rate in keys:
        series = _join_seeds(method, replicas, learning_rate, groups[method, replicas, learning_rate])
        rivals.setdefault((method, replicas), []).append(series)
    grouped = []
    for rates in rivals.values():
        best = min(rates, key=lambda series: (series.diverged, series.final_nll.median))
        grouped += [replace(series, rates=len(rates), best=series is best) for series in rates]
    return grouped


def compare(series: Sequence[Series]) -> Standing | None:
    """Standing of the best series, after the last epoch that all of them have finished.

    Args:
        series: Series from `group_runs`; those that are not marked `best` are ignored.

    Returns:
        The standing, or `None` when there is no series, or all of them diverged.
    """
    drawn = [one for one in series if one.best and math.isfinite(one.final_nll.median)]
    if not drawn:
        return None
    epoch = min(len(one.nll) for one in drawn)
    lowest = min(one.nll_at(epoch).median for one in drawn)
    if not math.isfinite(lowest):
        return None
    return Standing(epoch, tuple(one for one in drawn if _same(one.nll_at(epoch).median, lowest)))


def headline(summary: Summary) -> str:
    """What the comparison shows, in one to three plain sentences computed from the numbers.

    Args:
        summary: Content of `summary.json`.

    Returns:
        Which method ends lowest, whether the paper's method with the most replicas beats SGD, and what is unfinished.
    """
    series = [one for one in group_runs(summary) if one.best]
    if not series:
        return "No epoch has finished yet."
    standing = compare(series)
    if standing is None:
        return "Every method diverged."
    names = "; ".join(one.label for one in standing.lowest)
    value = format_nll(standing.lowest[0].nll_at(standing.epoch).median)
    seeds = len(standing.lowest[0].seeds)
    of_seeds = f" (median of {seeds} seeds)" if seeds > 1 else ""
    plural = "s" if standing.epoch > 1 else ""
    sentences = [f"Lowest training NLL after {standing.epoch} epoch{plural}: {names}, with {value}{of_seeds}."]
    sgd = [one for one in series if one.method == "sgd"]
    # With one replica there is no curvature: the paper's method is SGD, and there is nothing to compare.
    paper = [one for one in series if one.method == "paper" and one.replicas > 1]
    if sgd and paper:
        sentences.append(_against_sgd(paper[-1], sgd[0], standing.epoch))
    unfinished = sum(_unfinished(run, summary["task"]["epochs"]) for run in summary["runs"])
    if unfinished:
        sentences.append(f"{unfinished} of {len(summary['runs'])} runs are unfinished.")
    return " ".join(sentences)


def _against_sgd(paper: Series, sgd: Series, epoch: int) -> str:
    """Sentence that says whether the paper's method beats SGD after an epoch."""
    name = f"The paper's method with M = {paper.replicas}"
    ours, theirs = paper.nll_at(epoch), sgd.nll_at(epoch)
    # The final value too: a series may diverge only after the epoch of the comparison.
    if not math.isfinite(ours.median + paper.final_nll.median):
        return f"{name} diverged."
    if not math.isfinite(theirs.median + sgd.final_nll.median):
        return f"{name} beats SGD, which diverged."
    if _same(ours.median, theirs.median):
        return f"{name} does not beat SGD: they tie at {format_nll(ours.median)}."
    values = f"{format_nll(ours.median)} against {format_nll(theirs.median)}"
    wins = ours.median < theirs.median
    details = [f"{values}, {_relative(ours.median, theirs.median)}"]
    if min(len(paper.seeds), len(sgd.seeds)) > 1 and ours.low <= theirs.high and theirs.low <= ours.high:
        details.append("but the ranges over the seeds overlap")
    factor = paper.gradient_evaluations[epoch - 1] / sgd.gradient_evaluations[epoch - 1]
    if abs(factor - 1) > 0.005:
        details.append(f"with {factor:.2f} times the gradient evaluations")
    return f"{name} {'beats' if wins else 'does not beat'} SGD: {', '.join(details)}."


def _relative(ours: float, theirs: float) -> str:
    """How far a value is below or above another one: in percent, or as a factor when it is more than twice."""
    if ours > 2 * theirs:
        return f"{ours / theirs:.3g} times as high" if theirs > 0 else "higher"
    return f"{abs(1 - ours / theirs):.1%} {'lower' if ours < theirs else 'higher'}".replace("%", " %")


def _same(a: float, b: float) -> bool:
    """Whether two values cannot be told apart in the digits that are shown."""
    return format_nll(a) == format_nll(b)


def _unfinished(run: Mapping[str, Any], epochs: int) -> bool:
    """Whether a run still has epochs to go; one that diverged has none."""
    losses = run["train_nll"]
    return len(losses) < epochs and not (losses and not math.isfinite(_number(losses[-1])))


def _join_seeds(method: str, replicas: int, learning_rate: float | None, runs: Sequence[Mapping[str, Any]]) -> Series:
    """Series of the runs that differ in their seed only."""
    losses = [[_or_worst(value, math.inf) for value in run["train_nll"]] for run in runs]
    length = max(map(len, losses))
    diverged = sum(math.isinf(values[-1]) for values in losses)
    padded = [values + [math.inf] * (length - len(values)) if math.isinf(values[-1]) else values for values in losses]
    accuracies = [[_or_worst(value, -math.inf) for value in run["test_accuracy"]] for run in runs]
    return Series(
        method=method,
        replicas=replicas,
        learning_rate=learning_rate,
        seeds=tuple(run["seed"] for run in runs),
        nll=tuple(_spread(values) for values in _columns(padded, length)),
        test_accuracy=tuple(map(_median, _columns(accuracies, length))),
        gradient_evaluations=tuple(map(_median, _columns([run["gradient_evaluations"] for run in runs], length))),
        final_nll=_spread([values[-1] for values in losses]),
        final_test_accuracy=_median(_last(accuracies)),
        final_gradient_evaluations=_median(_last([run["gradient_evaluations"] for run in runs])),
        final_seconds=_median(_last([run["seconds"] for run in runs])),
        diverged=diverged,
    )


def _number(value: float | None) -> float:
    """A number of the summary, where JSON's null stands for "not a number"."""
    return math.nan if value is None else float(value)


def _or_worst(value: float | None, worst: float) -> float:
    """The number, or the worst possible one when it is not finite."""
    number = _number(value)
    return number if math.isfinite(number) else worst


def _columns(rows: Sequence[Sequence[float]], length: int) -> list[list[float]]:
    """Values of each epoch, from the runs that have one (they may have been interrupted)."""
    return [[row[epoch] for row in rows if epoch < len(row)] for epoch in range(length)]


def _last(rows: Sequence[Sequence[float]]) -> list[float]:
    """Last value of each run that has one."""
    return [row[-1] for row in rows if row]


def _median(values: Sequence[float]) -> float:
    """Median, or not a number when there is no value."""
    return median(values) if values else math.nan


def _spread(values: Sequence[float]) -> Range:
    """Median and range of values that are not missing."""
    return Range(median(values), min(values), max(values))
