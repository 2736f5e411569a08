"""Tables for the terminal: the results of a comparison, and what a topology costs."""

from collections.abc import Sequence

from rich import box
from rich.filesize import decimal as format_bytes
from rich.table import Table
from rich.text import Text

from replica_newton.report.formats import (
    MISSING,
    format_count,
    format_nll,
    format_nll_range,
    format_percent,
    format_rate,
    format_seconds,
)
from replica_newton.report.summary import Summary, compare, group_runs, method_name
from replica_newton.topology.estimate import Load, all_reduce

# Least widths: air between the columns as long as the numbers are short, and no more than 80 columns when they are not.
_COLUMNS = {"M": 3, "rate": 7, "NLL": 8, "min–max": 14, "test": 7, "grads": 6, "sec.": 6, "seeds": 5}


def results_table(summary: Summary) -> Table:
    """Table with a row for each method, number of replicas and learning rate; it fits into 80 columns.

    Args:
        summary: Content of `summary.json`.

    Returns:
        The table. Where several learning rates were run, a star marks the best one; the row that ends lowest is bold.
    """
    series = group_runs(summary)
    standing = compare(series)
    caption = "NLL: final training NLL, median over seeds\ngrads: gradient evaluations, in samples"
    if any(one.rates > 1 for one in series):
        caption += "\n*: best learning rate"
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    table.add_column("method", max_width=12, overflow="ellipsis", no_wrap=True)
    for heading, width in _COLUMNS.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for one in series:
        several = len(one.seeds) > 1
        spread = format_nll_range(one.final_nll.low, one.final_nll.high) if several else MISSING
        star = "*" if one.best and one.rates > 1 else ""
        lowest = standing is not None and one in standing.lowest
        table.add_row(
            # Text, because a method's name is data: square brackets in it are not markup.
            Text(method_name(one.method)),
            str(one.replicas),
            star + format_rate(one.learning_rate),
            format_nll(one.final_nll.median),
            spread,
            format_percent(one.final_test_accuracy),
            format_count(one.final_gradient_evaluations),
            format_seconds(one.final_seconds),
            str(len(one.seeds)),
            style="bold" if lowest else None,
        )
    return table


def load_table(loads: Sequence[Load], parameters: int, replicas: int, note: str = "") -> Table:
    """Table with a row for each role of a topology's processes.

    Args:
        loads: What `estimate` returned.
        parameters: N.
        replicas: M.
        note: what else is to be said below.

    Returns:
        The table.
    """
    baseline = all_reduce(parameters, replicas)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, caption_justify="left")
    table.caption = f"data-parallel SGD sends {format_bytes(round(baseline))} a step (ring all-reduce); fp32 throughout"
    table.caption += f"\n{note}" if note else ""
    table.add_column("processes")
    for heading in ("sent a step", "÷ SGD's", "and for M×M sums", "state kept"):
        table.add_column(heading, justify="right")
    for load in loads:
        table.add_row(
            f"{load.processes} × {load.role}",
            format_bytes(load.sent),
            f"{load.sent / baseline:.3f}" if baseline else MISSING,
            format_bytes(load.sums_sent),
            format_bytes(load.state),
        )
    return table
