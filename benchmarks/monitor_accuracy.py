"""How close a `CurvatureMonitor` comes to Lanczos while a network trains.

The reference convnet is trained on 20,000 images of MNIST by SGD with momentum, batch 256. Monitors watch, each probing
every tenth step: eight replicas, eight directions at once, each on its own shard of 32 samples, by exact products and
by differences of gradients, and keeping its pairs in bfloat16; eight replicas with a batch of 256 each; and one
process, one direction in turn, on the batch. The truth is the Hessian of the training loss at the same parameters:
SciPy's Lanczos (`eigsh`) on exact Hessian-vector products over all 20,000 samples, at every sixth probe from step 120.
(Over fewer, the truth would have a sampling error of its own: one batch of 256 is off by 23 % along the sharpest
direction, 5,000 samples by 5 %.)
A monitor never touches a run, so the runs and their truths are made first, and can be kept. What one batch can know is
measured beside them: the curvature `xᵀ H x` of the batch along the exact eigenvectors x. At the end of the first run
the network is frozen, and a monitor looks at one batch of 512 again and again; the truth is then Lanczos on the same
batch.

Monitors of every kind start from several sets of first directions, which decide what noise they see. Writes
`monitor_accuracy.json`, `.png` and `.svg`; errors are medians over all compared points of all of them, and coverage
is the share of exact eigenvalues, of the top five, in the monitor's 90 % intervals `θ ± 1.645 · uncertainty`.

    python benchmarks/monitor_accuracy.py --data mnist.npz --keep runs     # an hour, a third of it with the runs kept
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from replica_newton import CurvatureMonitor, CurvatureObservation, Simulated
from replica_newton.files import replace_file
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.models import reference_convnet

BATCH, RANK, EVERY, TOP = 256, 8, 10, 5
NORMAL_90 = 1.645
SAMPLES, CHUNK = 20_000, 2500
FIRST_STEP, COMPARED_EVERY = 120, 6 * EVERY
ONE_BATCH = "one batch, exact eigenvectors"
FROZEN_SAMPLES, FROZEN_PROBES = 512, 320


class Watcher(NamedTuple):
    """How a monitor looks.

    Attributes:
        replicas: 8, or None for one process.
        batches: of 256 samples that are looked at, each replica's share an equal one.
        relative_step: see `CurvatureMonitor`.
        colour: in the figure; None leaves it out.
        dtype: in which pairs are kept.
    """

    replicas: int | None
    batches: int = 1
    relative_step: float | None = None
    colour: str | None = None
    dtype: torch.dtype = torch.float32


MONITORS = {
    "8 replicas, 32 samples each": Watcher(RANK, colour="#D55E00"),
    "8 replicas, 32 samples each, differences": Watcher(RANK, relative_step=3e-3),
    "8 replicas, 32 samples each, bfloat16": Watcher(RANK, dtype=torch.bfloat16),
    "8 replicas, 256 samples each": Watcher(RANK, RANK, colour="#009E73"),
    "one process, directions in turn": Watcher(None, colour="#0072B2"),
}


def main() -> None:
    """Train, watch, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST; by default the folder in REPLICA_NEWTON_DATA")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--seeds", type=int, default=8, help="runs (default 8)")
    parser.add_argument(
        "--first-seed", type=int, default=9, help="the first (default 9: with 0 to 3 the smoothing was chosen)"
    )
    parser.add_argument("--starts", type=int, default=4, help="monitors of every kind beside a run (default 4)")
    parser.add_argument(
        "--keep", type=Path, help="folder where runs and truths are kept, and taken from if they are there"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset("mnist", options.data, train_limit=SAMPLES)
    if options.steps <= FIRST_STEP:
        parser.error(f"--steps must be > {FIRST_STEP}, got {options.steps}")
    if min(options.seeds, options.starts) < 1:
        parser.error(f"--seeds and --starts must be >= 1, got {options.seeds} and {options.starts}")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    trained = [train(dataset, options.steps, seed, options.keep) for seed in seeds]
    frozen = watch_frozen(dataset, trained[0])
    runs = [
        watch(dataset, run, start, f"monitors, run {seed}, start {start}")
        for seed, run in zip(seeds, trained, strict=True)
        for start in range(options.starts)
    ]
    errors = {name: relative_errors(runs, name) for name in (*MONITORS, ONE_BATCH)}
    covered = {name: {"top": coverage(runs, name, 1), "five": coverage(runs, name, TOP)} for name in MONITORS}
    result = {
        "steps": options.steps,
        "every": EVERY,
        "seeds": list(seeds),
        "starts": options.starts,
        "errors": errors,
        "coverage": covered,
        "frozen": frozen,
        "runs": runs,
    }
    replace_file(options.out / "monitor_accuracy.json", (json.dumps(result) + "\n").encode())
    figure = draw(runs[0])
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"monitor_accuracy.{suffix}", dpi=150)
    for kept in ("float32", "bfloat16"):
        off = [abs(a - b) / b for a, b in zip(frozen[kept], frozen["Lanczos"], strict=True)]
        Console().print(f"frozen, {kept}: error of the top eigenvalue {off[0]:.2%}, of the top five ≤ {max(off):.2%}")
    for name, error in errors.items():
        of_one_start = [relative_errors(runs[start :: options.starts], name)["top"] for start in range(options.starts)]
        Console().print(
            f"{name}: median error of the top eigenvalue {error['top']:.1%} (starts alone {min(of_one_start):.1%} to "
            f"{max(of_one_start):.1%}), of the top five {error['five']:.1%}"
            + (
                f"; its 90 % intervals hold {covered[name]['top']:.0%}, of the five {covered[name]['five']:.0%}"
                if name in covered
                else ""
            )
        )


