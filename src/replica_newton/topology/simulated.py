"""M replicas of a module in one process, evaluated together."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from replica_newton.topology.buckets import write
from replica_newton.topology.layout import Layout
from replica_newton.topology.members import LastingMembers
from replica_newton.topology.random_state import RandomState
from replica_newton.topology.standing import Standing

logger = logging.getLogger(__name__)

Criterion = Callable[[Tensor, Tensor], Tensor]
Data = Literal["own", "common"]
"""Which samples a replica evaluates: its own shard of the global batch, or the first shard, common to all."""


Buffers = list[tuple[Tensor, Tensor]]
"""Buffers of a module, each with the values that it had at some time."""


class ReplicaGradients(NamedTuple):
    """What M replicas compute: `losses`, `(M,)`, and `gradients`, `(M, N)`, one row a replica."""

    losses: Tensor
    gradients: Tensor


class Simulated(LastingMembers):
    """M replicas of any module in one process, their gradients evaluated together.

    The global batch is split into M equal shards, replica m holding the m-th. Gradients at M different parameter
    vectors come from one batched pass (`torch.func.vmap` over stacked parameters); a module that cannot be batched
    is evaluated replica by replica, with the same results to rounding.

    Args:
        replicas: M >= 1.
        batched: True demands one batched pass (its error reaches the caller), False a loop, None tries the first
            and falls back to the second, with a warning in the log.

    Attributes:
        steps: steps asked for so far, taken or given up.

    Raises:
        ValueError: if `replicas` is not a positive integer.
    """

    distributed = False
    position = 0

    def __init__(self, replicas: int, *, batched: bool | None = None) -> None:
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1:
            raise ValueError(f"{replicas=} must be an integer >= 1")
        self.replicas = replicas
        self.batched = batched
        self._unbatchable: WeakSet[nn.Module] = WeakSet()

    def __repr__(self) -> str:
        return f"Simulated({self.replicas})"

    def __getstate__(self) -> dict[str, object]:
        return {"replicas": self.replicas, "batched": self.batched}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _unbatchable=WeakSet())

    def closure(
        self, module: nn.Module, criterion: Criterion, inputs: Tensor | tuple[Tensor, ...], targets: Tensor
    ) -> "ReplicaClosure":
        """Closure over one global batch, for `optimizer.step`.

        Args:
            module: the model; its parameters are the point that the replicas share.
            criterion: loss of `(module(*inputs), targets)`, a mean over samples, so that the mean over equal
                shards is the loss of the batch.
            inputs: batch first; a tuple is passed to the module as several arguments.
            targets: batch first.

        Returns:
            A closure that any `torch.optim` optimizer takes, and that also evaluates the M replicas.

        Raises:
            ValueError: if M does not divide the number of samples or inputs and targets differ in it.
        """
        return ReplicaClosure(self, module, criterion, inputs if isinstance(inputs, tuple) else (inputs,), targets)

    def lay_out(self, parameters: Sequence[Tensor]) -> list[int]:  # noqa: ARG002
        """All columns are here; see `Topology`."""
        return []

    @property
    def layout(self) -> Layout:
        """One process with all replicas."""
        return Layout(type(self).__name__, 1, self.replicas)

    def points(self, parameters: Tensor, displacements: Tensor) -> Tensor:
        """Where the replicas stand; see `Topology`."""
        return displacements + parameters.to(displacements.dtype)

    def place(self, parameters: Sequence[Tensor], standing: Standing) -> None:
        """The module stands at the shared parameters; see `Topology`."""
        write(parameters, standing.shared)

    def gradients(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], displacements: Tensor, data: Data
    ) -> ReplicaGradients:
        """Losses and gradients of all replicas; see `Topology`.

        Args:
            closure: made by `closure` of a topology of as many replicas.
            parameters: whose gradients are wanted.
            displacements: `(M, N)`.
            data: own shards, or one common shard.

        Returns:
            Losses `(M,)` and gradients `(M, N)`.

        Raises:
            TypeError: if the closure cannot evaluate replicas.
            ValueError: if it evaluates another number of them.
        """
        if not isinstance(closure, ReplicaClosure):
            name = getattr(closure, "__qualname__", type(closure).__qualname__)
            raise TypeError(f"closure must come from topology.closure(module, criterion, inputs, targets), got {name}")
        if closure.replicas != self.replicas:
            raise ValueError(
                f"closure evaluates {closure.replicas} replicas, the optimizer's topology has {self.replicas}"
            )
        shared = torch.cat([parameter.detach().flatten() for parameter in parameters])
        return closure.gradients(parameters, displacements + shared.to(displacements.dtype), data=data)

    def part(self, vector: Tensor) -> Tensor:
        """All of a vector; see `Topology`."""
        return vector

    def whole(self, part: Tensor) -> Tensor:
        """A vector from all of it; see `Topology`."""
        return part

    def total(self, sums: Tensor) -> Tensor:
        """The sum over one process; see `Topology`."""
        return sums

    def agree(self, message: Tensor) -> Tensor:
        """The message itself; see `Topology`."""
        return message

    def spread_from_first(self, tensors: Sequence[Tensor], phase: str) -> None:
        """Nothing to do in one process; see `Topology`."""

    @property
    def workers(self) -> list[int]:
        """The numbers of the replicas; see `Topology`."""
        return list(range(self.replicas))

    def evaluate(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        points: dict[str, Tensor],
        samples: tuple[Tensor, ...],
        *,
        data: Data,
    ) -> ReplicaGradients:
        """Losses and gradients of M replicas at M points.

        Every replica starts from the module's buffers (batch-norm statistics and the like). On own shards the
        buffers then become the mean over replicas; on common data they stay, and all replicas draw the same random
        numbers (dropout), so that gradients differ by parameters alone.

        Args:
            module: the model.
            loss: scalar loss of `(state, *samples)`, where state maps names to parameters and buffers.
            points: by parameter name, `(M, *shape)`.
            samples: tensors `(M, samples/M, ...)`, of which every replica takes its row; `(samples/M, ...)` where
                the data is common.
            data: what `samples` holds.

        Returns:
            Losses `(M,)` and gradients `(M, N)`, parameters in the order of `points`.
        """
        buffers = {name: buffer.expand(self.replicas, *buffer.shape).clone() for name, buffer in module.named_buffers()}
        losses, gradients, buffers = self._evaluate(module, loss, points, buffers, samples, data)
        if data == "own":
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    rows = buffers[name]
                    # A constant would drift by the rounding of its mean.
                    if not torch.equal(rows, buffer.expand_as(rows)):
                        buffer.copy_(rows.mean(dim=0) if rows.is_floating_point() else rows[0])
        rows_of = [rows.reshape(self.replicas, rows[0].numel()) for rows in gradients]
        return ReplicaGradients(losses, torch.cat(rows_of, dim=1))

    def _evaluate(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        points: dict[str, Tensor],
        buffers: dict[str, Tensor],
        samples: tuple[Tensor, ...],
        data: Data,
    ) -> tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]:
        if self.batched is not False and module not in self._unbatchable:
            fresh = {name: buffer.clone() for name, buffer in buffers.items()}
            random_state = torch.get_rng_state()
            try:
                return *_batched(loss, points, fresh, samples, data), fresh
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if self.batched:
                    raise
                reason = str(error).partition("\n")[0]
                # Or a run would depend on which of its steps met the module first (a resumed one meets it again).
                torch.set_rng_state(random_state)
            result = *_looped(loss, points, buffers, samples, data), buffers
            self._unbatchable.add(module)
            logger.warning("%s cannot be batched, its replicas run in a loop (%s)", type(module).__name__, reason)
            return result
        return *_looped(loss, points, buffers, samples, data), buffers


def _batched(
    loss: Callable[..., Tensor],
    points: dict[str, Tensor],
    buffers: dict[str, Tensor],
    samples: tuple[Tensor, ...],
    data: Data,
) -> tuple[Tensor, Sequence[Tensor]]:
    """All replicas in one pass."""
    own = data == "own"
    evaluate = vmap(
        grad_and_value(lambda parameters, buffers, *samples: loss(parameters | buffers, *samples)),
        in_dims=(0, 0, *[0 if own else None] * len(samples)),
        randomness="different" if own else "same",
    )
    # Parameters that do not vary must not hold on to the graph of the pass.
    with torch.no_grad():
        gradients, losses = evaluate(points, buffers, *samples)
    return losses, list(gradients.values())


def _looped(
    loss: Callable[..., Tensor],
    points: dict[str, Tensor],
    buffers: dict[str, Tensor],
    samples: tuple[Tensor, ...],
    data: Data,
) -> tuple[Tensor, Sequence[Tensor]]:
    """One replica after the other."""
    own = data == "own"
    replicas = len(next(iter(points.values())))
    losses, gradients = [], []
    for m in range(replicas):
        parameters = {name: rows[m].detach().requires_grad_() for name, rows in points.items()}
        state = parameters | {name: rows[m] for name, rows in buffers.items()}
        shared_random_state = not own and m < replicas - 1
        with torch.enable_grad(), torch.random.fork_rng(enabled=shared_random_state):
            value = loss(state, *(rows[m] if own else rows for rows in samples))
            gradients.append(torch.autograd.grad(value, list(parameters.values()), materialize_grads=True))
        if any(gradient.layout != torch.strided for gradient in gradients[-1]):
            raise ValueError("sparse gradients are not supported")
        losses.append(value.detach())
    return torch.stack(losses), [torch.stack(rows) for rows in zip(*gradients, strict=True)]


def backward(module: nn.Module, criterion: Criterion, samples: tuple[Tensor, ...]) -> Tensor:
    """Gradient of a batch at the module's parameters, left in `.grad`.

    Args:
        module: the model.
        criterion: loss of `(module(*inputs), targets)`.
        samples: the inputs and, last, the targets.

    Returns:
        The loss.
    """
    module.zero_grad()
    with torch.enable_grad():
        *inputs, targets = samples
        loss = criterion(module(*inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def snapshot(module: nn.Module) -> Buffers:
    """The buffers of a module with what they hold now.

    Args:
        module: the module.

    Returns:
        Buffers and copies of them.
    """
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def write_back(buffers: Buffers) -> None:
    """Put buffers back to what they held.

    Args:
        buffers: from `snapshot`.
    """
    with torch.no_grad():
        for buffer, values in buffers:
            buffer.copy_(values)


class BatchClosure:
    """A batch with what it is evaluated by, and where: what closures of all topologies have.

    Args:
        topology: where the replicas live.
        module: the model.
        criterion: loss of (outputs, targets), a mean over samples.
        samples: inputs and targets that are here.

    Attributes:
        samples_evaluated: samples whose gradient has been computed so far, at whatever point.
    """

    def __init__(
        self, topology: LastingMembers, module: nn.Module, criterion: Criterion, samples: tuple[Tensor, ...]
    ) -> None:
        self._topology = topology
        self._module = module
        self._criterion = criterion
        self._samples = samples
        self._before: Buffers = []
        self.samples_evaluated = 0

    @property
    def replicas(self) -> int:
        """M, the number of shards of the batch."""
        return self._topology.replicas

    def restore(self) -> None:
        """Put the module's buffers back to where they were before the last evaluation on own shards."""
        write_back(self._before)


