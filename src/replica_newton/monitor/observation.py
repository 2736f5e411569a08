"""CurvatureObservation: what a monitor saw at one step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class CurvatureObservation:
    """What a monitor saw at one step.

    Attributes:
        step: calls of `observe` before this one.
        eigenvalues: `(rank,)` fp64, Hessian eigenvalues, signed, by magnitude descending; empty until every direction
            has been probed once.
        residuals: `(rank,)` fp64, `‖H x − θ x‖` of each pair; a value below its residual is not to be trusted.
        uncertainties: `(rank,)` fp64, standard error of each eigenvalue from the spread of the responses; inf until a
            direction has been probed for the third time.
        sharpness: largest eigenvalue, nan until there is one.
        preconditioned_sharpness: largest eigenvalue of `P^-½ (H + λI) P^-½`, P the metric of the attached optimizer and
            λ the weight decay that it adds to the gradient; nan until it is known, None for an optimizer of unknown
            metric or none.
        stability_ratio: `preconditioned_sharpness` over the largest that is stable at the rate and momentum of the
            optimizer; descent along that direction is unstable above 1. None where the limit is not known.
        learning_rate: `1/sharpness`, LeCun's optimal rate for plain gradient descent; nan where sharpness is not
            positive.
        captured_gradient_fraction: `‖X ḡ‖²/‖ḡ‖²`, share of the squared gradient inside the tracked space.
        gradient_noise_scale: batch size, in samples, at which noise and signal of the mean gradient are equal
            (McCandlish et al. 2018, the simple noise scale); None with fewer than two replicas, inf where the
            replicas' gradients show no signal.
    """

    step: int
    eigenvalues: Tensor
    residuals: Tensor
    uncertainties: Tensor
    sharpness: float
    preconditioned_sharpness: float | None
    stability_ratio: float | None
    learning_rate: float
    captured_gradient_fraction: float
    gradient_noise_scale: float | None
