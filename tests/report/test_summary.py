import math

import pytest

from replica_newton.report.summary import compare, group_runs, headline


def test_median_and_range_over_seeds(make_run, make_summary):
    summary = make_summary(
        make_run("paper", 4, seed=0, nll=[0.9, 0.5]),
        make_run("paper", 4, seed=1, nll=[0.7, 0.2]),
        make_run("paper", 4, seed=2, nll=[0.8, 0.4]),
    )
    (series,) = group_runs(summary)
    assert series.seeds == (0, 1, 2)
    assert series.nll == ((0.8, 0.7, 0.9), (0.4, 0.2, 0.5))
    assert series.final_nll == (0.4, 0.2, 0.5)
    assert series.test_accuracy == pytest.approx((0.91, 0.92))
    assert series.gradient_evaluations == (600, 1200)
    assert (series.final_gradient_evaluations, series.final_seconds) == (1200, 5.0)
    assert (series.best, series.rates, series.diverged) == (True, 1, 0)


def test_series_are_sorted_by_method_replicas_and_rate(make_run, make_summary):
    keys = [("mine", 1, 0.1), ("paper", 8, 0.1), ("paper", 8, None), ("paper", 2, 0.1), ("sgd", 1, 0.1)]
    series = group_runs(make_summary(*(make_run(m, k, rate=rate, nll=[1.0]) for m, k, rate in keys)))
    assert [(one.method, one.replicas, one.learning_rate) for one in series] == [
        ("sgd", 1, 0.1),
        ("paper", 2, 0.1),
        ("paper", 8, None),
        ("paper", 8, 0.1),
        ("mine", 1, 0.1),
    ]


def test_interrupted_run_counts_as_far_as_it_got(make_run, make_summary):
    summary = make_summary(
        make_run("sgd", 1, seed=0, nll=[0.6, 0.4]), make_run("sgd", 1, seed=1, nll=[0.8]), make_run("adam", 1, nll=[])
    )
    (series,) = group_runs(summary)
    assert series.nll == (pytest.approx((0.7, 0.6, 0.8)), (0.4, 0.4, 0.4))
    assert series.final_nll == pytest.approx((0.6, 0.4, 0.8))


def test_lists_of_one_run_may_differ_in_length(make_run, make_summary):
    run = make_run("sgd", 1, nll=[0.6, 0.4])
    run["test_accuracy"], run["gradient_evaluations"], run["seconds"] = [0.9], [600], []
    (series,) = group_runs(make_summary(run))
    assert series.test_accuracy[0] == series.final_test_accuracy == 0.9
    assert math.isnan(series.test_accuracy[1])
    assert math.isnan(series.gradient_evaluations[1])
    assert math.isnan(series.final_seconds)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_seed_that_diverged_stays_the_worst_in_later_epochs(make_run, make_summary, bad):
    summary = make_summary(
        make_run("paper", 2, seed=0, nll=[0.9, bad]),
        make_run("paper", 2, seed=1, nll=[0.7, 0.5, 0.3]),
        make_run("paper", 2, seed=2, nll=[0.8, 0.6, 0.4]),
        epochs=3,
    )
    (series,) = group_runs(summary)
    # Without the diverged seed the last median would be 0.35.
    assert series.nll == ((0.8, 0.7, 0.9), (0.6, 0.5, math.inf), (0.4, 0.3, math.inf))
    assert series.final_nll == (0.4, 0.3, math.inf)
    assert series.label == "paper, M = 2 (1/3 diverged)"


def test_best_rate_has_the_lowest_last_median(make_run, make_summary):
    rates = {0.01: [0.4, 0.5], 0.1: [0.1, 0.6], 1.0: [0.3, 0.35]}
    runs = [make_run("sgd", 1, rate=r, seed=s, nll=[0.9, nll[s]]) for r, nll in rates.items() for s in (0, 1)]
    series = group_runs(make_summary(*runs, make_run("sgd", 2, nll=[5.0])))
    # Last medians 0.45, 0.35 and 0.325; the lowest single run, at rate 0.1, does not decide.
    assert [one.best for one in series] == [False, False, True, True]
    assert series[2].label == "SGD, rate 1"
    assert series[3].label == "SGD, M = 2"


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_rate_that_diverged_is_never_the_best(make_run, make_summary, bad):
    summary = make_summary(make_run("sgd", 1, rate=0.1, nll=[0.1, bad]), make_run("sgd", 1, rate=0.2, nll=[9.0, 8.0]))
    assert [one.best for one in group_runs(summary)] == [False, True]


