"""What the study varies, and how much of it is run."""

from dataclasses import dataclass
from typing import NamedTuple

from replica_newton.reproduction.experiment import Experiment, Scaling
from replica_newton.reproduction.readings import LITERAL
from replica_newton.training.models import Activation

RATES = (0.0003, 0.01)
ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh")
SCALINGS: tuple[Scaling, ...] = ("standard", "unit", "symmetric")
TRAIN_SAMPLES = {"mnist": 60_000, "cifar10": 50_000}
PEER_RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adam": (0.001, 0.003, 0.01, 0.03),
}
UNTUNED = (("sharpness-rate", 8, RATES[-1]), ("replica-newton", 1, 1.0))
"""Method, M and rate (where it starts; in units of its own) of what is compared with the tuned methods."""
PLATEAU_RATE = 0.01
PLATEAU_METHODS = (
    ("sgd", 1),
    ("momentum", 1),
    ("adam", 1),
    ("sharpness-rate", 8),
    ("saddle-free", 8),
    *((LITERAL.name, M) for M in (2, 4, 8)),
)


class Round(NamedTuple):
    """A round of the search: how many candidates go in (None for all), run for how long and with which M."""

    candidates: int | None
    epochs: int
    replicas: tuple[int, ...]


class SetUp(NamedTuple):
    """What Figure 2 leaves open about a data set's panel: of the combinations tried, SGD's closest to the poster's."""

    activation: Activation
    rate: float
    scaling: Scaling


@dataclass(frozen=True)
class Extent:
    """How much is run.

    Attributes:
        epochs: of Figure 2.
        panel_epochs: of the closest reading at both rates and with both activations.
        calibration_epochs: of SGD, to find scaling, activation and rate.
        search_rates: rates that every reading is tried with.
        rounds: of the search.
        tuning_epochs: of the first-order methods at every rate of their grids.
        plateau_epochs: at most, to leave the plateau.
        plateau_seeds: seeds of that measurement.
        train_limit: number of training samples; None for all.
    """

    epochs: int = 50
    panel_epochs: int = 50
    calibration_epochs: int = 10
    search_rates: tuple[float, ...] = RATES
    rounds: tuple[Round, ...] = (
        Round(None, 1, (8,)),
        # Wide: on a plateau one epoch hardly tells readings apart.
        Round(48, 3, (2, 8)),
        Round(4, 8, (2, 8)),
    )
    tuning_epochs: int = 5
    plateau_epochs: int = 8
    plateau_seeds: tuple[int, ...] = (0, 1, 2)
    train_limit: int | None = None

    def experiment(
        self, dataset: str, set_up: SetUp, method: str, replicas: int, rate: float, seed: int = 0
    ) -> Experiment:
        """One run of the study.

        Args:
            dataset: which panel.
            set_up: its activation and scaling; the rate has a value of its own.
            method: see `Experiment`.
            replicas: M.
            rate: α.
            seed: see `Experiment`.

        Returns:
            The run, its training set as long as this study's.
        """
        return Experiment(dataset, method, replicas, rate, set_up.activation, set_up.scaling, seed, self.train_limit)


FULL = Extent()
QUICK = Extent(
    epochs=12,
    panel_epochs=4,
    calibration_epochs=3,
    search_rates=(0.01,),
    rounds=(
        Round(None, 1, (8,)),
        Round(8, 2, (2, 8)),
        Round(3, 4, (2, 8)),
    ),
    tuning_epochs=2,
    plateau_epochs=12,
    plateau_seeds=(0,),
    train_limit=2048,
)


class Candidate(NamedTuple):
    """A reading and the rate it is run with; the poster does not say which of its two rates belongs to what."""

    reading: str
    rate: float
