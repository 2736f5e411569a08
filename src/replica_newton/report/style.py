"""How our figures look and how they are saved."""

import io
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox

from replica_newton.files import replace_file

_DPI = 180
_LAYOUT_PASSES = 3
_POSITION_DECIMALS = 6  # of the width and height of a figure
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#808080",
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10.5,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "svg.fonttype": "path",
    # A fixed salt and no date: the same summary gives the same file.
    "svg.hashsalt": "replica-newton",
    "xtick.color": "#808080",
    "xtick.labelcolor": "#333333",
    "ytick.color": "#808080",
    "ytick.labelcolor": "#333333",
}


def style() -> AbstractContextManager[None]:
    """Style of our figures while it is entered, whatever the user has set for theirs."""
    context: AbstractContextManager[None] = matplotlib.style.context(["default", _STYLE])
    return context


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Figure as PNG and as SVG, each whole or not at all.

    Args:
        figure: Figure to draw.
        folder: Folder of the two files; it is created when it is missing.
        name: Name of the files without its ending.
    """
    png = io.BytesIO()
    settle(figure)
    with style():
        figure.savefig(png, format="png", dpi=_DPI)
    replace_file(folder / f"{name}.png", png.getvalue())
    replace_file(folder / f"{name}.svg", figure_svg(figure).encode())


def figure_svg(figure: Figure) -> str:
    """SVG file of a figure, with its text as outlines: it looks the same wherever it is shown.

    Args:
        figure: Figure to draw.

    Returns:
        The whole SVG file, the same one for the same figure.
    """
    svg = io.BytesIO()
    settle(figure)
    with style():
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return svg.getvalue().decode()


def settle(figure: Figure) -> None:
    """Find the places of all axes and keep them.

    A constrained layout moves them a little whenever it is drawn, and its solver rounds differently every time, which
    would show in the names of clip paths.

    Args:
        figure: Figure whose layout is fixed from now on; one without a constrained layout stays as it is.
    """
    if not isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        return
    with style():
        for _ in range(_LAYOUT_PASSES):
            figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(Bbox(axes.get_position(original=True).get_points().round(_POSITION_DECIMALS)))
