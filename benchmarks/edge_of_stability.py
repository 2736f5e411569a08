"""Edge of stability: under full-batch training the sharpness rises until the optimizer is barely stable.

Trains a tanh network on scikit-learn's digits at several rates, each run watched by a `CurvatureMonitor` attached to
its optimizer, and writes `edge_of_stability.json`, `.png` and `.svg`. The sharpness grows ("progressive sharpening")
until training is barely stable, and then hovers there: under gradient descent at 2/rate (Cohen et al. 2021,
arXiv 2103.00065), under Adam with β₁ = 0.9 at 38/rate, in Adam's metric (Cohen et al. 2022, arXiv 2207.14484).

    python benchmarks/edge_of_stability.py                 # some minutes
    python benchmarks/edge_of_stability.py --steps 500     # seconds
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import nn

from replica_newton import CurvatureMonitor
from replica_newton.files import replace_file
from replica_newton.training.datasets import load_dataset

COLOURS = ("#0072B2", "#D55E00", "#009E73")
EVERY = 5


@dataclass(frozen=True)
class Half:
    """One optimizer: how it is made, at which rates, and where its edge is, in multiples of 1/rate."""

    name: str
    build: type[torch.optim.SGD] | type[torch.optim.Adam]
    rates: tuple[float, ...]
    edge: float
    sharpness: str


HALVES = (
    Half("gradient descent", torch.optim.SGD, (0.25, 0.167, 0.125), 2.0, "sharpness"),
    Half("Adam", torch.optim.Adam, (0.01, 0.005, 0.0025), 38.0, "preconditioned sharpness"),
)


def main() -> None:
    """Train by every optimizer at every rate, write, and say how close the sharpness came to the edge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="steps of every run (default 4000)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("replica_newton").setLevel(logging.ERROR)  # that the limit is passed is what is to be shown
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=sum(len(half.rates) for half in HALVES) * options.steps)
        runs = {
            half.name: [descend(half, rate, options.steps, lambda: progress.advance(task)) for rate in half.rates]
            for half in HALVES
        }
    replace_file(options.out / "edge_of_stability.json", (json.dumps({"runs": runs}) + "\n").encode())
    figure = draw(runs)
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"edge_of_stability.{suffix}", dpi=150)
    console = Console()
    for half in HALVES:
        for run in runs[half.name]:
            console.print(
                f"{half.name}, rate {run['rate']}: {half.edge:.0f}/rate = {half.edge / run['rate']:.0f}, "
                f"{half.sharpness} over the last quarter: median {run['final_sharpness']:.1f}, "
                f"{run['final_sharpness'] * run['rate'] / half.edge:.2f} of the limit"
            )


def descend(half: Half, rate: float, steps: int, advance: Callable[[], None]) -> dict[str, Any]:
    """One full-batch run on the mean squared error of the first 1000 digits."""
    digits = load_dataset("digits", train_limit=1000)
    inputs, targets = digits.train_inputs.flatten(1), nn.functional.one_hot(digits.train_labels, 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = half.build(model.parameters(), rate)
    # The batch is the whole set: there is no noise to smooth away, and the gradient at hand serves the probe.
    monitor = CurvatureMonitor(
        model, optimizer=optimizer, rank=2, every=EVERY, smoothing=1.0, relative_step=1e-3, reuse_gradient=True
    )

    def loss() -> torch.Tensor:
        return 0.5 * nn.functional.mse_loss(model(inputs), targets, reduction="sum") / len(inputs)

    seen: dict[str, list[float]] = {"step": [], "loss": [], "sharpness": []}
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        observation = monitor.observe(loss)
        sharpness = None if observation is None else observation.preconditioned_sharpness
        if sharpness is not None and math.isfinite(sharpness):
            seen["step"].append(step)
            seen["loss"].append(round(float(value.detach()), 6))
            seen["sharpness"].append(round(sharpness, 4))
        optimizer.step()
        advance()
    last = seen["sharpness"][-max(len(seen["step"]) // 4, 1) :]
    return {"rate": rate, "final_sharpness": statistics.median(last), **seen}


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss and sharpness against steps, a row an optimizer, with the edge dashed in the colour of the run."""
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    for (left, right), half in zip(figure.subplots(2, 2), HALVES, strict=True):
        for run, colour in zip(runs[half.name], COLOURS, strict=True):
            edge = half.edge / run["rate"]
            left.semilogy(run["step"], run["loss"], color=colour, linewidth=1.2, label=f"rate {run['rate']}")
            right.plot(run["step"], run["sharpness"], color=colour, linewidth=1.2)
            right.axhline(edge, color=colour, linestyle="--", linewidth=1.0)
            right.annotate(
                f"{half.edge:.0f}/rate = {edge:.0f}",
                (1.0, edge),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        left.set_ylabel("training loss")
        right.set_ylabel(f"{half.sharpness}, as monitored")
        for axes in (left, right):
            axes.set_xlabel(f"steps of {half.name}")
            axes.grid(True, color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False)
    figure.suptitle("Edge of stability: full-batch training on digits, tanh network")
    return figure


if __name__ == "__main__":
    main()
