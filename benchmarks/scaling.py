"""Weak scaling of a step: a cost model fitted to measured steps, and what it says of 1,024 replicas.

Reads the step times that `step_time.py` measured. Every replica has the same number of samples whatever their number.
Writes `scaling.json`, `.png` and `.svg`.

    python benchmarks/step_time.py && python benchmarks/scaling.py
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.console import Console
from rich.table import Table

from replica_newton.files import replace_file
from replica_newton.topology.cost_model import CostModel, Measurement, Setting, fit

NETWORK_LATENCY = 3e-5
"""Seconds a message: assumed for Ethernet between machines."""
NETWORK_BYTE = 8 / 25e9
"""Seconds a byte: assumed, 25 Gbit/s a replica."""
REPLICAS = tuple(2**power for power in range(11))


def main() -> None:
    """Fit, extrapolate, write, and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=Path("docs/results/step_time.json"), help="of step_time.py")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    if not options.measured.exists():
        parser.error(f"{options.measured} is missing: run benchmarks/step_time.py first")
    measured = json.loads(options.measured.read_text())
    measurements = read(measured)
    model = fit(measurements)
    errors = [abs(model.step(one.setting, one.gradient).total / one.step - 1.0) for one in measurements]
    extrapolation = extrapolate(model, measured["settings"])
    result = {
        "costs": asdict(model),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "network": {"latency": NETWORK_LATENCY, "byte": NETWORK_BYTE},
        "extrapolation": extrapolation,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    replace_file(options.out / "scaling.json", (json.dumps(result, indent=1) + "\n").encode())
    figure = draw(measurements, model, extrapolation)
    for suffix in ("png", "svg"):
        figure.savefig(options.out / f"scaling.{suffix}", dpi=150)
    console = Console()
    console.print(
        f"{model.call * 1e3:.2f} ms a step, {model.latency * 1e6:.1f} microseconds a message, "
        f"{model.byte * 1e9:.3f} ns a byte, {model.element * 1e9:.2f} ns an element, "
        f"{model.product * 1e9:.3f} ns a multiply-add; "
        f"error {result['median_error']:.0%} in the median, {result['largest_error']:.0%} at most"
    )
    table = Table(title="extrapolated step, ms: one replica a machine", box=None, pad_edge=False)
    for column in ("N, k", "M", "gradient", "latency", "bytes", "vectors", "algebra", "calls", "total"):
        table.add_column(column, justify="right")
    for one in extrapolation:
        if one["replicas"] in {8, 64, 1024}:
            parts = (f"{one['milliseconds'][name]:.1f}" for name in one["milliseconds"])
            table.add_row(f"{one['parameters'] / 1e3:,.0f}", f"{one['replicas']:,}", *parts)
    console.print(table)


def read(measured: dict[str, Any]) -> list[Measurement]:
    """Measured steps; M processes on fewer cores share them."""
    return [
        Measurement(
            Setting(one["parameters"], one["replicas"], crowding=max(1.0, one["replicas"] / measured["cores"])),
            one["milliseconds"]["gradient"] / 1e3,
            one["milliseconds"]["replica_newton"] / 1e3,
        )
        for one in measured["settings"]
    ]


def extrapolate(model: CostModel, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of up to 1,024 replicas with a core each, over the assumed network, at the measured costs of work."""
    apart = replace(model, latency=NETWORK_LATENCY, byte=NETWORK_BYTE)
    rows = []
    for parameters in sorted({one["parameters"] for one in settings}):
        alone = min((one for one in settings if one["parameters"] == parameters), key=lambda one: int(one["replicas"]))
        for M in REPLICAS:
            step = apart.step(Setting(parameters, M), alone["milliseconds"]["gradient"] / 1e3)
            parts = {name: 1e3 * seconds for name, seconds in asdict(step).items()}
            rows.append({"parameters": parameters, "replicas": M, "milliseconds": parts | {"total": 1e3 * step.total}})
    return rows


def draw(measurements: list[Measurement], model: CostModel, extrapolation: list[dict[str, Any]]) -> Figure:
    """Measured and fitted step times on the left, the extrapolation on the right."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    near, far = figure.subplots(1, 2, sharey=True)
    colours = ("#0072B2", "#D55E00", "#009E73")
    sizes = sorted({one.setting.parameters for one in measurements})
    for parameters, colour in zip(sizes, colours, strict=False):
        own = [one for one in measurements if one.setting.parameters == parameters]
        M = [one.setting.replicas for one in own]
        near.loglog(M, [1e3 * one.step for one in own], "o", color=colour, label=f"N = {parameters:,}")
        near.loglog(M, [1e3 * model.step(one.setting, one.gradient).total for one in own], "-", color=colour)
        rows = [row for row in extrapolation if row["parameters"] == parameters]
        far.loglog(REPLICAS, [row["milliseconds"]["total"] for row in rows], "-", color=colour)
        far.loglog(REPLICAS, [row["milliseconds"]["gradient"] for row in rows], ":", color=colour)
    near.set_title("measured, and the fitted model")
    far.set_title("extrapolated; dotted: gradient alone")
    near.set_ylabel("time of a step (ms)")
    for axes in (near, far):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("replicas M")
        axes.grid(True, which="major", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    near.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
