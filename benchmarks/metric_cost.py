"""What a step of the default rule costs beside the gradient, next to Adam's and SOAP's: taken in turn, one thread.

python benchmarks/metric_cost.py                    # a quarter of an hour and 12 GB; docs/results/metric_cost.json
python benchmarks/metric_cost.py --network convnet  # prints alone
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from replica_newton import ReplicaNewton
from replica_newton.benchmark.models import CausalTransformer
from replica_newton.training.models import reference_convnet

RESULTS = Path("docs/results/metric_cost.json")
GROUP = 5
"""Steps from one basis to the next. A time is the mean of so many, so that all have a turn of the bases in them."""
EVERY = 10
"""K of the bar: as many steps share one further gradient."""

TITLE = f"Over the bar: kronecker by 1.1 Adam + 1/{EVERY} gradient"


@dataclass(frozen=True)
class Case:
    """A network with a batch, and how many groups of steps are timed after the first step."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int
    groups: int


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((784, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _images() -> Tensor:
    return torch.randn(256, 1, 28, 28)


def _text(characters: int, samples: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(characters, (samples, 256))


CASES = {
    "convnet": Case(lambda: reference_convnet((1, 28, 28), 10), _images, 10, 9),
    "MLP 784-800-400-10": Case(lambda: _mlp(800, 400), _images, 10, 5),
    "transformer, 8 × 512": Case(
        lambda: CausalTransformer(100, 256, width=512, heads=8, depth=8), _text(100, 4), 100, 3
    ),
    "transformer, 12 × 768": Case(
        lambda: CausalTransformer(25_000, 256, width=768, heads=12, depth=12), _text(25_000, 4), 25_000, 1
    ),
}


def _soap(network: nn.Module) -> Optimizer:
    from pytorch_optimizer import SOAP

    # Its own limit is 10,000: the bases of the longer sides would then be all there is to time.
    return SOAP(network.parameters(), precondition_frequency=GROUP, max_precondition_dim=1024)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "Adam": lambda network: Adam(network.parameters(), foreach=True),
    "SOAP": _soap,
    "kronecker": lambda network: ReplicaNewton(network.parameters()),
    "diagonal": lambda network: ReplicaNewton(network.parameters(), metric="diagonal"),
    "identity": lambda network: ReplicaNewton(network.parameters(), metric="identity"),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(CASES), action="append", help="may be repeated; default all")
    chosen = parser.parse_args().network or list(CASES)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {name: measure(CASES[name], name) for name in chosen}
    table = Table("ms a step", "N", "gradient", *OPTIMIZERS, "over bar", title=TITLE)
    for name, one in found.items():
        times = (f"{one[key]:.4g}" for key in ("gradient", *OPTIMIZERS))
        table.add_row(name, f"{one['parameters']:,}", *times, f"{over_bar(one):.1f}")
    Console().print(table)
    if chosen == list(CASES):
        content = {"torch": torch.__version__, "threads": 1, "milliseconds": found}
        RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def over_bar(milliseconds: Mapping[str, float]) -> float:
    """What a step of the default rule takes over 1.1 times Adam's and its share of one more gradient."""
    return milliseconds["kronecker"] / (1.1 * milliseconds["Adam"] + milliseconds["gradient"] / EVERY)


def measure(case: Case, name: str) -> dict[str, float]:
    """Milliseconds of a gradient and of each optimizer's own arithmetic, at the same gradients: medians of groups."""
    network, inputs = case.model(), case.inputs()
    optimizers = {key: make(network) for key, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {}

    def timed(key: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault(key, []).append(time.perf_counter() - start)

    def gradient() -> None:
        network.zero_grad()
        logits = network(inputs).flatten(0, -2)
        cross_entropy(logits, torch.randint(case.classes, (len(logits),))).backward()  # type: ignore[no-untyped-call]

    for _ in track(range(1 + GROUP * case.groups), name):
        timed("gradient", gradient)
        start = [parameter.detach().clone() for parameter in network.parameters()]
        for key, optimizer in optimizers.items():
            timed(key, optimizer.step)
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), start, strict=True):
                    parameter.copy_(value)
    typical = {key: 1e3 * _typical(values[1:]) for key, values in seconds.items()}
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())} | typical


def _typical(values: list[float]) -> float:
    return median(sum(values[i : i + GROUP]) / GROUP for i in range(0, len(values), GROUP))


if __name__ == "__main__":
    main()
