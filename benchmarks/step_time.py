"""Step time of ReplicaNewton over processes, beside DistributedDataParallel with SGD and with Adam.

All methods run in the same processes in turn, round after round, so that the load of the machine falls on all alike;
what counts are medians of the ratios within a round. Every replica evaluates 512 samples a step by a multilayer
perceptron: 3,072 floating-point operations a parameter, what a language model spends on 512 tokens. Where N is 16 k it
is the reference convnet on a quarter as many images of 28×28. Writes `step_time.json`, `.png` and `.svg`, of other
numbers of samples `step_time_2048.json` and so on: what a step takes beside its gradients does not depend on them.

    python benchmarks/step_time.py            # twenty minutes on two cores, goes on where it was; 25 M need 14 GiB
    python benchmarks/step_time.py --samples 2048
    python benchmarks/step_time.py --quick    # a minute: two replicas, 16 k parameters
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from replica_newton import ReplicaNewton, TreeReduction
from replica_newton.files import replace_file
from replica_newton.training.models import reference_convnet

METHODS = ("gradient", "ddp_sgd", "ddp_adam", "replica_newton")
LABELS = {
    "gradient": "gradient alone",
    "ddp_sgd": "DDP + SGD",
    "ddp_adam": "DDP + Adam",
    "replica_newton": "Replica Newton",
}
SIZES = {"16 k": 0, "1 M": 640, "25 M": 3470}
"""Width of the multilayer perceptron that has about so many parameters; 0 for the reference convnet."""
SAMPLES = 512
"""Of a replica in a step, where the command does not say."""
BLOCK = 0.25
"""Seconds that a block of steps of one method takes at least."""


def main() -> None:
    """Measure, write, and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,2,4,8", help="numbers of replicas (default 1,2,4,8)")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)} (default all)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all methods (default 7)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of a replica in a step (default {SAMPLES})")
    parser.add_argument("--fresh", action="store_true", help="measure again what OUT holds already")
    parser.add_argument("--quick", action="store_true", help="two replicas, 16 k parameters, 3 rounds")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    sizes, replicas = options.sizes.split(","), [int(one) for one in options.replicas.split(",")]
    if options.quick:
        sizes, replicas, options.rounds = ["16 k"], [2], 3
    unknown = sorted(set(sizes) - set(SIZES))
    if unknown or options.rounds < 1 or min(replicas) < 1 or options.samples < 4:
        parser.error(f"sizes must be of {', '.join(SIZES)}, replicas and rounds >= 1, samples >= 4")

    console = Console()
    table = Table(title="median time of a step, ms", box=None, pad_edge=False)
    for column in ("N, k", "M", *LABELS.values(), "÷ DDP + SGD", "÷ DDP + Adam"):
        table.add_column(column, justify="right")
    result = {"torch": torch.__version__, "cores": os.cpu_count(), "rounds": options.rounds}
    result |= {"samples": options.samples}
    name = "step_time" if options.samples == SAMPLES else f"step_time_{options.samples}"
    file = options.out / f"{name}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {} if options.fresh else measured(file, result)
    for size in sizes:
        for M in replicas:
            if (size, M) not in settings:
                console.print(f"{size} parameters, {M} replicas …", style="dim")
                settings[size, M] = measure(size, M, options.rounds, options.samples)
                # In the order of the command, however many it took.
                result["settings"] = [one for _, one in sorted(settings.items(), key=_place)]
                replace_file(file, (json.dumps(result, indent=1) + "\n").encode())
            setting = settings[size, M]
            times = (f"{setting['milliseconds'][method]:,.1f}" for method in METHODS)
            ratios = (f"{setting['ratio_to'][method]:.3f}" for method in ("ddp_sgd", "ddp_adam"))
            table.add_row(f"{setting['parameters'] / 1e3:,.0f}", str(M), *times, *ratios)
    result["settings"] = [one for _, one in sorted(settings.items(), key=_place)]
    figure = draw(result)
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"{name}.{suffix}", dpi=150)
    console.print(table)


