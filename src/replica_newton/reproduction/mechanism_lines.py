"""Lines to draw: what repetitions have in common, and where a line crosses a level."""

import math
from collections.abc import Sequence
from statistics import median


def median_and_range(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Median, smallest and largest value of each row, as `median`, `low` and `high`."""
    return {name: [of(row) for row in rows] for name, of in (("median", median), ("low", min), ("high", max))}


def crossing(x: Sequence[float], y: Sequence[float], level: float = 1.0) -> float | None:
    """First x at which a line, straight on logarithmic axes, rises through a level; None if it does not."""
    for i in range(len(x) - 1):
        if y[i] < level <= y[i + 1]:
            share = math.log(level / y[i]) / math.log(y[i + 1] / y[i])
            return math.exp(math.log(x[i]) + share * math.log(x[i + 1] / x[i]))
    return None