class Run(NamedTuple):
    """A run that nobody watched.

    Attributes:
        rows: `(steps, batch)`, the samples of every step.
        points: parameters, `(N,)`, by step, where a probe is due.
        exact: top eigenvalues, descending, and eigenvectors as rows, by step, where monitors are compared.
    """

    rows: Tensor
    points: dict[int, Tensor]
    exact: dict[int, tuple[list[float], Tensor]]


def train(dataset: Dataset, steps: int, seed: int, keep: Path | None) -> Run:
    """One run and its truths, or what is kept of it."""
    kept = None if keep is None else keep / f"monitor_accuracy_{steps}_{seed}.pt"
    if kept is not None and kept.exists():
        return Run(*torch.load(kept))
    torch.manual_seed(seed)
    model = reference_convnet(dataset.input_shape)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    run = Run(torch.randint(len(dataset.train_labels), (steps, BATCH), generator=generator), {}, {})
    for step in track(range(steps), f"run {seed}", transient=True):
        if step % EVERY == 0:
            run.points[step] = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        if step >= FIRST_STEP and step % COMPARED_EVERY == 0:
            run.exact[step] = lanczos(model, dataset.train_inputs, dataset.train_labels, tolerance=3e-2)
        optimizer.zero_grad()
        loss(model, *batch(dataset, run, step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(run), kept)
    return run


def watch(dataset: Dataset, run: Run, start: int, title: str) -> list[dict[str, Any]]:
    """What monitors with the first directions of a seed saw beside a run, where they are compared."""
    model = reference_convnet(dataset.input_shape)
    monitors = {
        name: CurvatureMonitor(model, rank=RANK, every=1, relative_step=how.relative_step, dtype=how.dtype, seed=start)
        for name, how in MONITORS.items()
    }
    seen = []
    for step, point in track(run.points.items(), title, transient=True):
        with torch.no_grad():
            nn.utils.vector_to_parameters(point, model.parameters())
        observations = {name: look(monitors[name], MONITORS[name], model, dataset, run, step) for name in MONITORS}
        if step in run.exact:
            values, vectors = run.exact[step]
            x, y = batch(dataset, run, step)
            entry: dict[str, Any] = {"step": step, "Lanczos": values, ONE_BATCH: curvatures(model, x, y, vectors)}
            for name, observation in observations.items():
                order_of = observation.eigenvalues.argsort(descending=True)[:TOP]
                entry[name] = rounded(observation.eigenvalues[order_of])
                entry[f"{name}, uncertainties"] = rounded(observation.uncertainties[order_of])
            seen.append(entry)
    return seen


def look(
    monitor: CurvatureMonitor, how: Watcher, model: nn.Module, dataset: Dataset, run: Run, step: int
) -> CurvatureObservation:
    """One observation."""
    x, y = batch(dataset, run, step, how.batches)
    if how.replicas is None:
        return probed(monitor, partial(loss, model, x, y))
    return probed(monitor, Simulated(how.replicas).closure(model, nn.functional.cross_entropy, x, y))


def probed(monitor: CurvatureMonitor, evaluate: Any) -> CurvatureObservation:
    """What is seen by a monitor that probes at every call."""
    seen = monitor.observe(evaluate)
    if seen is None:
        raise RuntimeError(f"a monitor must have every=1 to probe at every call, got {monitor.every}")
    return seen


def watch_frozen(dataset: Dataset, run: Run) -> dict[str, list[float]]:
    """The top five of the last network, on one batch: exact ones, and as monitors of both precisions see them."""
    model = reference_convnet(dataset.input_shape)
    with torch.no_grad():
        nn.utils.vector_to_parameters(run.points[max(run.points)], model.parameters())
    x, y = dataset.train_inputs[:FROZEN_SAMPLES], dataset.train_labels[:FROZEN_SAMPLES]
    found = {"Lanczos": lanczos(model, x, y, tolerance=1e-4)[0]}
    for dtype in (torch.float32, torch.bfloat16):
        monitor = CurvatureMonitor(model, rank=RANK, every=1, smoothing=0.5, dtype=dtype)
        for _ in track(range(FROZEN_PROBES), "frozen", transient=True):
            seen = probed(monitor, partial(loss, model, x, y))
        found[str(dtype).removeprefix("torch.")] = rounded(seen.eigenvalues.sort(descending=True).values[:TOP])
    return found


def batch(dataset: Dataset, run: Run, step: int, batches: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step, or of some from there on."""
    rows = run.rows[step : step + batches].flatten()
    return dataset.train_inputs[rows], dataset.train_labels[rows]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of one batch."""
    return nn.functional.cross_entropy(model(x), y)


def rounded(values: Tensor) -> list[float]:
    """For the file."""
    return [round(value, 4) for value in values.tolist()]


def hessian_product(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Exact products with the Hessian over some samples, in chunks of equal size."""
    parameters, gradients = list(model.parameters()), []
    for inputs, labels in zip(torch.split(x, CHUNK), torch.split(y, CHUNK), strict=True):
        pieces = torch.autograd.grad(loss(model, inputs, labels), parameters, create_graph=True)
        gradients.append(torch.cat([one.flatten() for one in pieces]))

    def product(direction: Tensor) -> Tensor:
        products = [torch.autograd.grad(g @ direction, parameters, retain_graph=True) for g in gradients]
        return torch.stack([torch.cat([one.flatten() for one in pieces]) for pieces in products]).mean(dim=0)

    return product


def curvatures(model: nn.Module, x: Tensor, y: Tensor, vectors: Tensor) -> list[float]:
    """Curvature of one batch along each row."""
    product = hessian_product(model, x, y)
    return rounded(torch.stack([vector @ product(vector) for vector in vectors]))


def lanczos(model: nn.Module, x: Tensor, y: Tensor, *, tolerance: float) -> tuple[list[float], Tensor]:
    """Top eigenvalues of the Hessian over some samples, descending, and eigenvectors as rows."""
    product = hessian_product(model, x, y)

    def on_arrays(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return product(torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).reshape(-1))).numpy()

    size = sum(parameter.numel() for parameter in model.parameters())
    operator = LinearOperator((size, size), matvec=on_arrays, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    values, vectors = eigsh(operator, k=TOP, which="LA", tol=tolerance, ncv=14, v0=start)
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


def coverage(runs: list[list[dict[str, Any]]], name: str, count: int) -> float:
    """Share of the exact top eigenvalues in the intervals of the monitor that are meant to hold 90 % of them."""
    inside: list[bool] = [
        abs(value - exact) <= NORMAL_90 * uncertainty
        for entry in (entry for run in runs for entry in run)
        for value, uncertainty, exact in zip(
            entry[name][:count], entry[f"{name}, uncertainties"][:count], entry["Lanczos"][:count], strict=True
        )
    ]
    return sum(inside) / len(inside)


def draw(run: list[dict[str, Any]]) -> Figure:
    """Largest eigenvalue as each saw it, against steps."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in run]
    axes.semilogy(
        steps,
        [entry["Lanczos"][0] for entry in run],
        "k-",
        linewidth=2.5,
        alpha=0.35,
        label="Lanczos, all samples",
    )
    for name, how in MONITORS.items():
        if how.colour is None:
            continue
        axes.errorbar(
            steps,
            [entry[name][0] for entry in run],
            [NORMAL_90 * entry[f"{name}, uncertainties"][0] for entry in run],
            fmt="o-",
            markersize=4,
            linewidth=1,
            elinewidth=0.6,
            color=how.colour,
            label=f"{name}, 90 % intervals",
        )
    axes.set_xlabel("training steps")
    axes.set_ylabel("sharpness")
    axes.set_title("Sharpness while training, monitored and exact (MNIST)")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
