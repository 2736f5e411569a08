"""Default rates that stay, for tests that name them: those of the methods change with the evidence."""

from dataclasses import replace

import pytest

from replica_newton.training.methods import METHODS


@pytest.fixture(autouse=True)
def fixed_default_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, rate in {"sgd": 0.1, "momentum": 0.03, "adam": 0.003, "paper": 0.1}.items():
        monkeypatch.setitem(METHODS, method, replace(METHODS[method], learning_rate=rate))
