"""What a `CurvatureMonitor` costs: beside a training step, and beside Lanczos at the accuracy that it reaches.

The reference convnet is trained on MNIST by SGD with momentum, batch 256.

Share of a step: blocks of ten steps with a monitor and without take turns in one run, so that the load of the machine
falls on all; the ratio is the median of those within a round. In one process; with eight simulated replicas, which take
their shards of the batch one after the other; and in real processes, each with a batch of 256, whose step is a
gradient, an all-reduce and SGD.

Against Lanczos: at some steps the top five eigenvalues are compared with the truth, Lanczos over 20,000 training
samples, as many as in `monitor_accuracy.py`. Then the cheapest fresh Lanczos is looked for whose median errors, of the
top eigenvalue and of the top five, are no larger than the monitor's: over more or fewer steps, each a Hessian-vector
product by double backward (hessian-eigenthings), and over more or fewer samples, other ones than the truth's. An
observation of the monitor costs what its block of steps takes longer.

Writes `monitor_cost.json`, `.png` and `.svg`.

    python benchmarks/monitor_cost.py --data mnist.npz                        # half an hour
    python benchmarks/monitor_cost.py --data mnist.npz --steps 130 --blocks 2 # a look
    python benchmarks/monitor_cost.py --processes                             # these again, the rest as it is in OUT
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hessian_eigenthings
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from replica_newton import CurvatureMonitor, CurvatureObservation, Simulated, TreeReduction
from replica_newton.files import replace_file
from replica_newton.report.style import save_figure, style
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.models import reference_convnet

BATCH, RANK, EVERY = 256, 8, 10
TOP = 5
REFERENCE_SAMPLES, REFERENCE_STEPS = 20_000, 25
LANCZOS_SAMPLES, LANCZOS_STEPS = (512, 1024, 2048, 4096, 8192), 12
REUSED, EXACT = ", .grad reused", ", exact"
COLOURS = {
    "1 process" + REUSED: "#009E73",
    "1 process" + EXACT: "#0072B2",
    "8 replicas, differences": "#CC79A7",
    "8 replicas" + EXACT: "#D55E00",
}
PROCESSES = (2, 8)
RELATIVE_STEP = 3e-3
LIMIT = 1.15
FIRST_STEP, COMPARED_EVERY = 120, 6 * EVERY
"""Before its second sweep of directions, in turn, a monitor in one process knows nothing to compare."""


class Run:
    """A network in training, with the monitor of a mode, or none.

    Args:
        dataset: MNIST.
        mode: a key of `COLOURS`, or None.
    """

    def __init__(self, dataset: Dataset, mode: str | None) -> None:
        torch.manual_seed(0)
        self.dataset, self.mode = dataset, mode
        self.model = reference_convnet(dataset.input_shape)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9)
        self.monitor = monitor_of(self.model, mode or EXACT)
        self.replicas = Simulated(RANK)
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0

    def step(self) -> CurvatureObservation | None:
        """One training step, with a look at the curvature where one is due."""
        chosen = torch.randint(len(self.dataset.train_labels), (BATCH,), generator=self.generator)
        x, y = self.dataset.train_inputs[chosen], self.dataset.train_labels[chosen]
        self.optimizer.zero_grad()
        loss(self.model, x, y).backward()  # type: ignore[no-untyped-call]
        seen = None
        if self.mode is not None and self.mode.startswith("8 replicas"):
            seen = self.monitor.observe(self.replicas.closure(self.model, nn.functional.cross_entropy, x, y))
        elif self.mode is not None:
            seen = self.monitor.observe(partial(loss, self.model, x, y))
        self.optimizer.step()
        self.steps += 1
        return seen


def monitor_of(model: nn.Module, mode: str, topology: TreeReduction | None = None) -> CurvatureMonitor:
    """The monitor of a mode, told by the end of its name."""
    return CurvatureMonitor(
        model,
        rank=RANK,
        every=EVERY,
        topology=topology,
        relative_step=None if mode.endswith(EXACT) else RELATIVE_STEP,
        reuse_gradient=mode.endswith(REUSED),
    )


def main() -> None:
    """Measure, write, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST; by default the folder in REPLICA_NEWTON_DATA")
    parser.add_argument("--steps", type=int, default=600, help="training steps for the accuracy (default 600)")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of ten steps timed for each mode (default 60)")
    parser.add_argument("--processes", action="store_true", help="measure steps of real processes again, and no more")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    file = options.out / "monitor_cost.json"
    if options.processes and not file.exists():
        parser.error(f"--processes needs the rest of an earlier run, and there is no {file}")
    if options.steps <= FIRST_STEP or options.blocks < 1:
        parser.error(f"--steps must be > {FIRST_STEP} and --blocks >= 1, got {options.steps} and {options.blocks}")
    torch.set_num_threads(1)
    if options.processes:
        before = json.loads(file.read_text())
        blocks, against = before["blocks"], before["lanczos"]
    else:
        dataset = load_dataset("mnist", options.data)
        blocks = time_blocks(dataset, options.blocks)
        against = compare(dataset, options.steps, blocks)
    for processes in PROCESSES:
        blocks |= time_processes(processes, options.blocks)
    result = {
        "batch": BATCH,
        "every": EVERY,
        "rank": RANK,
        "threads": 1,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "blocks": blocks,
        "lanczos": against,
    }
    replace_file(file, (json.dumps(result, indent=1) + "\n").encode())
    save_figure(draw(result), options.out, "monitor_cost")
    console = Console()
    for mode, block in blocks.items():
        if "ratio" in block:
            said = f"; {describe(against['modes'][mode])}" if mode in against["modes"] else ""
            console.print(f"{mode}: a step takes {block['ratio']:.3f} times as long{said}", highlight=False)


