"""How a method takes a step, and what the step costs: samples whose gradient is computed, probes included."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from replica_newton.optim import ReplicaNewton
from replica_newton.topology import Simulated
from replica_newton.topology.simulated import Criterion

HESSIAN_PRODUCT_COST = 2
"""Gradients that a Hessian-vector product costs: it goes forwards and backwards through the pass of a gradient."""


class Stepper:
    """An optimizer with a closure that it may call as often as it likes; every call is counted.

    Args:
        module: the network.
        criterion: loss of `(module(inputs), targets)`, a mean over samples.
        optimizer: of the network's parameters.
        topology: evaluates the batch; `Simulated(M)` for methods with replicas.
        scheduled: whether the rate falls with the budget left; False for methods that bring a schedule of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        optimizer: Optimizer,
        topology: Simulated | None = None,
        *,
        scheduled: bool = True,
    ) -> None:
        self.module = module
        self.criterion = criterion
        self.optimizer = optimizer
        self.topology = topology or Simulated(1)
        self.scheduled = scheduled
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]

    def scale_rate(self, factor: float) -> None:
        """Put the rate at a fraction of its first value.

        Args:
            factor: in 0 … 1.
        """
        if self.scheduled:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Take one step.

        Args:
            inputs: of the batch.
            targets: of the batch.

        Returns:
            Loss of the batch before the step, and the samples whose gradient was computed.
        """
        closure = self.topology.closure(self.module, self.criterion, inputs, targets)
        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        return float(loss), closure.samples_evaluated

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it is entered, the network stands where the method would have it evaluated."""
        yield


class FreshLBFGS(Stepper):
    """L-BFGS that forgets its pairs from one batch to the next: they would compare gradients of different data."""

    optimizer: LBFGS

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """See `Stepper`."""
        self.optimizer.state.clear()
        return super().step(inputs, targets)


class Averaging(Stepper):
    """A method of pytorch-optimizer that trains at one point and is evaluated at another, and needs no schedule.

    Args:
        module: the network.
        criterion: see `Stepper`.
        optimizer: has `train` and `eval`.
    """

    def __init__(self, module: nn.Module, criterion: Criterion, optimizer: Optimizer) -> None:
        super().__init__(module, criterion, optimizer, scheduled=False)
        self._points: Any = optimizer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Stepper`: the averaged point."""
        self._points.eval()
        try:
            yield
        finally:
            self._points.train()


class AtItsAverage(Stepper):
    """`ReplicaNewton` with the rule "metric": it brings its schedule, and is evaluated at its average.

    Args:
        module: the network.
        criterion: see `Stepper`.
        optimizer: the optimizer.
    """

    def __init__(self, module: nn.Module, criterion: Criterion, optimizer: ReplicaNewton) -> None:
        super().__init__(module, criterion, optimizer, scheduled=False)
        self._points = optimizer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Stepper`: the average."""
        with self._points.averaged():
            yield


class DiagonalHessian(Stepper):
    """A method of pytorch-optimizer whose steps take Hutchinson's estimate of the Hessian's diagonal, `z ⊙ (H z)`.

    The estimate is made here, from `torch.autograd.grad`: `backward(create_graph=True)`, which those methods ask for,
    leaves a graph in every parameter.

    Args:
        module: the network.
        criterion: see `Stepper`.
        optimizer: its `step` takes `hessian`.
        every: steps from one estimate to the next; as the optimizer's `update_period`.
        gaussian: whether z is normal, and not of random signs.
    """

    def __init__(
        self, module: nn.Module, criterion: Criterion, optimizer: Optimizer, *, every: int, gaussian: bool
    ) -> None:
        super().__init__(module, criterion, optimizer)
        self._every = every
        self._gaussian = gaussian
        self._steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """See `Stepper`."""
        due = self._steps % self._every == 0
        self._steps += 1
        if not due:
            return super().step(inputs, targets)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        loss = self.criterion(self.module(inputs), targets)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        diagonal = self._diagonal(gradients, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.detach()
        self.optimizer.step(hessian=diagonal)  # type: ignore[call-overload]
        return float(loss.detach()), (1 + HESSIAN_PRODUCT_COST) * len(inputs)

    def _diagonal(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        probes = [
            torch.randn_like(parameter) if self._gaussian else torch.randint_like(parameter, 2).mul_(2.0).sub_(1.0)
            for parameter in parameters
        ]
        products = torch.autograd.grad(gradients, parameters, grad_outputs=probes, materialize_grads=True)
        return [product * probe for product, probe in zip(products, probes, strict=True)]
