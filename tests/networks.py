"""Small networks with their batches, and their replicas as deep copies that autograd differentiates one by one."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from reference import F64, generator, normal, paper_inverse_hvp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from replica_newton import ReplicaNewton, Simulated
from replica_newton.topology import ReplicaClosure

Criterion = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """A module, a criterion and one global batch of 24 samples, which 1, 2, 3, 4, 6 and 8 replicas divide."""

    module: nn.Module
    criterion: Criterion
    inputs: tuple[Tensor, ...]
    targets: Tensor


class TiedAutoencoder(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.decoder(torch.tanh(self.encoder(x)))


class OddParameters(nn.Module):
    """Parameters of no dimension, of no element, and not contiguous; one that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.weight = nn.Parameter(torch.randn(4, 3).T)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.tanh(self.scale * x @ self.weight) + self.empty.sum()


class LastState(nn.Module):
    """LSTM whose last output is read; its cells keep references to their weights, beside the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.cells(x)[0][:, -1])


class Branching(nn.Module):
    """Control flow that depends on data: no batched pass can follow it. Dropout comes first."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 1), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.dropout(self.linear(x))
        return y.exp() if y.sum() > 0 else y.tanh()


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def _labels(classes: int) -> Tensor:
    return torch.randint(classes, (24,), generator=generator(9))


def convnet() -> Problem:
    """A convolution with pooling and a linear layer: 69 parameters."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))

    return Problem(_seeded(build), cross_entropy, (normal(24, 1, 6, 6, seed=1),), _labels(3))


def tied() -> Problem:
    """Tied weights."""
    return Problem(_seeded(TiedAutoencoder), mse_loss, (normal(24, 3, seed=1),), normal(24, 3, seed=2))


def frozen() -> Problem:
    """A first layer that requires no gradient."""
    module = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    module[0].requires_grad_(False)
    return Problem(module, mse_loss, (normal(24, 3, seed=1),), normal(24, 1, seed=2))


def batch_norm() -> Problem:
    """Batch normalisation: buffers, and samples that interact."""
    module = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))
    return Problem(module, mse_loss, (normal(24, 3, seed=1) + 0.5,), normal(24, 1, seed=2))


def embedding() -> Problem:
    """Integer inputs into an embedding, layer normalisation."""
    module = _seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    return Problem(module, cross_entropy, (_labels(5),), _labels(3))


def bilinear() -> Problem:
    """Two inputs."""
    inputs = (normal(24, 2, seed=1), normal(24, 3, seed=2))
    return Problem(_seeded(lambda: nn.Bilinear(2, 3, 2)), mse_loss, inputs, normal(24, 2, seed=3))


def odd_parameters() -> Problem:
    """Parameters of unusual shape and layout."""
    return Problem(_seeded(OddParameters), mse_loss, (normal(24, 3, seed=1),), normal(24, 4, seed=2))


def recurrent() -> Problem:
    """An LSTM over four steps."""
    return Problem(_seeded(LastState), mse_loss, (normal(24, 4, 2, seed=1),), normal(24, 1, seed=2))


def branching(dropout: float = 0.0) -> Problem:
    """Data-dependent control flow."""
    return Problem(_seeded(lambda: Branching(dropout)), mse_loss, (normal(24, 3, seed=1),), normal(24, 1, seed=2))


def mlp() -> Problem:
    """A 3–4–1 tanh network on noisy targets: 21 parameters."""
    module = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    return Problem(module, mse_loss, (normal(24, 3, seed=1),), normal(24, 1, seed=2))


BATCHABLE = (convnet, tied, frozen, batch_norm, embedding, bilinear, odd_parameters, recurrent)


class LinearTerms(nn.Module):
    """Parameters w themselves, `(samples, N)`, one tensor each so that every one can have a rate of its own."""

    def __init__(self, *start: float) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.tensor(value, dtype=F64)) for value in start])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.stack(list(self.w)).expand(len(x), -1)


def separable_quadratic(curvatures: Sequence[float], start: Sequence[float], *, seed: int = 0) -> Problem:
    """Samples `½ Σ h_i w_i² + tᵀw` with one Hessian, diag(h), and linear terms t of their own."""
    h = torch.tensor(curvatures, dtype=F64)
    targets = normal(24, len(h), seed=seed)
    return Problem(
        LinearTerms(*start), lambda w, t: (h * w * w / 2 + t * w).sum(dim=1).mean(), (torch.zeros(24, 1),), targets
    )


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, one tensor after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def points_around(parameters: Sequence[Tensor], M: int, *, seed: int = 5, scale: float = 0.3) -> Tensor:
    """`(M, N)` points near the parameters."""
    center = flat(parameters)
    return center + scale * normal(M, center.numel(), seed=seed)


def shards(problem: Problem, M: int, data: str) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs and targets of every replica: its own shard, or the first."""
    size = len(problem.targets) // M
    for m in range(M):
        rows = slice(m * size, (m + 1) * size) if data == "own" else slice(size)
        yield tuple(tensor[rows] for tensor in problem.inputs), problem.targets[rows]