def measured(file: Path, wanted: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """What an earlier run, of the same kind, has measured."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    if any(found[name] != value for name, value in wanted.items()):
        return {}
    return {(one["size"], one["replicas"]): one for one in found["settings"]}


def _place(setting: tuple[tuple[str, int], Any]) -> tuple[int, int]:
    (size, M), _ = setting
    return list(SIZES).index(size), M


def measure(size: str, replicas: int, rounds: int, samples: int) -> dict[str, Any]:
    """Median times of all methods with so many replicas, and of their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, size, replicas, rounds, samples), nprocs=replicas)  # type: ignore[no-untyped-call]
        found = json.loads((Path(folder) / "result.json").read_text())
    times = found["times"]
    ours = times["replica_newton"]
    return {
        "size": size,
        "parameters": found["parameters"],
        "replicas": replicas,
        "milliseconds": {method: statistics.median(times[method]) * 1e3 for method in METHODS},
        "ratio_to": {
            method: statistics.median(own / other for own, other in zip(ours, times[method], strict=True))
            for method in ("ddp_sgd", "ddp_adam")
        },
    }


def problem(size: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Network and this process's batch."""
    width = SIZES[size]
    if not width:
        return reference_convnet(), torch.randn(samples // 4, 1, 28, 28), torch.randint(0, 10, (samples // 4,))
    hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.ReLU())]
    network = nn.Sequential(nn.Linear(256, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
    return network, torch.randn(samples, 256), torch.randint(0, 10, (samples,))


def _process(rank: int, folder: str, size: str, replicas: int, rounds: int, samples: int) -> None:
    """One replica, with all methods in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=replicas)
    steps = {method: _step_of(method, size, samples, rank) for method in METHODS}
    counts = {}
    for method, step in steps.items():
        step()
        step()  # buckets of DDP are rebuilt after the first, replicas stand apart from the second
        counts[method] = max(1, round(BLOCK / _timed(step, 2)))
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS[number % len(METHODS) :] + METHODS[: number % len(METHODS)]:
            times[method].append(_timed(steps[method], counts[method]))
    if rank == 0:
        N = sum(parameter.numel() for parameter in problem(size, samples)[0].parameters())
        (Path(folder) / "result.json").write_text(json.dumps({"parameters": N, "times": times}))
    dist.barrier()
    dist.destroy_process_group()


def _step_of(method: str, size: str, samples: int, rank: int) -> Callable[[], Any]:
    """What one step of a method does."""
    torch.manual_seed(0)
    network = problem(size, samples)[0]
    torch.manual_seed(1 + rank)
    _, inputs, targets = problem(size, samples)
    model = DistributedDataParallel(network) if method.startswith("ddp") else network

    def gradient() -> Tensor:
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if method == "replica_newton":
        optimizer = ReplicaNewton(network.parameters(), 1e-3, rule="paper", topology=TreeReduction())
        return lambda: optimizer.step(gradient)
    base = {
        "ddp_sgd": torch.optim.SGD(network.parameters(), 1e-3),
        "ddp_adam": torch.optim.Adam(network.parameters(), 1e-3),
    }.get(method)

    def step() -> None:
        network.zero_grad()
        gradient()
        if base is not None:
            base.step()

    return step


def _timed(step: Callable[[], Any], count: int) -> float:
    """Seconds a step, of so many steps in all processes: the same number in all."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    taken = torch.tensor((time.perf_counter() - start) / count, dtype=torch.float64)
    dist.broadcast(taken, 0)
    return float(taken)


def draw(result: dict[str, Any]) -> Figure:
    """Ratio to DDP with SGD against the number of replicas, a line a size."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#0072B2", "#D55E00", "#009E73")
    for size, colour in zip(SIZES, colours, strict=True):
        of_size = [one for one in result["settings"] if one["size"] == size and one["replicas"] > 1]
        if of_size:
            M = [one["replicas"] for one in of_size]
            axes.plot(M, [one["ratio_to"]["ddp_sgd"] for one in of_size], "o-", color=colour, label=f"N = {size}")
    axes.axhline(1.0, color="#000000", linewidth=1.0, label="DDP + SGD")
    axes.axhline(1.1, color="#666666", linestyle="--", label="aim, 1.10")
    axes.set_ylim(0.95)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("replicas M")
    axes.set_ylabel("step time ÷ DDP + SGD")
    axes.set_title(f"ReplicaNewton over processes, {result['samples']:,} samples each (gloo, {result['cores']} cores)")
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


if __name__ == "__main__":
    main()
