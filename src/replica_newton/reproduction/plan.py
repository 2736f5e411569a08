"""Which runs the study needs, in which order, given what is known so far."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from replica_newton.reproduction.design import (
    ACTIVATIONS,
    FULL,
    PEER_RATES,
    PLATEAU_METHODS,
    PLATEAU_RATE,
    RATES,
    SCALINGS,
    TRAIN_SAMPLES,
    UNTUNED,
    Candidate,
    Extent,
    SetUp,
)
from replica_newton.reproduction.experiment import BATCH
from replica_newton.reproduction.peers import PeerTuning
from replica_newton.reproduction.poster import REPLICAS, distance
from replica_newton.reproduction.readings import LITERAL, READINGS
from replica_newton.reproduction.results import Measurement, Request, Results

PANELS = "all panels"
"""Stage of the last runs: the page can be written without them."""
_STAND_IN = SetUp("relu", RATES[-1], "standard")
"""As long as the calibration has not found one; runs with it are tentative."""


@dataclass(frozen=True)
class Plan:
    """The study of some data sets.

    Attributes:
        datasets: "mnist", "cifar10"; measurements are made on the first.
        extent: how much is run.
    """

    datasets: tuple[str, ...] = ("mnist", "cifar10")
    extent: Extent = FULL

    def measurements(self) -> list[Measurement]:
        """What is measured beside the training runs, on the first data set."""
        limit = self.extent.train_limit
        return [
            Measurement("surfaces", self.datasets[0], "relu", limit),
            Measurement("mechanism", self.datasets[0], "relu", limit),
            *(Measurement("optimal_rate", self.datasets[0], activation, limit) for activation in ACTIVATIONS),
        ]

    def requests(self, results: Results) -> Iterator[Request]:
        """All runs, those first that others wait for.

        Args:
            results: what is known so far; choices that it does not settle are made up, and marked as tentative.

        Yields:
            The runs, finished ones too; some more than once.
        """
        for dataset in self.datasets:
            for set_up in self._combinations():
                yield self._sgd(dataset, set_up, self.extent.calibration_epochs, "scaling, activation and rate")
        set_ups = self.set_ups(results)
        for number in range(len(self.extent.rounds)):
            yield from self.round_requests(results, number)
        best = self.best(results)
        closest = best or Candidate(LITERAL.name, RATES[-1])
        for dataset, found in set_ups.items():
            set_up = found or _STAND_IN
            tentative = found is None
            main = [self._sgd(dataset, set_up, self.extent.epochs, "Figure 2", tentative=tentative)]
            unsettled = tentative or best is None
            main += [
                self._run(dataset, set_up, closest, M, self.extent.epochs, "Figure 2", tentative=unsettled)
                for M in REPLICAS
            ]
            literal = Candidate(LITERAL.name, set_up.rate)
            main += [
                self._run(dataset, set_up, literal, M, self.extent.epochs, "literal reading", tentative=tentative)
                for M in REPLICAS
            ]
            yield from main
        for dataset in self.datasets:
            yield from self._peers(results, dataset)
        yield from self.plateau_requests(results)
        panels = [one for dataset, found in set_ups.items() for one in self.panel_requests(results, dataset, found)]
        # The extremes first: a study that is stopped early has something in every panel.
        yield from sorted(panels, key=lambda one: one.experiment.replicas not in {1, REPLICAS[0], REPLICAS[-1]})

    def set_ups(self, results: Results) -> dict[str, SetUp | None]:
        """The set-up of every data set; see `set_up`.

        Args:
            results: what is known.

        Returns:
            By data set, None where a run is missing.
        """
        return {dataset: self.set_up(results, dataset) for dataset in self.datasets}

    def set_up(self, results: Results, dataset: str) -> SetUp | None:
        """Scaling, activation and rate at which SGD comes closest to the poster's SGD.

        Args:
            results: what is known.
            dataset: which panel.

        Returns:
            The set-up, None as long as a run is missing.
        """
        distances = self.set_up_distances(results, dataset)
        if any(math.isnan(value) for value in distances.values()):
            return None
        return min(distances, key=distances.__getitem__)

    def set_up_distances(self, results: Results, dataset: str) -> dict[SetUp, float]:
        """Distance of SGD to the poster's SGD over the calibration's epochs.

        Args:
            results: what is known.
            dataset: which panel.

        Returns:
            By set-up; nan where the run is missing.
        """
        found: dict[SetUp, float] = {}
        for set_up in self._combinations():
            request = self._sgd(dataset, set_up, self.extent.calibration_epochs, "")
            record = results.get(request.experiment, request.epochs)
            found[set_up] = math.nan if record is None else distance(dataset, {1: record.train_nll})
        return found

    def candidates(self, results: Results, number: int) -> list[Candidate] | None:
        """What enters a round of the search: everything the first, the closest of the round before the others.

        Args:
            results: what is known.
            number: of the round, from 0; one past the last gives the ranking of the last.

        Returns:
            Candidates, closest first after the first round; None as long as the round before is not finished.
        """
        if number == 0:
            return [Candidate(reading.name, rate) for reading, rate in product(READINGS, self.extent.search_rates)]
        distances = self.search_distances(results, number - 1)
        if distances is None:
            return None
        ranked = sorted(distances, key=distances.__getitem__)
        rounds = self.extent.rounds
        return ranked[: rounds[number].candidates] if number < len(rounds) else ranked

    def search_distances(self, results: Results, number: int) -> dict[Candidate, float] | None:
        """Distances to the poster after a round.

        Args:
            results: what is known.
            number: of the round, from 0.

        Returns:
            By candidate; None as long as a run is missing.
        """
        candidates = self.candidates(results, number)
        if candidates is None:
            return None
        set_ups, found = self.set_ups(results), {}
        for candidate in candidates:
            one = self.candidate_distance(results, candidate, number, set_ups)
            if one is None:
                return None
            found[candidate] = one
        return found

    def candidate_distance(
        self, results: Results, candidate: Candidate, number: int, set_ups: Mapping[str, SetUp | None]
    ) -> float | None:
        """Distance of one candidate to the poster, with the epochs and replicas of a round.

        Args:
            results: what is known.
            candidate: reading and rate, whether it is in this round or not.
            number: of the round, from 0.
            set_ups: of every data set.

        Returns:
            Root mean square over data sets and M; None as long as a run is missing.
        """
        squares = []
        for dataset, requests in self._candidate_requests(set_ups, candidate, number).items():
            records = [results.get(request.experiment, request.epochs) for request in requests]
            if any(request.tentative for request in requests) or any(record is None for record in records):
                return None
            curves = {record.experiment.replicas: record.train_nll for record in records if record is not None}
            squares.append(distance(dataset, curves) ** 2)
        return math.sqrt(sum(squares) / len(squares))

    def best(self, results: Results) -> Candidate | None:
        """The reading, and its rate, that comes closest to the poster in the last round.

        Args:
            results: what is known.

        Returns:
            The candidate, None as long as the search is not finished.
        """
        ranked = self.candidates(results, len(self.extent.rounds))
        return ranked[0] if ranked else None

    def round_requests(self, results: Results, number: int) -> Iterator[Request]:
        """The runs of a round of the search.

        Args:
            results: what is known.
            number: of the round, from 0.

        Yields:
            The runs.
        """
        candidates, set_ups = self.candidates(results, number), self.set_ups(results)
        made_up = [Candidate(reading.name, RATES[-1]) for reading in READINGS[: self.extent.rounds[number].candidates]]
        for candidate in made_up if candidates is None else candidates:
            for requests in self._candidate_requests(set_ups, candidate, number).values():
                for request in requests:
                    yield request._replace(tentative=request.tentative or candidates is None)

    def peer(self, results: Results, dataset: str, method: str) -> PeerTuning:
        """How the rate of a first-order method is found.

        Args:
            results: what is known.
            dataset: which panel.
            method: a key of `PEER_RATES`.

        Returns:
            Its tuning, in a made-up set-up as long as the calibration is not finished.
        """
        return PeerTuning(dataset, self.set_up(results, dataset) or _STAND_IN, method, self.extent)

    def best_peers(self, results: Results, dataset: str) -> list[Request]:
        """First-order methods, each at its best rate, and what has no rate to tune.

        Args:
            results: with all runs of the methods' tuning.
            dataset: which panel.

        Returns:
            The runs.
        """
        best = [self.peer(results, dataset, method).best(results) for method in PEER_RATES]
        return [*best, *self._untuned(results, dataset)]

    def steps_per_epoch(self, dataset: str) -> int:
        """Steps of an epoch with the full batch.

        Args:
            dataset: which.

        Returns:
            Their number.
        """
        return (self.extent.train_limit or TRAIN_SAMPLES[dataset]) // BATCH

    def plateau_requests(self, results: Results) -> Iterator[Request]:
        """The runs that measure how long the ReLU network stays on its initial plateau at rate 0.01.

        Args:
            results: what is known.

        Yields:
            The runs, on the first data set, its images scaled as its panel has them.
        """
        dataset = self.datasets[0]
        found = self.set_up(results, dataset)
        best = self.best(results)
        methods = [*PLATEAU_METHODS, *([(best.reading, 8)] if best else [])]
        set_up = SetUp("relu", PLATEAU_RATE, found.scaling if found else "standard")
        for seed, (method, replicas) in product(self.extent.plateau_seeds, methods):
            experiment = self.extent.experiment(dataset, set_up, method, replicas, PLATEAU_RATE, seed)
            yield Request(experiment, self.extent.plateau_epochs, "plateau", found is None)

    def panel_requests(self, results: Results, dataset: str, found: SetUp | None) -> Iterator[Request]:
        """The runs of Figure 2 at both rates and with both activations.

        Args:
            results: what is known.
            dataset: which panels.
            found: its set-up, for the scaling of the images.

        Yields:
            SGD and the closest reading with M = 2, 4, 6, 8 for each panel.
        """
        best = self.best(results)
        reading = best.reading if best else LITERAL.name
        scaling = found.scaling if found else "standard"
        epochs = self.extent.panel_epochs
        for activation, rate in product(ACTIVATIONS, RATES):
            set_up = SetUp(activation, rate, scaling)
            yield self._sgd(dataset, set_up, epochs, PANELS, tentative=found is None)
            for M in REPLICAS:
                tentative = found is None or best is None
                candidate = Candidate(reading, rate)
                yield self._run(dataset, set_up, candidate, M, epochs, PANELS, tentative=tentative)

    def figure_requests(self, results: Results, dataset: str, candidate: Candidate) -> list[Request]:
        """The runs of Figure 2 as close as we come: SGD, and a candidate with M = 2, 4, 6, 8, in one set-up.

        Args:
            results: with a finished calibration.
            dataset: which panel.
            candidate: reading and rate.

        Returns:
            The runs, SGD first.

        Raises:
            ValueError: if the calibration is not finished.
        """
        set_up = self.set_up(results, dataset)
        if set_up is None:
            raise ValueError(f"the calibration on {dataset} must be finished")
        epochs = self.extent.epochs
        return [
            self._sgd(dataset, set_up, epochs, "Figure 2"),
            *(self._run(dataset, set_up, candidate, M, epochs, "Figure 2") for M in REPLICAS),
        ]

    def _peers(self, results: Results, dataset: str) -> Iterator[Request]:
        """First-order methods, first for a few epochs, then the best of their rates; and SGD at 1/λ_max."""
        unsettled = self.set_up(results, dataset) is None
        tunings = [self.peer(results, dataset, method) for method in PEER_RATES]
        short = [request for one in tunings for request in one.short_requests(results)]
        for request in (*short, *(request for one in tunings for request in one.whole_requests(results))):
            yield request._replace(tentative=request.tentative or unsettled)
        yield from self._untuned(results, dataset)

    def _untuned(self, results: Results, dataset: str) -> list[Request]:
        """What needs no rate of its own: SGD at 1/λ_max, and this library's step."""
        found = self.set_up(results, dataset)
        experiments = [
            self.extent.experiment(dataset, found or _STAND_IN, method, replicas, rate)
            for method, replicas, rate in UNTUNED
        ]
        return [Request(experiment, self.extent.epochs, "peers", found is None) for experiment in experiments]

    def _candidate_requests(
        self, set_ups: Mapping[str, SetUp | None], candidate: Candidate, number: int
    ) -> dict[str, list[Request]]:
        """The runs of one candidate in a round, by data set."""
        one = self.extent.rounds[number]
        stage = f"readings, round {number + 1}"
        requests = {}
        for dataset in self.datasets:
            found = set_ups[dataset]
            set_up = found or _STAND_IN
            requests[dataset] = [
                self._run(dataset, set_up, candidate, M, one.epochs, stage, tentative=found is None)
                for M in one.replicas
            ]
        return requests

    def _combinations(self) -> list[SetUp]:
        # Scalings outermost: a process keeps the data set that it has scaled last.
        return [SetUp(activation, rate, scaling) for scaling, activation, rate in product(SCALINGS, ACTIVATIONS, RATES)]

    def _sgd(self, dataset: str, set_up: SetUp, epochs: int, stage: str, *, tentative: bool = False) -> Request:
        experiment = self.extent.experiment(dataset, set_up, "sgd", 1, set_up.rate)
        return Request(experiment, epochs, stage, tentative)

    def _run(
        self,
        dataset: str,
        set_up: SetUp,
        candidate: Candidate,
        replicas: int,
        epochs: int,
        stage: str,
        *,
        tentative: bool = False,
    ) -> Request:
        experiment = self.extent.experiment(dataset, set_up, candidate.reading, replicas, candidate.rate)
        return Request(experiment, epochs, stage, tentative)
