"""First-order methods at their best rates: short runs over a grid that grows, then the best of them at full length."""

import math
from dataclasses import dataclass

from replica_newton.reproduction.design import PEER_RATES, Extent, SetUp
from replica_newton.reproduction.results import Request, Results
from replica_newton.training.rates import tune

FINALISTS = 2
"""Rates whose run over the whole length must not diverge: the best after a few epochs need not be the best of all."""
_EXTENSIONS = 4


@dataclass(frozen=True)
class PeerTuning:
    """How the rate of a first-order method is found, in one panel's set-up.

    Every rate of its grid is run for a few epochs, with one rate more beyond either end as long as the best stands
    there. From the best of them on, rates are run for the whole length until two have not diverged. Of those, the one
    with the lowest NLL in the last epoch is the method's best.

    Attributes:
        dataset: which panel.
        set_up: its activation and scaling.
        method: a key of `PEER_RATES`.
        extent: how much is run.
    """

    dataset: str
    set_up: SetUp
    method: str
    extent: Extent

    def short_losses(self, results: Results) -> tuple[list[float], list[float] | None]:
        """What is tried for a few epochs.

        Args:
            results: what is known.

        Returns:
            Rates, and the NLL of the last of these epochs, infinite where it diverged; None as long as one is missing.
        """
        return tune(
            PEER_RATES[self.method], lambda rate: self._last(results, rate, self.extent.tuning_epochs), _EXTENSIONS
        )

    def short_requests(self, results: Results) -> list[Request]:
        """The short runs.

        Args:
            results: what is known.

        Returns:
            The runs, as far as it is known which.
        """
        rates, _ = self.short_losses(results)
        return [self._request(rate, self.extent.tuning_epochs) for rate in rates]

    def finalists(self, results: Results) -> list[Request]:
        """The runs over the whole length.

        Args:
            results: what is known.

        Returns:
            The runs, the best of the short ones first; tentative as long as these are not finished.
        """
        rates, losses = self.short_losses(results)
        if losses is None:
            return [self._request(rate, self.extent.epochs)._replace(tentative=True) for rate in rates[:FINALISTS]]
        chosen: list[Request] = []
        survivors = 0
        for _, rate in sorted(zip(losses, rates, strict=True)):
            chosen.append(self._request(rate, self.extent.epochs))
            survivors += self._last(results, rate, self.extent.epochs) != math.inf
            if survivors == FINALISTS:
                break
        return chosen

    def best(self, results: Results) -> Request:
        """The run at the best rate.

        Args:
            results: what is known.

        Returns:
            The run over the whole length; tentative as long as one that may be better is missing.
        """
        finalists = self.finalists(results)
        losses = [self._last(results, one.experiment.rate, self.extent.epochs) for one in finalists]
        known = [value for value in losses if value is not None]
        if len(known) < len(losses) or any(one.tentative for one in finalists):
            return finalists[0]._replace(tentative=True)
        return finalists[known.index(min(known))]

    def _last(self, results: Results, rate: float, epochs: int) -> float | None:
        record = results.get(self._request(rate, epochs).experiment, epochs)
        if record is None:
            return None
        return math.inf if record.diverged else record.train_nll[-1]

    def _request(self, rate: float, epochs: int) -> Request:
        return Request(self.extent.experiment(self.dataset, self.set_up, self.method, 1, rate), epochs, "peers")
