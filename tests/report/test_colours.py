from itertools import pairwise

import pytest

from replica_newton.report.colours import line_colours

KNOWN = ["sgd", "momentum", "adam", "paper", "saddle-free"]


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` by the definition of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(colour: str) -> float:
    """CIE lightness L*, from 0 for black to 100 for white."""
    return 116 * luminance(colour) ** (1 / 3) - 16


@pytest.mark.parametrize("method", [*KNOWN, "mine"])
def test_more_replicas_are_visibly_darker(method):
    colours = line_colours((method, replicas) for replicas in (8, 1, 4, 2))
    steps = [lightness(colours[method, replicas]) for replicas in (1, 2, 4, 8)]
    assert all(lighter - darker > 10 for lighter, darker in pairwise(steps))


@pytest.mark.parametrize("method", [*KNOWN, "mine", "yours", "theirs"])
def test_lightest_is_legible_on_white(method):
    lightest = line_colours([(method, 1), (method, 8)])[method, 1]
    assert 1.05 / (luminance(lightest) + 0.05) > 2.95


def test_methods_differ_in_colour():
    methods = [*KNOWN, "mine", "yours", "theirs"]
    assert len(set(line_colours((method, 1) for method in methods).values())) == len(methods)


def test_same_replicas_have_the_same_lightness_for_all_methods():
    colours = line_colours([("paper", 1), ("paper", 2), ("paper", 4), ("saddle-free", 2), ("saddle-free", 4)])
    assert lightness(colours["paper", 2]) == pytest.approx(lightness(colours["saddle-free", 2]), abs=0.5)


def test_more_methods_than_hues():
    methods = [f"method {i}" for i in range(20)]
    assert set(line_colours((method, 1) for method in methods)) == {(method, 1) for method in methods}
