"""Random small problems, many of them ill-posed on purpose: does the default of ReplicaNewton come through?

Depth, width, activation, normalisation, scale of the weights, of the inputs (1e-3 … 1e3) and of the targets, batches of
one to 128, loss, dropout, sparse inputs and zero layers are drawn at random. Beside it the best of three rates of Adam
along a cosine: not a tuned peer, but a sign of what is possible. Writes `random_problems.json`, and
`other_problems.py` puts what came out on its page.

    python benchmarks/random_problems.py               # 120 problems, five minutes on one core
    python benchmarks/random_problems.py --only 48,60  # prints these
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss, mse_loss
from torch.optim import Adam, Optimizer

from replica_newton import ReplicaNewton
from replica_newton.files import replace_file
from replica_newton.topology.simulated import Criterion
from replica_newton.training.loop import batches

RESULTS = Path("docs/results/random_problems.json")
STEPS, SAMPLES, ADAM_RATES = 300, 512, (1e-3, 1e-2, 1e-1)
LOWER = 0.3
"""Relative rate of ours, to see whether steps are too long."""


@dataclass(frozen=True)
class Problem:
    """A network, data for it, and how it is trained."""

    text: str
    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    criterion: Criterion
    batch_size: int


def problem(seed: int) -> Problem:
    """The problem of a seed."""
    draw = random.Random(seed)  # noqa: S311
    ins, outs = draw.choice([1, 3, 10, 40]), draw.choice([1, 2, 5, 20])
    depth, width = draw.choice([0, 1, 2, 4, 6]), draw.choice([4, 16, 50, 128])
    activation = draw.choice([nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.LeakyReLU])
    norm = draw.choice([None, None, nn.LayerNorm, nn.BatchNorm1d])
    gain, scale = draw.choice([0.03, 0.3, 1, 1, 1, 3, 10]), 10.0 ** draw.choice([-3, -1, 0, 0, 0, 1, 3])
    bias, zero, sparse = draw.random() < 0.8, draw.random() < 0.15, draw.random() < 0.3
    size, dropout = draw.choice([1, 2, 8, 32, 128]), draw.choice([0.0, 0.0, 0.3])
    name, target_scale = draw.choice(["mse", "mse", "ce", "ce", "l1", "bce"]), 10.0 ** draw.choice([-3, 0, 0, 2, 4])
    size = max(size, 8) if norm is nn.BatchNorm1d else size

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for before in [ins, *[width] * depth][:depth]:
            layers += [nn.Linear(before, width, bias=bias), *([] if norm is None else [norm(width)]), activation()]
            layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Linear(width if depth else ins, outs, bias=bias))
        with torch.no_grad():
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(gain)
            if zero:
                nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
        return nn.Sequential(*layers)

    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, ins, generator=generator)
    first, second = torch.randn(ins, 32, generator=generator), torch.randn(32, outs, generator=generator)
    noise = 0.1 * torch.randn(SAMPLES, outs, generator=generator)
    truth = torch.tanh(inputs @ first / ins**0.5) @ second / 32**0.5 + noise
    if sparse:
        inputs = inputs * (torch.rand(inputs.shape, generator=generator) < 0.2)
    losses: dict[str, tuple[Tensor, Criterion]] = {
        "mse": (truth * target_scale, mse_loss),
        "l1": (truth * target_scale, l1_loss),
        "bce": ((truth > 0).float(), binary_cross_entropy_with_logits),
        "ce": (truth.argmax(dim=1), cross_entropy),
    }
    targets, criterion = losses[name]
    kinds = (activation.__name__, "no norm" if norm is None else norm.__name__, f"weights × {gain:g}")
    flags = [label for label, on in (("no bias", not bias), ("last layer zero", zero), ("sparse", sparse)) if on]
    text = ", ".join(
        [f"{depth} × {width}", *kinds, f"inputs × {scale:g}", name, f"targets × {target_scale:g}", f"batch {size}"]
        + ([f"dropout {dropout:g}"] if dropout else [])
        + flags
    )
    return Problem(text, model, inputs * scale, targets, criterion, size)


def whole(module: nn.Module, of: Problem) -> float:
    """Loss over all data, dropout off, batch norm by these data: its averages lag behind, whoever trains."""
    for layer in module.modules():
        layer.train(isinstance(layer, nn.BatchNorm1d))
    with torch.no_grad():
        loss = float(of.criterion(module(of.inputs), of.targets))
    module.train()
    return loss if math.isfinite(loss) else math.inf


def train(of: Problem, make: Callable[[nn.Module], Optimizer]) -> tuple[float, float]:
    """Loss before and after."""
    torch.manual_seed(0)
    module = of.model()
    optimizer = make(module)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    before, step, epoch = whole(module, of), 0, 0
    ours = isinstance(optimizer, ReplicaNewton)
    while step < STEPS:
        for rows in batches(SAMPLES, of.batch_size, 0, epoch):
            if step == STEPS:
                break
            if not ours:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = of.criterion(module(of.inputs[rows]), of.targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            try:
                optimizer.step(closure)  # type: ignore[arg-type]
            except FloatingPointError:
                return before, math.inf
            step += 1
        epoch += 1
    if isinstance(optimizer, ReplicaNewton):
        with optimizer.averaged():
            return before, whole(module, of)
    return before, whole(module, of)


def compare(seed: int) -> dict[str, Any]:
    """Losses of both."""
    of = problem(seed)
    before, ours = train(of, lambda module: ReplicaNewton(module.parameters()))
    lower = train(of, lambda module: ReplicaNewton(module.parameters(), LOWER))[1]
    adam = {
        rate: train(of, lambda module, rate=rate: Adam(module.parameters(), rate))[1]  # type: ignore[misc]
        for rate in ADAM_RATES
    }
    best = min(adam, key=adam.__getitem__)
    return {
        "seed": seed,
        "problem": of.text,
        "batch": of.batch_size,
        "before": before,
        "ours": ours,
        "lower": lower,
        "adam": adam[best],
        "adam_rate": best,
    }


def main() -> None:
    """Run, write, and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120, help="problems (default 120)")
    parser.add_argument("--only", help="seeds of problems, separated by commas; writes nothing")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count must be >= 1, got {options.count}")
    torch.set_num_threads(1)
    console = Console()
    seeds = [int(seed) for seed in options.only.split(",")] if options.only else range(options.count)
    found = [compare(seed) for seed in track(seeds, "problems", console=console)]
    if not options.only:
        replace_file(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    for one in found:
        if options.only or not one["ours"] <= one["before"]:
            console.print(
                "{seed}: {before:.3g} → {ours:.3g}, Adam {adam:.3g} at {adam_rate:g}; {problem}".format(**one)
            )


if __name__ == "__main__":
    main()
