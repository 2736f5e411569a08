"""How close a `CurvatureMonitor` comes to Lanczos while a network trains, and what it costs.

The reference convnet is trained on MNIST by SGD with momentum, batch 256. Two monitors watch, each probing every tenth
step: one process, one direction in turn, on the whole batch (one extra gradient a probe); and eight replicas, eight
directions at once, each on its own shard of 32 samples (two more gradients of the batch a probe). The truth is
SciPy's Lanczos (`eigsh`) on Hessian-vector products over 2,000 training samples at the same parameters.

Writes `monitor_accuracy.json`, `.png` and `.svg`; errors are medians over the run after the first sweep of probes.

    python benchmarks/monitor_accuracy.py --data mnist.npz       # a few minutes
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from replica_newton import CurvatureMonitor, Simulated
from replica_newton.files import replace_file
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.models import reference_convnet

BATCH, RANK, EVERY, TOP = 256, 8, 10, 5
REFERENCE_SAMPLES = 2000
MONITORS = {
    "one process, directions in turn": "#0072B2",
    "8 replicas on own shards": "#D55E00",
}


def main() -> None:
    """Train, watch, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST; by default the folder in REPLICA_NEWTON_DATA")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--seeds", type=int, default=3, help="runs (default 3)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset("mnist", options.data)
    runs = [watch(dataset, options.steps, seed) for seed in range(options.seeds)]
    errors = {name: relative_errors(runs, name) for name in MONITORS}
    result = {"steps": options.steps, "every": EVERY, "errors": errors, "runs": runs}
    replace_file(options.out / "monitor_accuracy.json", (json.dumps(result) + "\n").encode())
    figure = draw(runs[0])
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"monitor_accuracy.{suffix}", dpi=150)
    for name, error in errors.items():
        Console().print(
            f"{name}: median error of the top eigenvalue {error['top']:.1%}, of the top five {error['five']:.1%}"
        )


def watch(dataset: Dataset, steps: int, seed: int) -> list[dict[str, Any]]:
    """One training run; what the monitors and Lanczos saw, every third probe."""
    torch.manual_seed(seed)
    model = reference_convnet(dataset.input_shape)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    alone = CurvatureMonitor(model, rank=RANK, every=EVERY, reuse_gradient=True)
    shared = CurvatureMonitor(model, rank=RANK, every=EVERY)
    replicas = Simulated(RANK)
    order = torch.randint(len(dataset.train_labels), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
    seen = []
    for step in track(range(steps), f"run {seed}", transient=True):
        x, y = dataset.train_inputs[order[step]], dataset.train_labels[order[step]]
        optimizer.zero_grad()
        loss(model, x, y).backward()  # type: ignore[no-untyped-call]
        first = alone.observe(partial(loss, model, x, y))
        second = shared.observe(replicas.closure(model, nn.functional.cross_entropy, x, y))
        if first is not None and second is not None and first.eigenvalues.numel() and step % (3 * EVERY) == 0:
            found = (first.eigenvalues, second.eigenvalues)
            entry = {name: sharpest(values) for name, values in zip(MONITORS, found, strict=True)}
            seen.append({"step": step, "Lanczos": lanczos(model, dataset), **entry})
        optimizer.step()
    return seen


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of one batch."""
    return nn.functional.cross_entropy(model(x), y)


def sharpest(values: Tensor) -> list[float]:
    """The largest eigenvalues, descending."""
    return [round(value, 4) for value in sorted(values.tolist(), reverse=True)[:TOP]]


def lanczos(model: nn.Module, dataset: Dataset) -> list[float]:
    """Top eigenvalues of the Hessian over the reference samples."""
    parameters = list(model.parameters())
    x, y = dataset.train_inputs[:REFERENCE_SAMPLES], dataset.train_labels[:REFERENCE_SAMPLES]
    gradients = torch.autograd.grad(loss(model, x, y), parameters, create_graph=True)
    gradient = torch.cat([one.flatten() for one in gradients])

    def product(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        direction = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).reshape(-1))
        products = torch.autograd.grad(gradient @ direction, parameters, retain_graph=True)
        return torch.cat([one.flatten() for one in products]).numpy()

    operator = LinearOperator((gradient.numel(), gradient.numel()), matvec=product, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(gradient.numel()).astype(np.float32)
    return sharpest(torch.from_numpy(eigsh(operator, k=TOP, which="LA", tol=1e-2, v0=start, return_eigenvectors=False)))


def relative_errors(runs: list[list[dict[str, Any]]], name: str) -> dict[str, float]:
    """Median relative errors of the largest eigenvalue and (mean over the five) of the top five."""
    top, five = [], []
    for entry in (entry for run in runs for entry in run):
        errors = [abs(a - b) / b for a, b in zip(entry[name], entry["Lanczos"], strict=True)]
        top.append(errors[0])
        five.append(statistics.mean(errors))
    return {"top": statistics.median(top), "five": statistics.median(five)}


def draw(run: list[dict[str, Any]]) -> Figure:
    """Largest eigenvalue as each saw it, against steps."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in run]
    axes.semilogy(
        steps, [entry["Lanczos"][0] for entry in run], "k-", linewidth=2.5, alpha=0.35, label="Lanczos, 2,000 samples"
    )
    for name, colour in MONITORS.items():
        axes.semilogy(
            steps, [entry[name][0] for entry in run], "o-", markersize=4, linewidth=1, color=colour, label=name
        )
    axes.set_xlabel("training steps")
    axes.set_ylabel("sharpness")
    axes.set_title("Sharpness while training, monitored and exact (MNIST)")
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
