import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from replica_newton.report.style import save_figure
from replica_newton.reproduction.surface_figures import save_animation, surfaces_figure
from replica_newton.reproduction.surface_methods import METHODS, TOLERANCE
from replica_newton.reproduction.surfaces import SURFACES

DRAWN = {METHODS[name].label for name in METHODS if name != "paper-8"}


@pytest.fixture(scope="module")
def figure():
    return surfaces_figure()


def lines(axes):
    """Lines of the panel by their label, without marks."""
    return {line.get_label(): line for line in axes.lines if line.get_label() in DRAWN}


def test_a_map_and_a_curve_for_each_surface(figure):
    maps, curves = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title().split("\n")[0] for axes in maps] == list(SURFACES)
    assert [axes.get_yscale() for axes in curves] == ["log"] * 3
    assert [axes.get_xlabel() for axes in curves] == ["steps"] * 3
    for axes in figure.axes:
        assert set(lines(axes)) == DRAWN
    for axes in maps:
        assert axes.collections
    assert {text.get_text() for text in figure.legends[0].get_texts()} - {""} == DRAWN


def test_lines_start_together_and_are_those_of_the_methods(figure):
    for surface, above, below in zip(SURFACES.values(), figure.axes[:3], figure.axes[3:], strict=True):
        for label, line in lines(above).items():
            assert tuple(line.get_xydata()[0]) == pytest.approx(surface.start)
            heights = lines(below)[label]
            assert len(heights.get_xdata()) == len(line.get_xdata())
            assert heights.get_xdata()[0] == 0
            # Ways end where they arrive, or with the budget.
            assert heights.get_ydata()[-1] <= TOLERANCE or heights.get_xdata()[-1] == surface.budget


def test_lines_can_be_told_apart_without_colours(figure):
    looks = {
        (line.get_marker(), str(line.get_linestyle()), line.get_linewidth(), line.get_color())
        for line in lines(figure.axes[0]).values()
    }
    assert len({look[3] for look in looks}) == len(DRAWN)
    # The two wide lines have no markers.
    assert len({look[0] for look in looks}) == len(DRAWN) - 1


def test_nothing_sticks_out_of_the_figure(figure):
    figure.draw_without_rendering()
    texts = [figure.legends[0], *(axes.title for axes in figure.axes)]
    for extent in (text.get_window_extent() for text in texts):
        assert 0 <= extent.x0 <= extent.x1 <= figure.bbox.x1
        assert 0 <= extent.y0 <= extent.y1 <= figure.bbox.y1


def test_saved_files(tmp_path):
    save_figure(surfaces_figure(), tmp_path / "new", "figure1")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["figure1.png", "figure1.svg"]
    with Image.open(tmp_path / "new" / "figure1.png") as png:
        assert png.width >= 1500
    assert ET.parse(tmp_path / "new" / "figure1.svg").getroot().tag.endswith("svg")  # noqa: S314


def test_the_gif_moves_loops_and_is_the_same_every_time(tmp_path):
    path = tmp_path / "new" / "figure1.gif"
    save_animation(path, frames=4)
    content = path.read_bytes()
    assert len(content) < 1_500_000
    with Image.open(path) as gif:
        assert gif.n_frames == 4
        assert gif.size[0] == 900
        assert gif.info["loop"] == 0
        pictures = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            pictures.append(np.asarray(gif.convert("RGB")))
    assert all((one != other).any() for one, other in pairwise(pictures))
    save_animation(path, frames=4)
    assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == ["figure1.gif"]


def test_an_animation_has_two_frames_or_more(tmp_path):
    with pytest.raises(ValueError, match="frames=1 must be >= 2"):
        save_animation(tmp_path / "figure1.gif", frames=1)
