"""What a step of the default rule costs beside the gradient, next to Adam's and SOAP's: taken in turn.

On the CPU with one thread, or on a GPU, whose batches of text are larger: there a gradient fills it.

python benchmarks/metric_cost.py                    # a quarter of an hour and 12 GB; docs/results/metric_cost.json
python benchmarks/metric_cost.py --network convnet  # prints alone
python benchmarks/metric_cost.py --device cuda      # a minute; docs/results/metric_cost_cuda.json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

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
    copies: int = 1
    """Of the inputs, in a batch on a GPU."""

    @property
    def is_text(self) -> bool:
        """Whether there is a class for every input element."""
        return not self.inputs().is_floating_point()


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
        lambda: CausalTransformer(100, 256, width=512, heads=8, depth=8), _text(100, 4), 100, 3, 12
    ),
    "transformer, 12 × 768": Case(
        lambda: CausalTransformer(25_000, 256, width=768, heads=12, depth=12), _text(25_000, 4), 25_000, 1, 12
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
    chosen, device, out = command(__doc__ or "")
    found = {name: measure(CASES[name], name, device) for name in chosen}
    table = Table("ms a step", "N", "gradient", *OPTIMIZERS, "over bar", title=TITLE)
    for name, one in found.items():
        times = (f"{one[key]:.4g}" for key in ("gradient", *OPTIMIZERS))
        table.add_row(name, f"{one['parameters']:,}", *times, f"{over_bar(one):.1f}")
    Console().print(table)
    keep(out / "metric_cost", device, found, threads=1)


def command(description: str) -> tuple[list[str], torch.device, Path]:
    """The networks that a command line asks for, the device and the folder of the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(CASES), action="append", help="may be repeated; default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU of CUDA, there is none")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return options.network or list(CASES), torch.device(options.device), options.out


def keep(file: Path, device: torch.device, milliseconds: Mapping[str, Any], **settings: int) -> None:
    """Write what was found of all networks, a GPU's to a file of its own; of some alone, nothing."""
    if list(milliseconds) != list(CASES):
        return
    content: dict[str, Any] = {"torch": torch.__version__} | settings
    if device.type == "cuda":
        file, content["card"] = file.with_name(f"{file.name}_cuda"), torch.cuda.get_device_name(device)
    text = json.dumps(content | {"milliseconds": milliseconds}, indent=1, ensure_ascii=False)
    file.with_suffix(".json").write_text(text + "\n")


def over_bar(milliseconds: Mapping[str, float]) -> float:
    """What a step of the default rule takes over 1.1 times Adam's and its share of one more gradient."""
    return milliseconds["kronecker"] / (1.1 * milliseconds["Adam"] + milliseconds["gradient"] / EVERY)


def gradients_to_the_bar(milliseconds: Mapping[str, float]) -> float:
    """How many times as long a gradient must take for the default rule's step to be at the bar."""
    return EVERY * (milliseconds["kronecker"] - 1.1 * milliseconds["Adam"]) / milliseconds["gradient"]


def batch_of(case: Case, device: torch.device) -> Tensor:
    """Inputs on a device."""
    inputs = case.inputs().to(device)
    return inputs if device.type == "cpu" else inputs.repeat(case.copies, *[1] * (inputs.dim() - 1))


def loss_of(network: nn.Module, case: Case, inputs: Tensor) -> Callable[[], Tensor]:
    """The loss of a batch, with classes drawn now."""
    count = inputs.numel() if case.is_text else len(inputs)
    classes = torch.randint(case.classes, (count,), device=inputs.device)
    return lambda: cross_entropy(network(inputs).flatten(0, -2), classes)


@contextmanager
def clock(device: torch.device, into: list[float]) -> Iterator[None]:
    """Append the milliseconds that what is done inside takes on a device."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    yield
    finish()
    into.append(1e3 * (time.perf_counter() - start))


def measure(case: Case, name: str, device: torch.device) -> dict[str, float]:
    """Milliseconds of a gradient and of each optimizer's own arithmetic, at the same gradients: medians of groups."""
    network, inputs = case.model().to(device), batch_of(case, device)
    optimizers = {key: make(network) for key, make in OPTIMIZERS.items()}
    taken: dict[str, list[float]] = {key: [] for key in ("gradient", *optimizers)}
    for _ in track(range(1 + GROUP * case.groups), name):
        loss = loss_of(network, case, inputs)
        with clock(device, taken["gradient"]):
            network.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
        start = [parameter.detach().clone() for parameter in network.parameters()]
        for key, optimizer in optimizers.items():
            with clock(device, taken[key]):
                optimizer.step()
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), start, strict=True):
                    parameter.copy_(value)
    typical = {key: _typical(values[1:]) for key, values in taken.items()}
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())} | typical


def _typical(values: list[float]) -> float:
    return median(sum(values[i : i + GROUP]) / GROUP for i in range(0, len(values), GROUP))


if __name__ == "__main__":
    main()
