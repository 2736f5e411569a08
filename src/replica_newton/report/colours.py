"""Line colours: one hue a method (safe for colour-blind readers), from light to dark with the number of replicas."""

from collections.abc import Iterable, Sequence
from itertools import cycle

# Okabe & Ito, "Color Universal Design" (2008). Known methods keep their hue from one figure to the next.
_KNOWN_HUES = {"sgd": "#000000", "momentum": "#009E73", "adam": "#CC79A7", "paper": "#0072B2", "saddle-free": "#D55E00"}
_FURTHER_HUES = ("#E69F00", "#56B4E9", "#F0E442")
LINE_HUES = (*_KNOWN_HUES.values(), *_FURTHER_HUES[:2])
"""Seven hues that thin lines can have on white: yellow is left out."""

# CIE lightness L*. The lightest still has a contrast of 3 : 1 against white (WCAG's rule for graphics); the steps
# between four numbers of replicas are about 15, many times the just noticeable difference.
_LIGHTEST = 61.5
_DARKEST = 15.0
_ALONE = 46.0


def line_colours(lines: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Colour of every line, as `#rrggbb`.

    Args:
        lines: Method and number of replicas of each line.

    Returns:
        The colour for each pair of method and number of replicas. The same number of replicas has the same lightness
        for all methods that were run with several; a method run with one number alone has a middle lightness.
    """
    replicas: dict[str, set[int]] = {}
    for method, count in lines:
        replicas.setdefault(method, set()).add(count)
    ladder = sorted(set().union(*(counts for counts in replicas.values() if len(counts) > 1)))
    hues = _method_hues(list(replicas))
    colours = {}
    for method, counts in replicas.items():
        for count in counts:
            lightness = _ALONE
            if len(counts) > 1:
                lightness = _LIGHTEST + (_DARKEST - _LIGHTEST) * ladder.index(count) / (len(ladder) - 1)
            colours[method, count] = _with_lightness(hues[method], lightness)
    return colours


def _method_hues(methods: Sequence[str]) -> dict[str, str]:
    """Base colour of each method: its own if it is known, else the next one that no method here uses."""
    hues = {method: _KNOWN_HUES[method] for method in methods if method in _KNOWN_HUES}
    free = [hue for hue in (*_FURTHER_HUES, *_KNOWN_HUES.values()) if hue not in hues.values()]
    # strict=False: the free hues start again from the first when there are more methods than hues.
    return hues | dict(zip((m for m in methods if m not in hues), cycle(free), strict=False))


def _with_lightness(colour: str, lightness: float) -> str:
    """The colour mixed, in linear light, with black or white until its CIE lightness L* is the given one."""
    linear = [_to_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    target = ((lightness + 16) / 116) ** 3
    if luminance > target:
        mixed = [channel * target / luminance for channel in linear]
    else:
        white = (target - luminance) / (1 - luminance)
        mixed = [channel + white * (1 - channel) for channel in linear]
    return "#" + "".join(f"{round(255 * _to_srgb(channel)):02x}" for channel in mixed)


def _to_linear(channel: float) -> float:
    """SRGB channel (0 to 1) in linear light."""
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _to_srgb(channel: float) -> float:
    """Linear-light channel (0 to 1) in sRGB."""
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
