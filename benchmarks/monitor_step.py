"""What a probe of `CurvatureMonitor` costs beside a training step of networks of up to 124 M parameters.

Steps are a gradient and AdamW; probes are exact products, or differences from the gradient in `.grad`. Medians of
single calls, in turn. On a GPU batches of text are larger: there a gradient fills it.

python benchmarks/monitor_step.py --device cuda        # a minute; docs/results/monitor_step_cuda.json
python benchmarks/monitor_step.py --network convnet    # prints alone
"""

import gc
from statistics import median
from typing import Any

import torch
from metric_cost import CASES, Case, batch_of, clock, command, keep, loss_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import AdamW

from replica_newton import CurvatureMonitor

EVERY, RANK = 10, 8
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    ".grad reused": {"relative_step": 1e-3, "reuse_gradient": True},
}


def main() -> None:
    """Measure, print and write."""
    chosen, device, out = command(__doc__ or "")
    found = {name: {kind: measure(CASES[name], device, kind) for kind in KINDS} for name in chosen}
    table = Table(
        "", "N", "step, ms", "probe, ms", f"a probe every {EVERY} steps", title=f"CurvatureMonitor(rank={RANK})"
    )
    for name, kinds in found.items():
        for kind, one in kinds.items():
            times = (f"{one[key]:.4g}" for key in ("step", "probe"))
            table.add_row(f"{name}, {kind}", f"{one['parameters']:,}", *times, f"{one['ratio']:.3f}")
    Console().print(table)
    keep(out / "monitor_step", device, found, every=EVERY, rank=RANK)


def measure(case: Case, device: torch.device, kind: str) -> dict[str, float]:
    """Median milliseconds of a step and of a probe once its space is full, and the ratio of steps with and without."""
    gc.collect()  # the monitor before
    network, inputs = case.model().to(device), batch_of(case, device)
    optimizer = AdamW(network.parameters(), 1e-4, foreach=True)
    monitor = CurvatureMonitor(network, rank=RANK, every=1, **KINDS[kind])
    taken: dict[str, list[float]] = {"gradient": [], "probe": [], "update": []}
    for _ in track(range(3 * RANK), kind, transient=True):
        loss = loss_of(network, case, inputs)
        with clock(device, taken["gradient"]):
            network.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
        with clock(device, taken["probe"]):
            monitor.observe(loss)
        with clock(device, taken["update"]):
            optimizer.step()
    gradient, probe, update = (median(times[RANK:]) for times in taken.values())
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "step": gradient + update,
        "probe": probe,
        "ratio": 1.0 + probe / (EVERY * (gradient + update)),
    }


if __name__ == "__main__":
    main()
