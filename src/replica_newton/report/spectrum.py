"""A spectrum as a table, a figure and files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from replica_newton.files import replace_file
from replica_newton.report.formats import MISSING
from replica_newton.report.style import save_figure, style
from replica_newton.spectrum import Spectrum, Sweep
from replica_newton.spectrum.density import SpectralDensity

_POSITIVE, _NEGATIVE, _GREY = "#0072B2", "#D55E00", "#707070"
_IN_TABLE, _SHOWN = 3, 5


def sweeps_table(sweeps: Sequence[Sweep], top: int) -> Table:
    """Table with a row for each sweep; it fits into 80 columns.

    Args:
        sweeps: what was reported.
        top: eigenpairs asked for.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, caption_justify="left")
    table.caption = "gradients: over the whole data set; residual: largest ‖Hx − θx‖/|θ|; pairs: converged"
    for heading in ("sweep", "gradients", "sharpness", "θ, largest |θ| first", "residual", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sweeps:
        table.add_row(
            str(one.sweep),
            str(one.gradients),
            f"{one.sharpness:.4g}",
            "  ".join(f"{value:.3g}" for value in one.eigenvalues[:_IN_TABLE]),
            f"{one.residual:.1e}",
            f"{one.converged}/{top}",
        )
    return table


def spectrum_figure(spectrum: Spectrum, task: str, density: SpectralDensity | None = None) -> Figure:
    """Figure with the eigenvalues and their residuals, the convergence, and the density where there is one.

    Args:
        spectrum: the eigenpairs.
        task: network and data, in a few words.
        density: of the whole spectrum.

    Returns:
        The figure, which belongs to no window and to no backend.
    """
    panels = 2 if density is None else 3
    with style():
        figure = Figure(figsize=(5 * panels, 4.2), dpi=100, layout="constrained")
        figure.suptitle(task, fontsize=12.5, parse_math=False)
        axes = figure.subplots(1, panels)
        _draw_values(axes[0], spectrum)
        _draw_convergence(axes[1], spectrum)
        if density is not None:
            _draw_density(axes[2], density)
    return figure


def _draw_values(axes: Axes, spectrum: Spectrum) -> None:
    values = spectrum.eigenvalues.numpy()
    ranks = numpy.arange(1, len(values) + 1)
    for sign, colour, marker, label in ((1, _POSITIVE, "o", "positive"), (-1, _NEGATIVE, "v", "negative")):
        shown = numpy.sign(values) == sign
        if shown.any():
            axes.plot(ranks[shown], abs(values[shown]), marker, color=colour, markersize=6, label=label)
    axes.plot(ranks, spectrum.residuals.numpy(), "x", color=_GREY, markersize=5, label="residual ‖Hx − θx‖")
    axes.set_yscale("log", nonpositive="mask")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="rank by |θ|", ylabel="|θ|", title="Top Hessian eigenvalues")
    axes.legend(frameon=False, fontsize=9)


def _draw_convergence(axes: Axes, spectrum: Spectrum) -> None:
    gradients = [one.gradients for one in spectrum.sweeps]
    axes.plot(gradients, [one.residual for one in spectrum.sweeps], "o-", color="#000000", markersize=4)
    axes.axhline(spectrum.tolerance, color=_GREY, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.annotate(
        "tolerance",
        (0.02, spectrum.tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
        color=_GREY,
    )
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xlim(left=0)
    axes.set(xlabel="gradients over the data set", ylabel="largest ‖Hx − θx‖/|θ|", title="Convergence")


def _draw_density(axes: Axes, density: SpectralDensity) -> None:
    grid, height = density.grid.numpy(), density.density.numpy()
    axes.fill_between(grid, height, color=_POSITIVE, alpha=0.16, linewidth=0)
    axes.plot(grid, height, color=_POSITIVE, linewidth=1.4)
    axes.set_yscale("log", nonpositive="mask")
    # A density below one eigenvalue in a million is the tail of the Gaussians.
    axes.set_ylim(max(float(height.max()) * 1e-7, 1e-12), max(float(height.max()) * 3, 1e-11))
    axes.set(xlabel="eigenvalue", ylabel="density", title="Density of all eigenvalues")


def write_spectrum(
    folder: Path, spectrum: Spectrum, settings: dict[str, Any], task: str, density: SpectralDensity | None = None
) -> None:
    """Write `spectrum.json`, `.npz`, `.png` and `.svg`, each whole or not at all.

    The arrays of `spectrum.npz` are `eigenvalues` and `residuals` `(top,)`, `eigenvectors` `(top, N)`, and with a
    density `density_grid`, `density`, `density_nodes` and `density_weights`.

    Args:
        folder: where they go.
        spectrum: the eigenpairs.
        settings: what a reader needs to run it again.
        task: network and data, in a few words.
        density: of the whole spectrum.
    """
    arrays = {
        "eigenvalues": spectrum.eigenvalues,
        "residuals": spectrum.residuals,
        "eigenvectors": spectrum.eigenvectors.cpu(),
    }
    if density is not None:
        arrays |= {
            "density_grid": density.grid,
            "density": density.density,
            "density_nodes": density.nodes,
            "density_weights": density.weights,
        }
    content = io.BytesIO()
    numpy.savez(content, allow_pickle=False, **{name: array.numpy() for name, array in arrays.items()})
    summary = {
        **settings,
        "converged": spectrum.converged,
        "tolerance": spectrum.tolerance,
        "sharpness": float(spectrum.eigenvalues.max()),
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "density_sigma": None if density is None else density.sigma,
        "sweeps": [
            {
                "sweep": one.sweep,
                "gradients": one.gradients,
                "sharpness": one.sharpness,
                "eigenvalues": list(one.eigenvalues),
                "residual": one.residual,
                "converged": one.converged,
            }
            for one in spectrum.sweeps
        ],
    }
    replace_file(folder / "spectrum.npz", content.getvalue())
    save_figure(spectrum_figure(spectrum, task, density), folder, "spectrum")
    # Last: where it is, the others are whole too.
    replace_file(folder / "spectrum.json", (json.dumps(summary, indent=1) + "\n").encode())


def first_values(spectrum: Spectrum) -> str:
    """What came out, in one line.

    Args:
        spectrum: the eigenpairs.

    Returns:
        For example `Sharpness 12.3; first eigenvalues 12.3, 8.1, -4.2`.
    """
    values = spectrum.eigenvalues.tolist()
    if not values:
        return f"Sharpness {MISSING}"
    return f"Sharpness {max(values):.4g}; first eigenvalues {', '.join(f'{value:.4g}' for value in values[:_SHOWN])}"
