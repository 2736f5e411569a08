"""How close a `CurvatureMonitor` comes to Lanczos while a network trains, and what it costs.

The reference convnet is trained on MNIST by SGD with momentum, batch 256. Two monitors watch, each probing every tenth
step: one process, one direction in turn, on the whole batch (one extra gradient a probe); and eight replicas, eight
directions at once, each on its own shard of 32 samples (two more gradients of the batch a probe). The truth is
SciPy's Lanczos (`eigsh`) on Hessian-vector products over 2,000 training samples at the same parameters. What one batch
can know is measured beside them: the curvature `xᵀ H x` of the batch along the exact eigenvectors x.

Writes `monitor_accuracy.json`, `.png` and `.svg`; errors are medians over the run after the first sweep of probes, and
coverage is the share of exact eigenvalues, of the top five, in the monitor's 90 % intervals `θ ± 1.645 · uncertainty`.

    python benchmarks/monitor_accuracy.py --data mnist.npz       # a few minutes
"""

import argparse
import json
import statistics
from collections.abc import Callable
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
NORMAL_90 = 1.645
REFERENCE_SAMPLES = 2000
ONE_BATCH = "one batch, exact eigenvectors"
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
    errors = {name: relative_errors(runs, name) for name in (*MONITORS, ONE_BATCH)}
    covered = {name: coverage(runs, name) for name in MONITORS}
    result = {"steps": options.steps, "every": EVERY, "errors": errors, "coverage": covered, "runs": runs}
    replace_file(options.out / "monitor_accuracy.json", (json.dumps(result) + "\n").encode())
    figure = draw(runs[0])
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"monitor_accuracy.{suffix}", dpi=150)
    for name, error in errors.items():
        Console().print(
            f"{name}: median error of the top eigenvalue {error['top']:.1%}, of the top five {error['five']:.1%}"
            + (f"; {covered[name]:.0%} in the 90 % intervals" if name in covered else "")
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
            exact, vectors = lanczos(model, dataset)
            entry: dict[str, Any] = {"step": step, "Lanczos": exact, ONE_BATCH: curvatures(model, x, y, vectors)}
            for name, observation in zip(MONITORS, (first, second), strict=True):
                order_of = observation.eigenvalues.argsort(descending=True)[:TOP]
                entry[name] = rounded(observation.eigenvalues[order_of])
                entry[f"{name}, uncertainties"] = rounded(observation.uncertainties[order_of])
            seen.append(entry)
        optimizer.step()
    return seen


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of one batch."""
    return nn.functional.cross_entropy(model(x), y)


def rounded(values: Tensor) -> list[float]:
    """For the file."""
    return [round(value, 4) for value in values.tolist()]


def hessian_product(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Exact products with the Hessian over some samples."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model, x, y), parameters, create_graph=True)
    gradient = torch.cat([one.flatten() for one in gradients])

    def product(direction: Tensor) -> Tensor:
        products = torch.autograd.grad(gradient @ direction, parameters, retain_graph=True)
        return torch.cat([one.flatten() for one in products])

    return product


def curvatures(model: nn.Module, x: Tensor, y: Tensor, vectors: Tensor) -> list[float]:
    """Curvature of one batch along each row."""
    product = hessian_product(model, x, y)
    return rounded(torch.stack([vector @ product(vector) for vector in vectors]))


def lanczos(model: nn.Module, dataset: Dataset) -> tuple[list[float], Tensor]:
    """Top eigenvalues of the Hessian over the reference samples, descending, and eigenvectors as rows."""
    product = hessian_product(model, dataset.train_inputs[:REFERENCE_SAMPLES], dataset.train_labels[:REFERENCE_SAMPLES])

    def on_arrays(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return product(torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).reshape(-1))).numpy()

    size = sum(parameter.numel() for parameter in model.parameters())
    operator = LinearOperator((size, size), matvec=on_arrays, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    values, vectors = eigsh(operator, k=TOP, which="LA", tol=1e-2, v0=start)
    order = np.argsort(-values)
    return rounded(torch.from_numpy(values[order])), torch.from_numpy(vectors[:, order].T.copy())


def relative_errors(runs: list[list[dict[str, Any]]], name: str) -> dict[str, float]:
    """Median relative errors of the largest eigenvalue and (mean over the five) of the top five."""
    top, five = [], []
    for entry in (entry for run in runs for entry in run):
        errors = [abs(a - b) / b for a, b in zip(entry[name], entry["Lanczos"], strict=True)]
        top.append(errors[0])
        five.append(statistics.mean(errors))
    return {"top": statistics.median(top), "five": statistics.median(five)}


def coverage(runs: list[list[dict[str, Any]]], name: str) -> float:
    """Share of the exact top five in the intervals of the monitor that are meant to hold 90 % of them."""
    inside: list[bool] = [
        abs(value - exact) <= NORMAL_90 * uncertainty
        for entry in (entry for run in runs for entry in run)
        for value, uncertainty, exact in zip(
            entry[name], entry[f"{name}, uncertainties"], entry["Lanczos"], strict=True
        )
    ]
    return sum(inside) / len(inside)


def draw(run: list[dict[str, Any]]) -> Figure:
    """Largest eigenvalue as each saw it, against steps."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in run]
    axes.semilogy(
        steps, [entry["Lanczos"][0] for entry in run], "k-", linewidth=2.5, alpha=0.35, label="Lanczos, 2,000 samples"
    )
    for name, colour in MONITORS.items():
        axes.errorbar(
            steps,
            [entry[name][0] for entry in run],
            [NORMAL_90 * entry[f"{name}, uncertainties"][0] for entry in run],
            fmt="o-",
            markersize=4,
            linewidth=1,
            elinewidth=0.6,
            color=colour,
            label=f"{name}, 90 % intervals",
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
