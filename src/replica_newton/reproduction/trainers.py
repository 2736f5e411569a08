"""What the paper's replicas are compared with: first-order methods, LeCun's rate and this library's step."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from replica_newton.monitor import CurvatureMonitor
from replica_newton.optim import ReplicaNewton
from replica_newton.topology import Simulated

LARGEST_MEASURED_RATE = 1.0
"""On a plateau curvature vanishes and its inverse is no rate; SGD at 1 already diverges on MNIST."""
_OBSERVED_EVERY = 10


class Trainer(Protocol):
    """What trains a network, one batch a step."""

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Loss before the step, and number of samples whose gradient was computed."""
        ...

    def network(self) -> nn.Module:
        """The network as it stands."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a state."""
        ...


class OptimizerTrainer:
    """A network and a `torch.optim` optimizer, its batches split over replicas if it has any.

    Args:
        module: the network.
        optimizer: of its parameters.
        topology: evaluates batches; `Simulated(1)` for first-order methods.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, topology: Simulated) -> None:
        self.module = module
        self.optimizer = optimizer
        self.topology = topology

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """See `Trainer`."""
        closure = self.topology.closure(self.module, cross_entropy, inputs, targets)
        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        return float(loss), closure.samples_evaluated

    def network(self) -> nn.Module:
        """See `Trainer`."""
        return self.module

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer`."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Trainer`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class AveragedTrainer(OptimizerTrainer):
    """The same, its network at the average over the last steps; see `ReplicaNewton.averaged`."""

    optimizer: ReplicaNewton

    def network(self) -> nn.Module:
        """See `Trainer`."""
        with self.optimizer.averaged():
            return copy.deepcopy(self.module)


class SharpnessRate(OptimizerTrainer):
    """SGD at LeCun's optimal rate, 1/λ_max, as M replicas measure it every ten steps.

    The rate starts at the given one and is at most 1.

    Args:
        module: the network.
        replicas: M, of the `CurvatureMonitor`.
        rate: until there is a measurement.

    Source:
        LeCun, Simard and Pearlmutter (1993); Arnold and Wang (2017), section 2.
    """

    def __init__(self, module: nn.Module, replicas: int, rate: float) -> None:
        super().__init__(module, SGD(module.parameters(), rate), Simulated(replicas))
        self.monitor = CurvatureMonitor(module, rank=replicas, every=_OBSERVED_EVERY)

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """See `Trainer`."""
        closure = self.topology.closure(self.module, cross_entropy, inputs, targets)
        before = self.monitor.samples_evaluated
        observation = self.monitor.observe(closure)
        if observation is not None and observation.sharpness > 0.0:
            for group in self.optimizer.param_groups:
                group["lr"] = min(observation.learning_rate, LARGEST_MEASURED_RATE)
        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        return float(loss), closure.samples_evaluated + self.monitor.samples_evaluated - before

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer`."""
        return super().state_dict() | {"monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Trainer`."""
        super().load_state_dict(state)
        self.monitor.load_state_dict(state["monitor"])


def _saddle_free(module: nn.Module, replicas: int, rate: float) -> Trainer:
    topology = Simulated(replicas)
    optimizer = ReplicaNewton(
        module.parameters(), rate, rule="saddle-free", topology=topology, secant_data="common", damping=1.0
    )
    return OptimizerTrainer(module, optimizer, topology)


TRAINERS: dict[str, Callable[[nn.Module, int, float], Trainer]] = {
    "sgd": lambda module, _, rate: OptimizerTrainer(module, SGD(module.parameters(), rate), Simulated(1)),
    "momentum": lambda module, _, rate: OptimizerTrainer(
        module, SGD(module.parameters(), rate, momentum=0.9), Simulated(1)
    ),
    "adam": lambda module, _, rate: OptimizerTrainer(module, Adam(module.parameters(), rate), Simulated(1)),
    "sharpness-rate": SharpnessRate,
    "replica-newton": lambda module, _, rate: AveragedTrainer(
        module, ReplicaNewton(module.parameters(), rate, rule="metric"), Simulated(1)
    ),
    "saddle-free": _saddle_free,
}
"""Trainers of (network, M, rate) by the name of their method; torch's optimizers have one replica."""
