"""Edge of stability (Cohen et al. 2021, arXiv 2103.00065): sharpness under full-batch gradient descent rises to 2/rate.

Trains a tanh network on scikit-learn's digits by gradient descent at several rates, each watched by a
`CurvatureMonitor`, and writes `edge_of_stability.json`, `.png` and `.svg`. Cohen et al. found that the sharpness grows
("progressive sharpening") until gradient descent is barely stable, at 2/rate, and then hovers there.

    python benchmarks/edge_of_stability.py                 # about a minute
    python benchmarks/edge_of_stability.py --steps 500     # seconds
"""

import argparse
import json
import statistics
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

RATES = (0.25, 0.167, 0.125)
COLOURS = ("#0072B2", "#D55E00", "#009E73")
EVERY = 5


def main() -> None:
    """Train at every rate, write, and say how close the sharpness came to 2/rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="steps of gradient descent (default 4000)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with Progress(transient=True) as progress:
        task = progress.add_task("gradient descent", total=len(RATES) * options.steps)
        runs = [descend(rate, options.steps, lambda: progress.advance(task)) for rate in RATES]
    replace_file(options.out / "edge_of_stability.json", (json.dumps({"runs": runs}) + "\n").encode())
    figure = draw(runs)
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"edge_of_stability.{suffix}", dpi=150)
    console = Console()
    for run in runs:
        console.print(
            f"rate {run['rate']}: 2/rate = {2 / run['rate']:.0f}, sharpness over the last quarter: median "
            f"{run['final_sharpness']:.1f}, {run['final_sharpness'] * run['rate'] / 2:.2f} of the limit"
        )


def descend(rate: float, steps: int, advance: Any) -> dict[str, Any]:
    """One run of gradient descent on the mean squared error of the first 1000 digits."""
    digits = load_dataset("digits", train_limit=1000)
    inputs, targets = digits.train_inputs.flatten(1), nn.functional.one_hot(digits.train_labels, 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    # The batch is the whole set: there is no noise to smooth away, and the gradient at hand serves the probe.
    monitor = CurvatureMonitor(model, rank=2, every=EVERY, smoothing=1.0, reuse_gradient=True)

    def loss() -> torch.Tensor:
        return 0.5 * nn.functional.mse_loss(model(inputs), targets, reduction="sum") / len(inputs)

    seen: dict[str, list[float]] = {"step": [], "loss": [], "sharpness": []}
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        observation = monitor.observe(loss)
        if observation is not None and observation.eigenvalues.numel():
            seen["step"].append(step)
            seen["loss"].append(round(float(value.detach()), 6))
            seen["sharpness"].append(round(observation.sharpness, 4))
        optimizer.step()
        advance()
    last = seen["sharpness"][-max(len(seen["step"]) // 4, 1) :]
    return {"rate": rate, "final_sharpness": statistics.median(last), **seen}


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Loss and sharpness against steps, with 2/rate dashed in the colour of the run."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour in zip(runs, COLOURS, strict=True):
        left.semilogy(run["step"], run["loss"], color=colour, linewidth=1.2, label=f"rate {run['rate']}")
        right.plot(run["step"], run["sharpness"], color=colour, linewidth=1.2)
        right.axhline(2 / run["rate"], color=colour, linestyle="--", linewidth=1.0)
        right.annotate(
            f"2/rate = {2 / run['rate']:.0f}",
            (1.0, 2 / run["rate"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    left.set_ylabel("training loss")
    right.set_ylabel("sharpness, as monitored")
    for axes in (left, right):
        axes.set_xlabel("steps of gradient descent")
        axes.grid(True, color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle("Edge of stability: full-batch gradient descent on digits, tanh network")
    return figure


if __name__ == "__main__":
    main()