class Copies(NamedTuple):
    """Losses `(M,)` and gradients `(M, N)` of deep copies, and the copies after their pass."""

    losses: Tensor
    gradients: Tensor
    modules: list[nn.Module]


def copies(problem: Problem, points: Tensor, data: str = "own", *, names: Sequence[str] | None = None) -> Copies:
    """Replicas as deep copies with the parameters `names` (by default the trained ones) at the rows of `points`."""
    losses, gradients, modules = [], [], []
    for point, (inputs, targets) in zip(points, shards(problem, len(points), data), strict=True):
        module = copy.deepcopy(problem.module)
        named = dict(module.named_parameters())
        varied = trained(module) if names is None else [named[name] for name in names]
        with torch.no_grad():
            for parameter, piece in zip(varied, point.split([p.numel() for p in varied]), strict=True):
                parameter.copy_(piece.view(parameter.shape))
        with torch.enable_grad():
            loss = problem.criterion(module(*inputs), targets)
            pieces = torch.autograd.grad(loss, varied, materialize_grads=True)
        losses.append(loss.detach())
        gradients.append(flat(pieces))
        modules.append(module)
    return Copies(torch.stack(losses), torch.stack(gradients), modules)


class Trajectory(NamedTuple):
    """Parameters `(steps, N)` after every step, steps that were replaced, and loss before every step."""

    parameters: Tensor
    fallbacks: int
    losses: Tensor


def paper_scheme(
    problem: Problem, M: int, rates: Sequence[Tensor | float], *, secant_data: str = "own", sign: float = 1.0
) -> Trajectory:
    """The paper's 1-step synchronous scheme, literally: deep copies, autograd, and the SVD of the N×M matrix.

    `rates` has one entry a step, a number or `(N,)`; `sign` −1 minimises the negated loss.
    """
    w = flat(trained(problem.module))
    d = torch.zeros(M, w.numel(), dtype=F64)
    fallbacks, trajectory, losses = 0, [], []
    for rate in rates:
        own = copies(problem, w + d, "own")
        g = sign * own.gradients
        secants = g if secant_data == "own" else sign * copies(problem, w + d, "common").gradients
        mean = sum(g) / M
        direction = paper_inverse_hvp(d, secants, mean) if d.abs().max() > 0 else mean
        if (rate * direction) @ mean <= 0:
            direction, fallbacks = mean, fallbacks + 1
        w = w - rate * direction
        d = torch.stack([-rate * (row - mean) for row in g])
        trajectory.append(w)
        losses.append(own.losses.mean())
    return Trajectory(torch.stack(trajectory), fallbacks, torch.stack(losses))


def train(optimizer: ReplicaNewton, problem: Problem, steps: int) -> Trajectory:
    """Steps of an optimizer on the whole batch."""
    trajectory, losses = [], []
    for _ in range(steps):
        losses.append(optimizer.step(closure_of(problem, optimizer.topology.replicas)))
        trajectory.append(flat(trained(problem.module)))
    return Trajectory(torch.stack(trajectory), optimizer.fallbacks, torch.stack(losses))


def closure_of(problem: Problem, topology: Simulated | int) -> ReplicaClosure:
    """Closure over the batch of a problem."""
    topology = Simulated(topology) if isinstance(topology, int) else topology
    return topology.closure(problem.module, problem.criterion, problem.inputs, problem.targets)
