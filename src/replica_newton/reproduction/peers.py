"""First-order methods at their best rates: short runs over a grid that grows, then the best of them at full length."""

import math
from dataclasses import dataclass

from replica_newton.reproduction.design import PEER_RATES, Extent, SetUp
from replica_newton.reproduction.results import Request, Results
from replica_newton.training.rates import tune

_EXTENSIONS = 4


@dataclass(frozen=True)
class PeerTuning:
    """How the rate of a first-order method is found, in one panel's set-up.

    Every rate of its grid is run for a few epochs, with one rate more beyond either end as long as the best stands
    there. The best is run for the whole length; if it diverges, the next best in its place, and so on.

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

    def whole_requests(self, results: Results) -> list[Request]:
        """The runs over the whole length.

        Args:
            results: what is known.

        Returns:
            The run at the best rate of the short ones; where it is known to diverge, the next best behind it, and so
            on. Tentative as long as the short runs are not finished.
        """
        rates, losses = self.short_losses(results)
        if losses is None:
            return [self._request(rates[0], self.extent.epochs)._replace(tentative=True)]
        chosen: list[Request] = []
        for _, rate in sorted(zip(losses, rates, strict=True)):
            chosen.append(self._request(rate, self.extent.epochs))
            if self._last(results, rate, self.extent.epochs) != math.inf:
                break
        return chosen

    def best(self, results: Results) -> Request:
        """The run over the whole length that stands for the method.

        Args:
            results: what is known.

        Returns:
            The last of `whole_requests`, which diverges only if all rates do.
        """
        return self.whole_requests(results)[-1]

    def _last(self, results: Results, rate: float, epochs: int) -> float | None:
        record = results.get(self._request(rate, epochs).experiment, epochs)
        if record is None:
            return None
        return math.inf if record.diverged else record.train_nll[-1]

    def _request(self, rate: float, epochs: int) -> Request:
        return Request(self.extent.experiment(self.dataset, self.set_up, self.method, 1, rate), epochs, "peers")