def describe(one: dict[str, Any]) -> str:
    """What the comparison with Lanczos says."""
    top, five = one["monitor_errors"]
    error = f"median error {top:.1%}, of the top five {five:.1%}"
    if one["cheapest"] is None:
        return f"{error}, which no Lanczos here reaches"
    cheapest = one["cheapest"]
    return (
        f"{error}, for which Lanczos needs {cheapest['steps']} steps over {cheapest['samples']} samples, "
        f"{one['times_cheaper']:.1f} times the time of an observation"
    )


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of one batch."""
    return nn.functional.cross_entropy(model(x), y)


def time_blocks(dataset: Dataset, repetitions: int) -> dict[str, Any]:
    """Median milliseconds of `EVERY` steps by mode, the modes taken in turn, and their ratio to none."""
    runs = {mode or "none": Run(dataset, mode) for mode in (None, *COLOURS)}
    taken: dict[str, list[float]] = {mode: [] for mode in runs}
    for repetition in track(range(repetitions + 1), "share of a step", transient=True):
        for mode, run in runs.items():
            start = time.perf_counter()
            for _ in range(EVERY):
                run.step()
            if repetition:  # the first calls allocate and compile
                taken[mode].append((time.perf_counter() - start) * 1e3)
    return summarised(taken)


def summarised(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Median milliseconds of every mode, and the median over rounds of its ratio to the first."""
    none, *modes = taken
    found: dict[str, Any] = {none: {"ms": statistics.median(taken[none])}}
    for mode in modes:
        ratios = [own / other for own, other in zip(taken[mode], taken[none], strict=True)]
        found[mode] = {"ms": statistics.median(taken[mode]), "ratio": statistics.median(ratios)}
    return found


def time_processes(processes: int, repetitions: int) -> dict[str, Any]:
    """The same in real processes, by exact products and by a difference from the gradient that is there."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, processes, repetitions), nprocs=processes)  # type: ignore[no-untyped-call]
        taken: dict[str, list[float]] = json.loads((Path(folder) / "result.json").read_text())
    return summarised({f"{processes} processes{mode}": times for mode, times in taken.items()})


def _process(rank: int, folder: str, processes: int, repetitions: int) -> None:
    """One process, with all modes in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    steps = {mode: _step_of(mode, rank) for mode in ("", REUSED, EXACT)}
    taken: dict[str, list[float]] = {mode: [] for mode in steps}
    for repetition in range(repetitions + 1):
        for mode, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(EVERY):
                step()
            dist.barrier()
            if repetition:
                taken[mode].append((time.perf_counter() - start) * 1e3)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(taken))
    dist.barrier()
    dist.destroy_process_group()


