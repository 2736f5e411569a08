import math

import pytest

from replica_newton.report.formats import (
    format_count,
    format_nll,
    format_nll_range,
    format_percent,
    format_rate,
    format_seconds,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3026, "2.30"),
        (0.012345, "0.0123"),
        (0.00012345, "0.000123"),
        (123.4, "123"),
        (98765.0, "98765"),
        (0.0, "0"),
        (1.25e-7, "1.25e-07"),
        (3e9, "3.00e+09"),
        (math.inf, "diverged"),
        (math.nan, "diverged"),
    ],
)
def test_nll_has_three_digits(value, text):
    assert format_nll(value) == text


def test_nll_range():
    assert format_nll_range(0.0123, 2.3) == "0.0123–2.30"
    assert format_nll_range(0.0123, math.inf) == "0.0123–diverged"
    assert format_nll_range(math.inf, math.inf) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (600, "600"),
        (60_000, "60k"),
        (999_400, "999k"),
        (999_600, "1M"),
        (1_250_000, "1.25M"),
        (3e9, "3G"),
        (math.nan, "–"),
    ],
)
def test_count_in_thousands(value, text):
    assert format_count(value) == text


def test_other_numbers():
    assert format_percent(0.9784) == "97.8 %"
    assert format_percent(math.nan) == "–"
    assert format_rate(0.05) == "0.05"
    assert format_rate(None) == "own"
    assert [format_seconds(value) for value in (8.44, 99.94, 99.96, math.nan)] == ["8.4", "99.9", "100", "–"]
