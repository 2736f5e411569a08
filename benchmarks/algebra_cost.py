"""What the curvature algebra costs: its share of a training step, and its growth with the number of parameters.

Writes `algebra_cost.json`, `.png` and `.svg`. Times are medians; the share is a ratio of times taken in turn in one
run, so that the load of the machine falls on both.

    python benchmarks/algebra_cost.py                 # a few minutes; 10⁸ parameters need 13 GiB
    python benchmarks/algebra_cost.py --largest 1e6   # seconds
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import nn

from replica_newton import ReplicaNewton, SecantCurvature, Simulated
from replica_newton.files import replace_file
from replica_newton.training.models import reference_convnet

REPLICAS = 8
BATCH = 256


def main() -> None:
    """Measure, write, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e8, help="largest number of parameters (default 1e8)")
    parser.add_argument("--repetitions", type=int, default=200, help="training steps timed (default 200)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    share = measure_share(options.repetitions)
    growth = [measure_growth(N) for N in track(sizes(int(options.largest)), "growth with N", transient=True)]
    result = {
        "replicas": REPLICAS,
        "threads": options.threads,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "step": share,
        "growth": growth,
    }
    replace_file(options.out / "algebra_cost.json", (json.dumps(result, indent=1) + "\n").encode())
    figure = draw(result)
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"algebra_cost.{suffix}", dpi=150)
    console = Console()
    console.print(
        f"N = {share['parameters']:,}, M = {REPLICAS}: algebra {share['algebra_ms']:.3f} ms of a step of "
        f"{share['step_ms']:.2f} ms: {share['algebra_share']:.1%}; all that the optimizer does beside the gradients: "
        f"{share['optimizer_share']:.1%}"
    )
    for one in growth:
        console.print(
            f"N = {one['parameters']:>11,}: {one['algebra_ms']:10.3f} ms, {one['ns_per_parameter']:6.2f} ns a "
            f"parameter, {one['copies']:.1f} times a copy of W and G"
        )


def sizes(largest: int) -> list[int]:
    """Numbers of parameters, three a decade from 10⁴ up to the largest."""
    return [N for exponent in range(4, 9) for N in (10**exponent, 2 * 10**exponent, 5 * 10**exponent) if largest >= N]


def algebra(W: torch.Tensor, G: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The paper's step direction from replicas' rows: all that the curvature adds to plain SGD."""
    return SecantCurvature(W, G).inverse_hvp(z)


def measure_share(repetitions: int) -> dict[str, float]:
    """Step of the reference network on random images, M = 8, and the parts of it."""
    torch.manual_seed(0)
    model, topology = reference_convnet(), Simulated(REPLICAS)
    parameters = list(model.parameters())
    optimizer = ReplicaNewton(parameters, 0.01, rule="paper", topology=topology)
    inputs, targets = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    closure = topology.closure(model, nn.functional.cross_entropy, inputs, targets)
    optimizer.step(closure)
    W = torch.cat([optimizer.state[p]["displacements"].flatten(start_dim=1) for p in parameters], dim=1)
    points = W + torch.cat([p.detach().flatten() for p in parameters])
    fresh: list[torch.Tensor] = []

    def evaluate() -> None:
        gradients = closure.gradients(parameters, points).gradients
        fresh[:] = [gradients, gradients.mean(dim=0)]

    # The algebra follows the gradients at once, as in a step, so that it finds them where a step would: in the cache.
    step, gradients, product = in_turn(
        repetitions,
        lambda: optimizer.step(closure),
        evaluate,
        lambda: algebra(W, *fresh),
    )
    return {
        "parameters": W.shape[1],
        "step_ms": step,
        "gradients_ms": gradients,
        "algebra_ms": product,
        "algebra_share": product / step,
        "optimizer_share": 1 - gradients / step,
    }


def measure_growth(N: int) -> dict[str, float]:
    """Algebra on N parameters beside a plain copy of its inputs, the least that any algebra must move."""
    W, G = torch.randn(REPLICAS, N), torch.randn(REPLICAS, N)
    z = G[0].clone()
    repetitions = max(3, min(100, 10**8 // (20 * N)))
    product, copy_w = in_turn(repetitions, lambda: algebra(W, G, z), W.clone)
    return {
        "parameters": N,
        "algebra_ms": product,
        "ns_per_parameter": product * 1e6 / N,
        "copies": product / (2 * copy_w),
    }


def in_turn(repetitions: int, *functions: Callable[[], Any]) -> list[float]:
    """Median times in milliseconds of functions called one after the other, again and again."""
    times: list[list[float]] = [[] for _ in functions]
    for repetition in range(repetitions + 2):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repetition >= 2:  # the first calls allocate and compile
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def draw(result: dict[str, Any]) -> Figure:
    """Time against N on log axes, with the line of strict proportionality through the largest N."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    N = [one["parameters"] for one in result["growth"]]
    milliseconds = [one["algebra_ms"] for one in result["growth"]]
    axes.loglog(N, milliseconds, "o-", color="#0072B2", label="algebra: secants and one product Ĥ⁻¹z")
    line = [milliseconds[-1] * n / N[-1] for n in N]
    axes.loglog(N, line, "--", color="#666666", label=f"proportional to N: {line[-1] * 1e6 / N[-1]:.1f} ns a parameter")
    step = result["step"]
    label = f"a training step of the reference network, {step['algebra_share']:.1%} of it algebra"
    axes.loglog(step["parameters"], step["step_ms"], "s", color="#D55E00", label=label)
    axes.set_xlabel("parameters N")
    axes.set_ylabel("time (ms)")
    axes.set_title(f"Cost of the curvature algebra, M = {result['replicas']} replicas, CPU, {result['threads']} thread")
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.97))
    return figure


if __name__ == "__main__":
    main()
