"""What a step of the default rule costs beside the gradient, next to Adam's: medians, taken in turn, one thread.

python benchmarks/metric_cost.py        # a minute; writes docs/results/metric_cost.json
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from replica_newton import ReplicaNewton
from replica_newton.training.models import reference_convnet

RESULTS = Path("docs/results/metric_cost.json")
ROUNDS, FIRST = 25, 5
BATCH = 256


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((784, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: reference_convnet((1, 28, 28), 10),
    "MLP 784-256-128-10": lambda: _mlp(256, 128),
    "MLP 784-800-400-10": lambda: _mlp(800, 400),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "Adam": lambda network: Adam(network.parameters(), foreach=True),
    "kronecker": lambda network: ReplicaNewton(network.parameters()),
    "diagonal": lambda network: ReplicaNewton(network.parameters(), metric="diagonal"),
    "identity": lambda network: ReplicaNewton(network.parameters(), metric="identity"),
}


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {name: measure(make()) for name, make in NETWORKS.items()}
    table = Table("ms a step", "N", "gradient", *OPTIMIZERS)
    for name, one in found.items():
        table.add_row(name, f"{one['parameters']:,}", *(f"{one[key]:.2f}" for key in ("gradient", *OPTIMIZERS)))
    Console().print(table)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "batch": BATCH, "milliseconds": found}, indent=1) + "\n")


def measure(network: nn.Module) -> dict[str, float]:
    """Milliseconds of a gradient of a batch and of each optimizer's own arithmetic, at the same gradients."""
    inputs, targets = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    optimizers = {name: make(network) for name, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    def gradient() -> None:
        network.zero_grad()
        cross_entropy(network(inputs), targets).backward()  # type: ignore[no-untyped-call]

    for _ in range(FIRST + ROUNDS):
        timed("gradient", gradient)
        start = [parameter.detach().clone() for parameter in network.parameters()]
        for name, optimizer in optimizers.items():
            timed(name, optimizer.step)
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), start, strict=True):
                    parameter.copy_(value)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # Means of the middle: a basis is turned in every fifth step, and a median would leave that out.
    return {"parameters": parameters} | {name: 1e3 * _typical(values[FIRST:]) for name, values in seconds.items()}


def _typical(values: list[float]) -> float:
    """Median over groups of five steps of their mean."""
    return median(sum(values[i : i + 5]) / 5 for i in range(0, len(values), 5))


if __name__ == "__main__":
    main()
