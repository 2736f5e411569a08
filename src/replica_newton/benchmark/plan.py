"""Which runs the benchmark needs, given what is known so far."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from replica_newton.benchmark.optimizers import METHODS, OURS
from replica_newton.benchmark.run import Record, Run
from replica_newton.benchmark.tasks import TASKS
from replica_newton.training.rates import tune


@dataclass(frozen=True)
class Extent:
    """How much is run.

    Attributes:
        seeds: of every rate that is compared, from 0.
        own_seeds: of our default, to see whether it ever diverges; those beyond `seeds` count for nothing else.
        rates: of a grid, the ones in its middle; None for all.
        extensions: rates that may be added at either end of a grid, as long as the best is the last one there.
        margin: over the lowest loss of seed 0, of the rates that are run with all seeds, as a factor.
        quick: whether training sets are cut short.
    """

    seeds: int = 3
    own_seeds: int = 10
    rates: int | None = None
    extensions: int = 3
    margin: float = 1.1
    quick: bool = False


FULL = Extent()
QUICK = Extent(seeds=1, own_seeds=1, rates=3, extensions=0, margin=1.0, quick=True)


@dataclass(frozen=True)
class Entry:
    """A method on a task, as far as it is known.

    Attributes:
        task: a key of `TASKS`.
        method: a key of `METHODS`.
        rates: that were tried, ascending.
        finals: final NLL of every seed by rate, infinite where a run diverged.
        rate: the best of those that were run with all seeds: that with the lowest median.
    """

    task: str
    method: str
    rates: tuple[float, ...]
    finals: dict[float, list[float]]
    rate: float

    @property
    def final(self) -> float:
        """Median over the seeds of the final NLL at the best rate."""
        return median(self.finals[self.rate])

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the last one tried, so that the optimum may lie beyond."""
        return METHODS[self.method].tuned and self.rate in {self.rates[0], self.rates[-1]}


@dataclass(frozen=True)
class Plan:
    """The benchmark of some tasks and methods.

    Every rate of a method's grid is run with seed 0; the grid grows by one rate as long as the best is at its end. The
    best rate, and all that come close to it, are then run with the other seeds.

    Attributes:
        tasks: keys of `TASKS`.
        methods: keys of `METHODS`.
        extent: how much is run.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    extent: Extent = field(default_factory=Extent)

    def pairs(self) -> list[tuple[str, str]]:
        """Tasks and the methods that apply to them."""
        return [
            (task, method) for task in self.tasks for method in self.methods if METHODS[method].applies_to(TASKS[task])
        ]

    def runs(self, records: dict[Run, Record]) -> Iterator[Run]:
        """All runs, as far as it is settled which.

        Args:
            records: what is known.

        Yields:
            First all of seed 0, then the other seeds, then further ones of our default; those that stand in for a
            choice to be made are tentative.
        """
        # One pass over all tasks before the next, so that a benchmark that is stopped early has something of each.
        rest: list[Run] = []
        for task, method in self.pairs():
            rates, finals = self._tuning(records, task, method)
            yield from (self.run(task, method, rate, 0) for rate in rates)
            compared = self._compared(rates, finals) if finals else rates[:1]
            rest += [
                self.run(task, method, rate, seed, tentative=finals is None)
                for seed in range(1, self.extent.seeds)
                for rate in compared
            ]
        yield from rest
        yield from (run for run in self.own_runs() if run.seed >= self.extent.seeds)

    def own_runs(self) -> list[Run]:
        """Runs of our default with all of its seeds."""
        tasks = [task for task, method in self.pairs() if method == OURS]
        seeds = range(max(self.extent.seeds, self.extent.own_seeds))
        return [self.run(task, OURS, METHODS[OURS].rates[0], seed) for seed in seeds for task in tasks]

    def run(self, task: str, method: str, rate: float, seed: int, *, tentative: bool = False) -> Run:
        """One run.

        Args:
            task: a key of `TASKS`.
            method: a key of `METHODS`.
            rate: its learning rate.
            seed: see `Run`.
            tentative: see `Run`.

        Returns:
            The run, cut short in the quick version.
        """
        found = TASKS[task]
        limit = found.quick_limit if self.extent.quick else None
        return Run(task, method, rate, seed, found.epochs, limit, tentative)

    def entry(self, records: dict[Run, Record], task: str, method: str) -> Entry | None:
        """What is known of a method on a task.

        Args:
            records: what is known.
            task: a key of `TASKS`.
            method: a key of `METHODS`.

        Returns:
            The entry; None as long as a run is missing.
        """
        rates, tuned = self._tuning(records, task, method)
        if tuned is None:
            return None
        finals = {rate: [value] for rate, value in zip(rates, tuned, strict=True)}
        for rate in self._compared(rates, tuned):
            for seed in range(1, self.extent.seeds):
                value = self._final(records, task, method, rate, seed)
                if value is None:
                    return None
                finals[rate].append(value)
        compared = [rate for rate in finals if len(finals[rate]) == self.extent.seeds]
        best = min(compared, key=lambda rate: (median(finals[rate]), rate))
        return Entry(task, method, tuple(rates), finals, best)

    def _final(self, records: dict[Run, Record], task: str, method: str, rate: float, seed: int) -> float | None:
        """Final NLL of a run, infinite if it diverged; None if it is missing."""
        record = records.get(self.run(task, method, rate, seed))
        if record is None:
            return None
        return math.inf if record.diverged else record.final_nll

    def _grid(self, method: str) -> list[float]:
        rates = METHODS[method].rates
        if self.extent.rates is None or len(rates) <= self.extent.rates:
            return list(rates)
        start = (len(rates) - self.extent.rates) // 2
        return list(rates[start : start + self.extent.rates])

    def _tuning(self, records: dict[Run, Record], task: str, method: str) -> tuple[list[float], list[float] | None]:
        """Rates to be tried with seed 0, and their final NLL once there will be no more of them."""
        extensions = self.extent.extensions if METHODS[method].tuned else 0
        return tune(self._grid(method), lambda rate: self._final(records, task, method, rate, 0), extensions)

    def _compared(self, rates: list[float], finals: list[float]) -> list[float]:
        """Rates that are run with all seeds: those whose loss with seed 0 is within the margin of the lowest."""
        # A loss is positive; where every rate diverged, all are infinite and the first stands for them.
        limit = self.extent.margin * min(finals)
        close = [rate for rate, final in zip(rates, finals, strict=True) if final <= limit]
        return close if math.isfinite(limit) else rates[:1]
