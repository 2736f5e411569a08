import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from replica_newton.benchmark.findings import findings
from replica_newton.benchmark.page import write_page
from replica_newton.benchmark.plan import Extent, Plan
from replica_newton.benchmark.results import Records, check_data, load_records
from replica_newton.benchmark.run import Run
from replica_newton.training.run import RunError

Completed = Callable[[Plan, Callable[[Run], float]], tuple[Records, list[Run]]]
PLAN = Plan(
    ("mnist-relu", "digits-mlp", "digits-mlp-full"),
    ("sgd", "adam", "lbfgs", "soap", "replica-newton", "M=1", "paper"),
    Extent(extensions=0),
)
FINALS = {
    # Ours is lower than SGD in two of three seeds on the first task.
    "mnist-relu": {"sgd": 1.0, "adam": 2.0, "soap": 0.8, "replica-newton": 0.9},
    "digits-mlp": {"sgd": 1.0, "adam": 0.5, "soap": 3.0, "replica-newton": 0.5},
    "digits-mlp-full": {"sgd": 1.0, "adam": 2.0, "soap": 2.0, "lbfgs": 0.1, "replica-newton": 0.95},
}


def final(run: Run) -> float:
    if run.method == "paper":
        return math.inf
    if run.method == "M=1":
        return 2.0 * FINALS[run.task]["replica-newton"]
    if run.method == "replica-newton" and run.task == "mnist-relu" and run.seed == 2:
        return 1.5
    best = {"sgd": 0.3, "adam": 0.003, "lbfgs": 0.1, "soap": 0.003}.get(run.method, run.rate)
    return FINALS[run.task][run.method] * (1.0 + abs(math.log10(run.rate / best)))


def test_ratios_and_bars_are_those_of_the_medians(completed: Completed) -> None:
    found = findings(PLAN, completed(PLAN, final)[0])
    ratios = {
        task: {name: (one["opponent"], one["ratio"]) for name, one in both.items()}
        for task, both in found["ratios"].items()
    }
    assert ratios["mnist-relu"] == {
        "first_order": ("SGD", pytest.approx(0.9)),
        "all": ("SOAP", pytest.approx(1.125)),
    }
    assert ratios["digits-mlp"]["all"] == ("Adam", pytest.approx(1.0))
    assert ratios["digits-mlp-full"] == {
        "first_order": ("SGD", pytest.approx(0.95)),
        "all": ("L-BFGS", pytest.approx(9.5)),
    }
    paired = found["ratios"]["mnist-relu"]["first_order"]
    assert (paired["lowest"], paired["highest"]) == (pytest.approx(0.9), pytest.approx(1.5))
    assert (paired["seeds_lower"], paired["seeds"]) == (2, 3)
    bars = [(bar["limit"], bar["within"], bar["tasks"], bar["met"]) for bar in found["bars"]]
    assert bars == [(0.95, 2, 3, True), (1.05, 3, 3, True), (1.05, 1, 3, False), (1.15, 2, 3, False)]
    assert found["ablations"] == {
        "M=1": {task: pytest.approx(2.0) for task in FINALS},
        "paper": dict.fromkeys(FINALS),
    }
    # Ours at 5, 4, 3, 2 and 1 times 0.95, against Adam's 2.0 after all five.
    assert found["reached"] == {"digits-mlp-full": {"share": pytest.approx(0.8), "limit": 0.67, "met": False}}
    assert found["identity"] == {"ratios": {}, "within": 0, "met": True}
    assert found["doublings"] == []
    assert found["safety"] == {"runs": 30, "seeds": 10, "diverged": 0}
    row = found["tasks"]["mnist-relu"]["methods"]["paper"]
    assert (row["final_nll"], row["diverged"], row["at_the_edge"]) == (None, 3, False)


def test_a_run_of_ours_that_diverges_with_any_seed_is_found(completed: Completed) -> None:
    def seventh(run: Run) -> float:
        return math.inf if (run.task, run.method, run.seed) == ("digits-mlp", "replica-newton", 7) else final(run)

    assert findings(PLAN, completed(PLAN, seventh)[0])["safety"]["diverged"] == 1


def test_what_never_comes_as_low_as_adam_has_not_reached_it(completed: Completed) -> None:
    def high(run: Run) -> float:
        return 3.0 if run.method == "replica-newton" else final(run)

    reached = findings(PLAN, completed(PLAN, high)[0])["reached"]["digits-mlp-full"]
    assert (reached["share"], reached["met"]) == (None, False)


