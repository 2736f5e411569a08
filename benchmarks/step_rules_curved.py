"""The untuned step with curvature in it: Newton's step inside a tracked space, the metric's outside."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import ReplicaNewton, TrackedSubspace
from replica_newton.monitor.probes import exact_products
from replica_newton.optim.metric import _rotated, _sides
from replica_newton.optim.metric_step import average_weight
from replica_newton.optim.rate import DistanceRate

SHARDS = 8
GROWTH = 4.0
"""Newton's rate is at most so many times the metric's."""


class NotedRate(DistanceRate):
    """The rate, which remembers what it said last."""

    last = 0.0

    def __call__(self, size: float) -> float:
        """See `DistanceRate`."""
        self.last = super().__call__(size)
        return self.last


def _loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(module(x), y)


class Curved:
    """Curvature for the step of a `ReplicaNewton`, in the coordinates `w̃ = D^½ w` of its metric.

    The metric divides the averaged gradient by D, its root mean square in the eigenbases. In w̃ the Hessian is
    `A = D^-½ H D^-½`, and the step is one of steepest descent at the rate η. A `TrackedSubspace` follows the top
    eigenpairs (θ_i, x_i) of A: every `every` steps each of 8 shards of the batch answers one direction, by an exact
    product, which costs two gradients of the batch. Along x_i the rate is then `1/|θ_i|`: where that is less than η, or
    wherever it is known, up to 4 η.

    Args:
        optimizer: at its rate by a `NotedRate`; every step that it takes is corrected.
        every: steps from one probe to the next.
        rank: of the space.
        grows: whether rates may be larger than η, too.
        placebo: whether directions stay random, with Rayleigh quotients for eigenvalues.
    """

    def __init__(
        self, optimizer: ReplicaNewton, *, every: int, rank: int = 8, grows: bool = True, placebo: bool = False
    ) -> None:
        step = optimizer.metric_step
        if step is None or not isinstance(step.rate, NotedRate):
            raise TypeError("the optimizer must have the rule 'metric' at a NotedRate")
        self.optimizer, self.metric, self.rate = optimizer, step.metric, step.rate
        self.every, self.grows, self.placebo = every, grows, placebo
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sizes = [p.numel() for p in self.parameters]
        self.space = TrackedSubspace(rank, sum(self.sizes), smoothing=0.2)
        self.random = self.space.directions(rank)
        self.quotients: Tensor | None = None
        optimizer.register_step_post_hook(lambda *_: self._correct())

    def probe(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> int:
        """Ask every shard for one product; returns the samples whose gradients that took."""
        directions = self.random[:SHARDS] if self.placebo else self.space.directions(SHARDS)
        shards = zip(inputs.chunk(SHARDS), targets.chunk(SHARDS), strict=True)
        losses = [partial(_loss, module, x, y) for x, y in shards]
        displacements = torch.stack([self._scaled(q, -0.25) for q in directions])
        _, products = exact_products(module, self.parameters, losses, displacements)
        rows = torch.stack([self._scaled(product, -0.25) for product in products])
        if self.placebo:
            now = (rows * directions).sum(dim=1)
            self.quotients = now if self.quotients is None else torch.lerp(self.quotients, now, 0.2)
        else:
            self.space.observe(rows)
        return 2 * len(targets)

    def _scaled(self, vector: Tensor, power: float) -> Tensor:
        """`D^(2·power)` times a vector: V is D², in units of the first gradient."""
        pieces = []
        for piece, p in zip(torch.split(vector, self.sizes), self.parameters, strict=True):
            state = self.optimizer.state[p]
            V = state["second_moment"] / (1.0 - self.metric.decay ** (state["step"] - 1))
            V *= state["unit"].square()
            rotated = _rotated(state, piece.view(_sides(p.shape))) * V.clamp_min(1e-8 * float(V.max())) ** power
            pieces.append(_rotated(state, rotated, back=True).flatten())
        return torch.cat(pieces)

    def _correct(self) -> None:
        """Take the step that was just taken back along the pairs, and Newton's in its place."""
        pairs, values = self.space.eigenvectors, self.space.eigenvalues
        if self.quotients is not None:
            pairs, values = self.random[: len(self.quotients)], self.quotients
        if not len(values):
            return
        step = torch.cat([self.optimizer.state[p]["last"].flatten() for p in self.parameters])
        eta = self.rate.last
        rates = (1.0 / values.abs()).clamp_max((GROWTH if self.grows else 1.0) * eta)
        along = pairs @ self._scaled(step, 0.25)
        change = self._scaled(((eta - rates).to(along) * along) @ pairs, -0.25)
        with torch.no_grad():
            for piece, p in zip(torch.split(change, self.sizes), self.parameters, strict=True):
                p.add_(piece.view_as(p))
                state = self.optimizer.state[p]
                # As much of it as of the step is in the average already.
                state["average"].add_(piece.view_as(p), alpha=average_weight(state["step"]))
