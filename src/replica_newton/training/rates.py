"""A grid of learning rates that grows as long as its end is best."""

import math
from collections.abc import Callable, Sequence


def tune(
    rates: Sequence[float], loss: Callable[[float], float | None], extensions: int
) -> tuple[list[float], list[float] | None]:
    """Rates to be tried: the grid, and one more beyond either end as long as the best one stands there.

    Args:
        rates: of the grid, ascending, on the ladder of 1, 3, 10 and so on.
        loss: of a rate, infinite where it diverged; None where it is not known yet.
        extensions: rates that may be added at either end.

    Returns:
        All rates to be tried as far as known, ascending, and their losses once there will be no more of them.
    """
    tried, below, above = list(rates), extensions, extensions
    while True:
        found = [loss(rate) for rate in tried]
        losses = [value for value in found if value is not None]
        if len(losses) < len(tried):
            return tried, None
        best = losses.index(min(losses))
        if best == 0 and below:
            tried, below = [neighbour(tried[0], up=False), *tried], below - 1
        elif best == len(tried) - 1 and above:
            tried, above = [*tried, neighbour(tried[-1], up=True)], above - 1
        else:
            return tried, losses


def neighbour(rate: float, *, up: bool) -> float:
    """The rate that is next on the ladder of 1, 3, 10 and so on.

    Args:
        rate: on the ladder.
        up: whether the next larger.

    Returns:
        The rate.
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    three = rate / 10.0**exponent > 2.0
    if up:
        return float(f"1e{exponent + 1}") if three else float(f"3e{exponent}")
    return float(f"1e{exponent}") if three else float(f"3e{exponent - 1}")
