"""The readings of the paper: every way to fill in what it leaves open, by name, and the replicas that train by one."""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton.curvature import SecantCurvature
from replica_newton.topology import Simulated
from replica_newton.topology.simulated import Data

Start = Literal["same", "different"]
Parting = Literal["local", "summed", "fixed", "own", "reset"]
Divisor = Literal["singular", "eigenvalue"]
Orthogonal = Literal["kept", "dropped"]
Damped = Literal["both", "orthogonal"]


@dataclass(frozen=True)
class Reading:
    """One reading of the step `w ← w − α Ĥ⁻¹ ḡ`, `Ĥ⁻¹ z = z_⊥ + Σ (u_iᵀ z) W v_i / σ_i`.

    The replicas stand at `w_m = w̄ + d_m`, S is the step as a linear map, so that the paper's step is `−S(ḡ)`.

    Attributes:
        start: whether the replicas start from the same or from different initial weights.
        parting: where the replicas stand after a step. "local": each adds its last local step, `d_m = −α (g_m − ḡ)`.
            "summed": local steps add up, `d_m ← d_m − α (g_m − ḡ)`. "fixed": all take the same step, so distances stay
            what they were. "own": each steps along its own gradient, `w_m ← w_m − S(g_m)`. "reset": the replicas meet
            after the step, and a local SGD step parts them again, so that every second step is one of SGD.
        data: gradients that the secants compare: of own shards, or of one common shard (a second gradient).
        orthogonal: whether z_⊥ keeps scale 1 or is dropped.
        divisor: what σ_i is: the singular value of G, or the eigenvalue of GᵀG, its square.
        damped: whether α multiplies both parts, or z_⊥ alone and the curved part is a full Newton step.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, and their poster at ICLR 2017, which write "∇L(y_d, F(x_d; w_i))"
        for the gradients (common data), call σ_i "eigenvalue of GᵀG", and say of the rest "1-step synchronous".
    """

    start: Start = "same"
    parting: Parting = "local"
    data: Data = "own"
    orthogonal: Orthogonal = "kept"
    divisor: Divisor = "singular"
    damped: Damped = "both"

    @property
    def name(self) -> str:
        """The values in one word, such as `same-local-own-kept-singular-both`."""
        return "-".join(vars(self).values())


def _readings() -> tuple[Reading, ...]:
    values = product(*map(get_args, (Start, Parting, Data, Orthogonal, Divisor, Damped)))
    # Where displacements are made anew at every step, different initial weights last for one step only.
    return tuple(Reading(*one) for one in values if one[0] == "same" or one[1] in ("summed", "fixed", "own"))


READINGS = _readings()
"""All 128 of them."""

LITERAL = Reading()
"""The paper's formulas on what data-parallel training computes anyway: one gradient a replica, of its own shard."""


def reading_named(name: str) -> Reading:
    """Reading of a given name.

    Args:
        name: as `Reading.name` gives it.

    Returns:
        The reading.

    Raises:
        ValueError: if there is none of that name.
    """
    for reading in READINGS:
        if reading.name == name:
            return reading
    raise ValueError(f"{name!r} is not the name of a reading, such as {LITERAL.name}")


class PaperReplicas:
    """M replicas of a network that train by one reading of the paper.

    There is no safeguard: a step that climbs is taken. Mean and displacements are kept apart, because displacements of
    a small rate are lost to rounding beside the parameters.

    Args:
        networks: M replicas of one architecture, with the parameters that they start from.
        reading: how they step.
        rate: α > 0.
    """

    def __init__(self, networks: list[nn.Module], reading: Reading, rate: float) -> None:
        self.module = networks[0]
        self.reading = reading
        self.rate = rate
        self.topology = Simulated(len(networks))
        self._parameters = list(self.module.parameters())
        points = torch.stack([nn.utils.parameters_to_vector(one.parameters()).detach() for one in networks])
        # By differences to the first: replicas that start together must not be parted by the rounding of their mean.
        apart = points - points[0]
        self._mean = points[0] + apart.mean(dim=0)
        self._displacements = apart - apart.mean(dim=0)

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """One step of all replicas on a global batch, split between them.

        Args:
            inputs: `(n, ...)`, where M divides n.
            targets: `(n,)` classes.

        Returns:
            Mean loss of the replicas on their shards, where they stood; number of samples whose gradient was computed.
        """
        closure = self.topology.closure(self.module, cross_entropy, inputs, targets)
        W, points = self._displacements, self._mean + self._displacements
        losses, gradients = closure.gradients(self._parameters, points)
        mean = gradients.mean(dim=0)
        deviations = gradients - mean
        local = -self.rate * deviations
        if not bool(W.any()):
            self._mean = self._mean - self.rate * mean
            self._displacements = local
            return float(losses.mean()), closure.samples_evaluated

        secants = gradients
        if self.reading.data == "common":
            _, secants = closure.gradients(self._parameters, points, data="common")
        # The step is linear: the mean of the replicas' own steps is the step along the mean gradient.
        own = self.reading.parting == "own"
        steps = self._steps(W, secants, torch.cat((mean[None], deviations)) if own else mean[None])
        self._mean = self._mean - steps[0]
        match self.reading.parting:
            case "local":
                self._displacements = local
            case "summed":
                self._displacements = W + local
            case "own":
                self._displacements = W - steps[1:]
            case "reset":
                self._displacements = torch.zeros_like(W)
        return float(losses.mean()), closure.samples_evaluated

    def network(self) -> nn.Module:
        """The network at the mean of the replicas."""
        nn.utils.vector_to_parameters(self._mean, self._parameters)
        return self.module

    def state_dict(self) -> dict[str, Any]:
        """Mean and displacements."""
        return {"mean": self._mean, "displacements": self._displacements}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict()` returned.

        Args:
            state: of as many replicas.
        """
        self._mean, self._displacements = state["mean"].clone(), state["displacements"].clone()

    def _steps(self, W: Tensor, G: Tensor, z: Tensor) -> Tensor:
        """`S(z)` for rows z."""
        if not bool(torch.isfinite(G).all()):
            return torch.full_like(z, torch.nan)
        curvature = SecantCurvature(W, G)
        U = curvature.left_singular_vectors
        P = curvature.inverse_hvp(U)  # rows W v_i / σ_i
        if self.reading.divisor == "eigenvalue":
            P /= curvature.singular_values.to(P)[:, None]
        along = z @ U.T
        orthogonal = z - along @ U if self.reading.orthogonal == "kept" else torch.zeros_like(z)
        curved = along @ P
        return self.rate * (orthogonal + curved) if self.reading.damped == "both" else self.rate * orthogonal + curved