def test_the_step_without_a_metric_is_held_to_momentum(completed: Completed, tmp_path: Path) -> None:
    plan = Plan(("digits-mlp", "digits-mlp-full"), ("momentum", "replica-newton", "identity"), Extent(extensions=0))
    finals = {"digits-mlp": {"momentum": 1.0, "identity": 0.8}, "digits-mlp-full": {"momentum": 1.0, "identity": 1.2}}
    records, _ = completed(plan, lambda run: finals[run.task].get(run.method, 0.5))
    assert findings(plan, records)["identity"] == {
        "ratios": {"digits-mlp": pytest.approx(0.8), "digits-mlp-full": pytest.approx(1.2)},
        "within": 1,
        "met": False,
    }
    claim = "| without a metric (identity) at most best-tuned SGD with momentum on every task | on 1 of 2 "
    assert f"{claim}| does not hold |" in write_page(plan, records, tmp_path, "replica-newton benchmark").read_text()


def test_twice_the_replicas_are_held_to_as_many(completed: Completed, tmp_path: Path) -> None:
    plan = Plan(("digits-mlp", "digits-mlp-full"), ("sgd", "replica-newton", "M=1", "M=2", "M=4"), Extent(extensions=0))
    losses = {"M=1": 1.0, "M=2": 2.0, "M=4": 2.0}

    def of(run: Run) -> float:
        neutral = run.task == "digits-mlp" and run.method == "M=2"
        return 1.04 if neutral else losses.get(run.method, 0.5)

    records, _ = completed(plan, of)
    first, second = findings(plan, records)["doublings"]
    assert (first["from"], first["to"], first["within"], first["worst"], first["met"]) == (1, 2, 1, 2.0, False)
    assert (second["from"], second["to"], second["within"], second["met"]) == (2, 4, 1, False)
    text = write_page(plan, records, tmp_path, "replica-newton benchmark").read_text()
    assert "from 1 to 2 replicas at most 1.05 × the loss, on every task | on 1 of 2, at worst 2.000 | does not" in text


def test_an_unfinished_benchmark_has_no_findings(completed: Completed) -> None:
    records, order = completed(PLAN, final)
    del records[order[-1]]
    with pytest.raises(ValueError, match=r"must be finished: replica-newton on .* with seed 9 is not"):
        findings(PLAN, records)


def test_the_page_says_what_was_found(completed: Completed, tmp_path: Path) -> None:
    records, _ = completed(PLAN, final)
    page = write_page(PLAN, records, tmp_path, "replica-newton benchmark --made-up")
    text = page.read_text()
    assert "replica-newton benchmark --made-up" in text
    assert "| at most 0.95 × the best first-order method on two thirds of the tasks | on 2 of 3 | holds |" in text
    assert "| no run of the default diverges | 0 of 30, 10 seeds a task | holds |" in text
    reached = "| digits, MLP, full batch: best-tuned Adam's final loss within 0.67 of its evaluations "
    assert f"{reached}| within 0.80 | does not hold |" in text
    assert "0.900 [0.900 – 1.500], lower in 2 of 3 seeds | SGD |" in text
    assert "two-sided p of\n0.25 in a sign test: no single task can be significant" in text
    assert "| the paper's rule, M = 8, own data, rate 0.1 | diverged | diverged | diverged |" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and not line.rstrip().endswith("|")]
    for name in ("convergence", "time", "rates"):
        assert f"benchmarks/{name}.png" in text
        assert (tmp_path / "benchmarks" / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / "benchmarks" / f"{name}.svg").exists()
    summary = json.loads((tmp_path / "benchmarks" / "summary.json").read_text())
    assert summary["findings"]["bars"][0]["met"] is True
    assert load_records(tmp_path / "benchmarks" / "summary.json").keys() == records.keys()


def test_the_page_without_ours_compares_nothing(completed: Completed, tmp_path: Path) -> None:
    plan = Plan(("digits-mlp",), ("sgd", "adam"), Extent(seeds=1, extensions=0))
    text = write_page(plan, completed(plan, final)[0], tmp_path, "replica-newton benchmark").read_text()
    assert "At a glance" not in text
    assert "Ablations" not in text
    assert "### digits, MLP, batch 256" in text


def test_runs_on_other_data_are_not_compared(completed: Completed) -> None:
    records, _ = completed(Plan(("digits-mlp",), ("sgd",)), final)
    check_data(records, {"digits-mlp": "data of digits-mlp"})
    check_data(records, {"mnist-relu": "whatever"})
    with pytest.raises(RunError, match="digits-mlp was run on data of digits-mlp, now it would be other: start anew"):
        check_data(records, {"digits-mlp": "other"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable summary"),
        ('{"format": 1, "runs": [{"run": {}}]}', "not a readable summary"),
        ('{"format": 99, "runs": []}', "must have format 1, got 99"),
    ],
)
def test_a_damaged_summary_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        load_records(path)
    assert path.read_text() == content
    assert load_records(tmp_path / "none.json") == {}