class ReplicaClosure(BatchClosure):
    """One global batch, to be evaluated at the shared parameters or by M replicas at M points.

    Made by `Simulated.closure`. Called without arguments it does what `torch.optim` expects of a closure: the
    gradient of the whole batch at the module's parameters is left in `.grad` and the loss returned.

    Attributes:
        samples_evaluated: samples whose gradient has been computed so far, at whatever point.
    """

    _topology: Simulated

    def __init__(
        self, topology: Simulated, module: nn.Module, criterion: Criterion, inputs: tuple[Tensor, ...], targets: Tensor
    ) -> None:
        sizes = {len(rows) for rows in (*inputs, targets)}
        if len(sizes) != 1:
            raise ValueError(f"inputs and targets must hold the same number of samples, got {sorted(sizes)}")
        self._size = sizes.pop()
        if self._size == 0 or self._size % topology.replicas:
            raise ValueError(f"replicas={topology.replicas} must divide the batch of {self._size} samples")
        super().__init__(topology, module, criterion, (*inputs, targets))
        self._random_state = RandomState(())

    @property
    def samples(self) -> int:
        """Number of samples in the global batch."""
        return self._size

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    def losses(self) -> list[Callable[[], Tensor]]:
        """Functions that return the loss of one replica's shard each, M of them, as the module stands."""

        def loss(samples: tuple[Tensor, ...]) -> Tensor:
            *inputs, targets = samples
            return self._criterion(self._module(*inputs), targets)

        shards = zip(*(rows.chunk(self.replicas) for rows in self._samples), strict=True)
        return [partial(loss, shard) for shard in shards]

    def __call__(self) -> Tensor:
        """Gradient of the whole batch at the module's parameters, left in `.grad`; returns the loss."""
        loss = backward(self._module, self._criterion, self._samples)
        self.samples_evaluated += self._size
        return loss

    def gradients(self, parameters: Sequence[Tensor], points: Tensor, *, data: Data = "own") -> ReplicaGradients:
        """Losses and gradients of the M replicas at M points.

        Args:
            parameters: tensors of the module that vary; all others are as they stand in the module.
            points: `(M, N)`, the values of `parameters`, flattened one after the other, for every replica.
            data: "own": replica m on its own shard, M gradients of samples/M samples. "common": all on the first
                shard, the same number of samples at M points.

        Returns:
            Losses `(M,)` and gradients `(M, N)`.

        Raises:
            ValueError: if a tensor is no parameter of the module, its gradient is sparse, or `points` is not `(M, N)`.
        """
        if data == "own":
            self._before = snapshot(self._module)
            self._random_state = RandomState(parameters)
        return self._gradients(parameters, points, data)

    def gradients_again(self, parameters: Sequence[Tensor], points: Tensor) -> Tensor:
        """Gradients on own shards at other points, with the random numbers of the last evaluation of them.

        They differ from the last ones by the points alone. Buffers and the random state stay as they are.

        Args:
            parameters: as for `gradients`.
            points: `(M, N)`.

        Returns:
            `(M, N)`.
        """
        now = snapshot(self._module)
        try:
            with self._random_state.again():
                return self._gradients(parameters, points, "own").gradients
        finally:
            write_back(now)

    def _gradients(self, parameters: Sequence[Tensor], points: Tensor, data: Data) -> ReplicaGradients:
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        if any(id(parameter) not in names for parameter in parameters):
            raise ValueError("every parameter of the optimizer must belong to the module of the closure")
        M, sizes = self.replicas, [parameter.numel() for parameter in parameters]
        if points.shape != (M, sum(sizes)):
            raise ValueError(f"points must be (M, N) = {(M, sum(sizes))}, got {tuple(points.shape)}")
        stacked = {
            names[id(parameter)]: piece.reshape(M, *parameter.shape).to(parameter.dtype)
            for parameter, piece in zip(parameters, torch.split(points, sizes, dim=1), strict=True)
        }
        shards = tuple(rows.reshape(M, -1, *rows.shape[1:]) for rows in self._samples)
        self.samples_evaluated += self._size
        return self._topology.evaluate(
            self._module, self._loss, stacked, shards if data == "own" else tuple(rows[0] for rows in shards), data=data
        )

    def _loss(self, state: dict[str, Tensor], *samples: Tensor) -> Tensor:
        *inputs, targets = samples
        return self._criterion(functional_call(self._module, state, tuple(inputs)), targets)
