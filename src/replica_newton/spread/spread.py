"""Spreads: where the replicas stand apart from the parameters they share."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from replica_newton.spread.columns import Columns


class Spread(Protocol):
    """Rule that places the replicas for the next step."""

    def displacements(self, gradients: Tensor, rates: Tensor | float, step: int, held: "Held | None" = None) -> Tensor:
        """Displacements of the replicas from the shared parameters.

        Args:
            gradients: `(M, n)`, of the step just taken, one row a replica.
            rates: learning rate, one for all or `(n,)`.
            step: number of the step just taken, from 0.
            held: which n columns of N these are, where several processes share them; None for all.

        Returns:
            `(M, n)`, rows that sum to zero.
        """
        ...


class Held(NamedTuple):
    """Which columns a process has of rows that several share, and what it has made of them already.

    Attributes:
        elements: N, of a whole row.
        columns: which n of them.
        mean: `(n,)`, of the gradients over the replicas.
        memory: `(M, n)`, for the displacements; None for new one.
    """

    elements: int
    columns: Columns
    mean: Tensor
    memory: Tensor | None = None


def regrouped(displacements: Tensor, before: Sequence[int], now: Sequence[int]) -> Tensor:
    """Displacements after replicas have gone or come.

    Those that stay keep theirs, up to a shift that makes them sum to zero again; newcomers start at the parameters that
    all share.

    Args:
        displacements: `(M, n)`, rows that sum to zero.
        before: M names of the replicas.
        now: M' names of those that there are now.

    Returns:
        `(M', n)`, rows that sum to zero.
    """
    if list(now) == list(before):
        return displacements
    stay = [name for name in now if name in before]
    rows = displacements.new_zeros(len(now), displacements.shape[1])
    if stay:
        kept = displacements[[before.index(name) for name in stay]]
        rows[[now.index(name) for name in stay]] = kept - kept.mean(dim=0)
    return rows


class LocalStep:
    """The paper's 1-step synchronous scheme: every replica takes a local SGD step, then all meet.

    Local steps from a shared point w end at `w − rate·g_m`; apart from their mean, which the replicas' common
    step replaces, the replicas stand at `d_m = −rate·(g_m − ḡ)`. They differ because their data differ.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, section 3.
    """

    def __repr__(self) -> str:
        return "LocalStep()"

    def displacements(
        self,
        gradients: Tensor,
        rates: Tensor | float,
        step: int,  # noqa: ARG002
        held: Held | None = None,
    ) -> Tensor:
        """`d_m = −rate·(g_m − ḡ)`, `(M, n)`, column by column; the number of the step does not matter."""
        if held is None:
            return (gradients - gradients.mean(dim=0)).mul_(-rates)
        return torch.sub(gradients, held.mean, out=held.memory).mul_(-rates)


class RandomDirections:
    """Control: isotropic random displacements, as long as local steps would be, in directions that mean nothing.

    Args:
        seed: seed of the directions; they depend on it and on the number of the step alone.
        radius: root mean square length of the displacements, in units of the parameters; None takes the length
            of the local steps, so that a run differs from one with `LocalStep` by directions alone.

    Raises:
        ValueError: if `radius` is not positive and finite.
    """

    def __init__(self, seed: int = 0, *, radius: float | None = None) -> None:
        if radius is not None and not 0.0 < radius < float("inf"):
            raise ValueError(f"{radius=} must be positive and finite")
        self.seed = seed
        self.radius = radius

    def __repr__(self) -> str:
        return f"RandomDirections(seed={self.seed}, radius={self.radius})"

    def displacements(self, gradients: Tensor, rates: Tensor | float, step: int, held: Held | None = None) -> Tensor:
        """Centred Gaussian rows scaled to `radius`, `(M, n)`; see `Spread`."""
        M, n = gradients.shape
        # One generator on the CPU: the same directions on every device.
        # It keeps 32 bits of a seed: the odd factor sets the seeds' sequences of steps far apart in them.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + step) % (1 << 32))
        # All are drawn by every process, so that they do not depend on how many there are.
        shape = (M, n if held is None else held.elements)
        directions = torch.randn(shape, generator=generator, dtype=gradients.dtype)
        if held is not None:
            directions = torch.stack([held.columns.part(row) for row in directions])
        directions = directions.to(gradients.device)
        directions -= directions.mean(dim=0)
        norm = _norm(directions, held)
        if self.radius is None:
            length = _norm(LocalStep().displacements(gradients, rates, step), held)
        else:
            length = norm.new_tensor(self.radius * M**0.5)
        return directions.mul_(torch.where(norm > 0.0, length / norm, 0.0))


def _norm(rows: Tensor, held: Held | None) -> Tensor:
    """Of all rows together, over all processes."""
    norm: Tensor
    if held is None:
        norm = rows.norm()
        return norm
    squares = held.columns.total(rows.double().square().sum().cpu())
    return squares.sqrt().to(rows)