def _step_of(mode: str, rank: int) -> Callable[[], None]:
    """What one step of a process does; without a mode there is no monitor."""
    torch.manual_seed(0)
    model = reference_convnet()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(BATCH, 1, 28, 28, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    monitor = monitor_of(model, mode, TreeReduction()) if mode else None

    def step() -> None:
        optimizer.zero_grad()
        loss(model, x, y).backward()  # type: ignore[no-untyped-call]
        if monitor is not None:
            monitor.observe(partial(loss, model, x, y))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        mean = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(mean.div_(dist.get_world_size()))
        nn.utils.vector_to_parameters(mean, gradients)
        optimizer.step()

    return step


def compare(dataset: Dataset, steps: int, blocks: dict[str, Any]) -> dict[str, Any]:
    """The monitors' errors while training, and for each the cheapest Lanczos that is as good."""
    runs = {mode: Run(dataset, mode) for mode in COLOURS}  # the same trajectory, as monitors leave no trace
    monitor_errors: dict[str, list[tuple[float, float]]] = {mode: [] for mode in runs}
    errors: dict[tuple[int, int], list[tuple[float, float]]] = {}
    times: dict[int, list[float]] = {samples: [] for samples in LANCZOS_SAMPLES}
    for step in track(range(steps), "accuracy", transient=True):
        model = copy.deepcopy(runs["8 replicas" + EXACT].model)  # where the monitors are about to look
        seen = {mode: run.step() for mode, run in runs.items()}
        if step < FIRST_STEP or step % COMPARED_EVERY:
            continue
        truth = lanczos(model, dataset, 0, REFERENCE_SAMPLES, REFERENCE_STEPS)[0][-1]
        for mode, observation in seen.items():
            if observation is not None:
                monitor_errors[mode].append(errors_of(observation.eigenvalues, truth))
        for samples in LANCZOS_SAMPLES:
            # Other samples than the truth's, as the monitor's are.
            values, seconds = lanczos(model, dataset, REFERENCE_SAMPLES + step * BATCH, samples, LANCZOS_STEPS)
            times[samples].append(1e3 * seconds / LANCZOS_STEPS)
            for taken, value in enumerate(values, start=1):
                errors.setdefault((samples, taken), []).append(errors_of(value, truth))
    products = {samples: statistics.median(ms) for samples, ms in times.items()}
    settings = [
        {"samples": n, "steps": k, "errors": medians_of(found), "ms": k * products[n]}
        for (n, k), found in errors.items()
    ]
    return {
        "settings": settings,
        "modes": {mode: beside(blocks, mode, monitor_errors[mode], settings) for mode in runs},
    }


def errors_of(values: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative errors of the largest value and, on average, of the five largest; 1 for one that is missing."""
    found = torch.zeros(TOP, dtype=torch.float64)
    largest = values.sort(descending=True).values[:TOP]
    found[: len(largest)] = largest
    errors = (found - truth[:TOP]).abs() / truth[:TOP]
    return float(errors[0]), float(errors.mean())


def medians_of(errors: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the first and of the second."""
    top, five = zip(*errors, strict=True)
    return statistics.median(top), statistics.median(five)


def beside(
    blocks: dict[str, Any], mode: str, monitor_errors: list[tuple[float, float]], settings: list[dict[str, Any]]
) -> dict[str, Any]:
    """One monitor beside the cheapest Lanczos that is as good."""
    reached = medians_of(monitor_errors)
    good = [one for one in settings if one["errors"][0] <= reached[0] and one["errors"][1] <= reached[1]]
    cheapest = min(good, key=lambda one: one["ms"], default=None)
    observation = blocks[mode]["ms"] - blocks["none"]["ms"]
    return {
        "observations": len(monitor_errors),
        "monitor_errors": reached,
        "observation_ms": observation,
        "cheapest": cheapest,
        "times_cheaper": None if cheapest is None else cheapest["ms"] / observation,
    }


def lanczos(model: nn.Module, dataset: Dataset, first: int, samples: int, steps: int) -> tuple[list[Tensor], float]:
    """Ritz values, descending, after every Lanczos step, and the seconds of all steps."""
    chosen = torch.arange(first, first + samples) % len(dataset.train_labels)
    batch = (dataset.train_inputs[chosen], dataset.train_labels[chosen])
    operator = hessian_eigenthings.HessianOperator(model, [batch], lambda model, batch: loss(model, *batch))
    start = torch.randn(operator.size, generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    found = hessian_eigenthings.lanczos_tridiagonal(operator, start, steps)
    seconds = time.perf_counter() - began
    matrix = found.alphas.diag() + found.betas.diag(1) + found.betas.diag(-1)
    values = [torch.linalg.eigvalsh(matrix[:k, :k].double()).flip(0) for k in range(1, len(matrix) + 1)]
    return values, seconds


def draw(result: dict[str, Any]) -> Figure:
    """Ratios of step times, and error against time for the monitor and Lanczos."""
    with style():
        figure = Figure(figsize=(12, 4.0), layout="constrained")
        share, against = figure.subplots(1, 2)
        ratios = {mode: block["ratio"] for mode, block in result["blocks"].items() if "ratio" in block}
        share.barh(
            list(ratios),
            [ratio - 1 for ratio in ratios.values()],
            left=1.0,
            color=[COLOURS.get(mode, "#707070") for mode in ratios],
        )
        share.axvline(LIMIT, color="#707070", linestyle="--", linewidth=1.1)
        share.set_xlim(min(1.0, *ratios.values()) - 0.01, max(LIMIT, *ratios.values()) + 0.02)
        share.invert_yaxis()
        share.grid(visible=False, axis="y")
        share.set_xlabel("time of a step over one without monitor")
        share.set_title(f"Beside training, a probe every {result['every']} steps")
        settings = result["lanczos"]["settings"]
        shades = ("#d0d0d0", "#b0b0b0", "#888888", "#585858", "#000000")
        for samples, shade in zip(LANCZOS_SAMPLES, shades, strict=True):
            line = [one for one in settings if one["samples"] == samples]
            against.loglog(
                [one["ms"] for one in line],
                [one["errors"][1] for one in line],
                ".-",
                color=shade,
                linewidth=1,
                label=f"Lanczos, {samples} samples",
            )
        for mode, one in result["lanczos"]["modes"].items():
            if one["observation_ms"] > 0.0:
                against.loglog(one["observation_ms"], one["monitor_errors"][1], "D", color=COLOURS[mode], label=mode)
        against.set(xlabel="time (ms)", ylabel="median error of the top five", title="Against Lanczos from nothing")
        figure.legend(*against.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8.5)
    return figure


if __name__ == "__main__":
    main()