def test_one_rate_is_best_where_all_diverged(make_run, make_summary):
    summary = make_summary(*(make_run("sgd", 1, rate=rate, nll=[None]) for rate in (0.2, 0.1)))
    assert [(one.learning_rate, one.best) for one in group_runs(summary)] == [(0.1, True), (0.2, False)]
    assert group_runs(summary)[0].label == "SGD, rate 0.1 (diverged)"
    assert compare(group_runs(summary)) is None


def test_headline_of_a_win(make_run, make_summary):
    summary = make_summary(
        make_run("sgd", 1, nll=[0.9, 0.4]),
        make_run("paper", 2, nll=[0.9, 0.1]),
        make_run("paper", 8, nll=[0.9, 0.3], work=900),
    )
    assert headline(summary) == (
        "Lowest training NLL after 2 epochs: paper, M = 2, with 0.100. "
        "The paper's method with M = 8 beats SGD: 0.300 against 0.400, 25.0 % lower, "
        "with 1.50 times the gradient evaluations."
    )


@pytest.mark.parametrize(("end", "relation"), [(0.5, "25.0 % higher"), (0.9, "2.25 times as high")])
def test_headline_of_a_loss(make_run, make_summary, end, relation):
    summary = make_summary(make_run("sgd", 1, nll=[0.9, 0.4]), make_run("paper", 8, nll=[0.9, end]))
    assert headline(summary) == (
        "Lowest training NLL after 2 epochs: SGD, with 0.400. "
        f"The paper's method with M = 8 does not beat SGD: {end:.2f}0 against 0.400, {relation}."
    )


def test_headline_of_a_tie(make_run, make_summary):
    summary = make_summary(make_run("sgd", 1, nll=[0.9, 0.40004]), make_run("paper", 8, nll=[0.9, 0.39996]))
    assert headline(summary) == (
        "Lowest training NLL after 2 epochs: SGD; paper, M = 8, with 0.400. "
        "The paper's method with M = 8 does not beat SGD: they tie at 0.400."
    )


def test_headline_says_that_ranges_overlap(make_run, make_summary):
    ends = {"sgd": (0.30, 0.50), "paper": (0.20, 0.40)}
    runs = [make_run(m, 1 if m == "sgd" else 4, seed=s, nll=[1.0, e[s]]) for m, e in ends.items() for s in (0, 1)]
    assert "(median of 2 seeds)" in headline(make_summary(*runs))
    assert "25.0 % lower, but the ranges over the seeds overlap." in headline(make_summary(*runs))
    runs[0]["train_nll"][1], runs[1]["train_nll"][1] = 0.41, 0.42
    assert "overlap" not in headline(make_summary(*runs))


def test_headline_compares_after_the_last_common_epoch(make_run, make_summary):
    summary = make_summary(make_run("sgd", 1, nll=[0.9, 0.1]), make_run("paper", 4, nll=[0.6]))
    assert headline(summary) == (
        "Lowest training NLL after 1 epoch: paper, M = 4, with 0.600. "
        "The paper's method with M = 4 beats SGD: 0.600 against 0.900, 33.3 % lower. 1 of 2 runs are unfinished."
    )


def test_headline_where_a_method_diverged(make_run, make_summary):
    good, bad = [0.9, 0.4], [0.5, None]
    lost = make_summary(make_run("sgd", 1, nll=good), make_run("paper", 4, nll=bad))
    assert headline(lost).endswith("The paper's method with M = 4 diverged.")
    won = make_summary(make_run("sgd", 1, nll=bad), make_run("paper", 4, nll=good))
    assert headline(won).endswith("The paper's method with M = 4 beats SGD, which diverged.")
    assert headline(make_summary(make_run("sgd", 1, nll=[None]))) == "Every method diverged."


def test_one_replica_is_not_compared_with_sgd(make_run, make_summary):
    summary = make_summary(make_run("sgd", 1, nll=[0.9, 0.4]), make_run("paper", 1, nll=[0.9, 0.5]))
    assert headline(summary) == "Lowest training NLL after 2 epochs: SGD, with 0.400."


def test_headline_before_the_first_epoch(make_run, make_summary):
    assert headline(make_summary(make_run("sgd", 1, nll=[]))) == "No epoch has finished yet."


def test_rate_at_which_fewer_runs_diverge_is_the_better_one(make_run, make_summary):
    ends = {0.1: (0.2, 0.2, 0.2), 0.3: (0.1, 0.1, math.nan)}
    runs = [make_run("paper", 4, seed=i, rate=r, nll=[1.0, e]) for r, es in ends.items() for i, e in enumerate(es)]
    assert [(one.learning_rate, one.best) for one in group_runs(make_summary(*runs))] == [(0.1, True), (0.3, False)]
