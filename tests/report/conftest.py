"""Summaries of comparisons, small enough to check by hand."""

from collections.abc import Callable
from typing import Any

import pytest

Run = dict[str, Any]


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """One run: `make_run("paper", 4, seed=1, nll=[0.5, 0.2])`, other numbers made up from the epochs."""

    def make(
        method: str, replicas: int, *, nll: list[float | None], seed: int = 0, rate: float | None = 0.1, work: int = 600
    ) -> Run:
        epochs = range(1, len(nll) + 1)
        return {
            "method": method,
            "replicas": replicas,
            "seed": seed,
            "learning_rate": rate,
            "train_nll": nll,
            "test_accuracy": [0.9 + 0.01 * epoch for epoch in epochs],
            "gradient_evaluations": [work * epoch for epoch in epochs],
            "seconds": [2.5 * epoch for epoch in epochs],
        }

    return make


@pytest.fixture
def make_summary() -> Callable[..., dict[str, Any]]:
    """Summary of the runs, with a task whose entries a test may change."""

    def make(*runs: Run, **task: object) -> dict[str, Any]:
        settings = {"dataset": "digits", "activation": "tanh", "parameters": 1234, "batch_size": 8, "epochs": 2}
        return {"task": {**settings, "train_samples": 600, **task}, "runs": list(runs)}

    return make


@pytest.fixture
def ladder(make_run: Callable[..., Run], make_summary: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """SGD, the paper's method with M = 1, 2, 4, 8 and an unknown method; two seeds each."""
    lines = [
        ("sgd", 1, 0.4),
        ("paper", 1, 0.41),
        ("paper", 2, 0.3),
        ("paper", 4, 0.2),
        ("paper", 8, 0.1),
        ("mine", 1, 0.5),
    ]
    return make_summary(
        *(make_run(m, k, seed=seed, nll=[2 * end, end + 0.01 * seed]) for m, k, end in lines for seed in (0, 1))
    )
