"""Numbers as text: one way of writing each quantity, shared by the figure, the HTML report and the terminal."""

import math

MISSING = "–"


def format_nll(value: float) -> str:
    """Negative log-likelihood with three significant digits, as a plain decimal where that is readable.

    Args:
        value: Negative log-likelihood; a value that is not finite comes from a run that diverged.

    Returns:
        For example `0.0123`, `2.30` or `diverged`.
    """
    if not math.isfinite(value):
        return "diverged"
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e6:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def format_nll_range(low: float, high: float) -> str:
    """Range of negative log-likelihoods.

    Args:
        low: Smallest value.
        high: Largest value.

    Returns:
        For example `0.0120–0.0134`, `0.0120–diverged`, or a dash when there is no finite value.
    """
    return f"{format_nll(low)}–{format_nll(high)}" if math.isfinite(low) else MISSING


def format_count(value: float) -> str:
    """Number of samples in thousands or millions.

    Args:
        value: Number of samples.

    Returns:
        For example `600`, `60k`, `1.25M`, or a dash when the number is missing.
    """
    if not math.isfinite(value):
        return MISSING
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6k would be rounded to "1e+03k", so the next larger suffix starts half a unit early.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def format_percent(fraction: float) -> str:
    """Fraction as a percentage with one decimal.

    Args:
        fraction: Fraction from 0 to 1.

    Returns:
        For example `97.8 %`, or a dash when the number is missing.
    """
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else MISSING


def format_seconds(seconds: float) -> str:
    """Duration in seconds, with a decimal only where it matters.

    Args:
        seconds: Duration in seconds.

    Returns:
        For example `8.4` or `312`, or a dash when the number is missing.
    """
    if not math.isfinite(seconds):
        return MISSING
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:.0f}"


def format_rate(learning_rate: float | None) -> str:
    """Learning rate in the shortest form.

    Args:
        learning_rate: Learning rate; `None` when the method chooses its own.

    Returns:
        For example `0.05`, or `own` for a method that chooses its own.
    """
    return "own" if learning_rate is None else f"{learning_rate:.4g}"
