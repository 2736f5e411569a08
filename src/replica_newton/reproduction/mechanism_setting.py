"""Where and how much the mechanism is measured: a network at a checkpoint, disjoint samples, grids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from replica_newton.reproduction.mechanism_surface import LossSurface, Samples


@dataclass(frozen=True)
class Scale:
    """How much is measured: sizes of samples, grids, and numbers of batches."""

    steps: int = 600
    early_step: int = 50
    reference: int = 4096
    spectrum: int = 2048
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    shards: tuple[int, ...] = (8, 32, 128, 512, 2048)
    secant_samples: int = 512
    batches: int = 5
    captured_batches: int = 10
    replicas: tuple[int, ...] = (2, 4, 8, 16, 32)
    eigenvalues: int = 24
    sizes: tuple[int, ...] = (1000, 16384)
    seeds: int = 20


QUICK = Scale(
    steps=100,
    early_step=20,
    reference=256,
    spectrum=256,
    rates=(1e-4, 1e-2, 1.0),
    shards=(8, 32),
    secant_samples=128,
    batches=2,
    captured_batches=2,
    replicas=(2, 4, 8),
    eigenvalues=16,
    sizes=(200,),
    seeds=4,
)


@dataclass(frozen=True, eq=False)
class Setting:
    """A network at a checkpoint, and disjoint samples to measure it on.

    Attributes:
        surface: the loss in fp32.
        precise: the loss in fp64.
        early: the loss in fp32 of the network at the early checkpoint.
        reference: stands for the whole data: exact Hessian products.
        fresh: samples for the gradient that no replica saw.
        pool: what the replicas draw from.
        scale: how much is measured.
        seed: of all that is drawn.
    """

    surface: LossSurface
    precise: LossSurface
    early: LossSurface
    reference: Samples
    fresh: Samples
    pool: Samples
    scale: Scale
    seed: int

    def draw(self, replicas: int, shard: int, number: int) -> list[Samples]:
        """Shards of the batch with a given number, without repetition."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        rows = torch.randperm(len(self.pool.targets), generator=generator)[: replicas * shard]
        return self.pool.take(rows).shards(replicas)

    def gradients(self, replicas: int, shard: int, number: int) -> Tensor:
        """Gradients of own shards, all at the shared point, `(M, N)`: those of the local steps."""
        return self.surface.gradients(self.surface.point.expand(replicas, -1), self.draw(replicas, shard, number))
