"""LeCun's optimal rate: closed forms on quadratics, λ_max against dense Hessians, and what is written and drawn."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from networks import LinearTerms, flat, separable_quadratic
from reference import flat_loss, generator, normal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton.report.style import save_figure
from replica_newton.reproduction import optimal_rate
from replica_newton.reproduction.optimal_rate import (
    MULTIPLES,
    SETTINGS,
    _onset,
    descend,
    measure_optimal_rate,
)
from replica_newton.reproduction.optimal_rate_figures import optimal_rate_figure
from replica_newton.reproduction.sharpness import exact_sharpness, replica_sharpness
from replica_newton.training.datasets import Dataset, load_dataset


def bowl(curvature: float) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """`½ h w²` with its minimum at zero, from w = 3, and its batch for ten steps."""
    module = LinearTerms(3.0)
    return module, [(torch.zeros(1, 1), torch.full((1, 1), curvature, dtype=torch.float64))] * 10


def energy(w: Tensor, h: Tensor) -> Tensor:
    return (h * w * w / 2).sum(dim=1).mean()


def network(activation: nn.Module, *, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A 5–6–3 network in fp64, 57 parameters, and 24 labelled samples."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 3)).double()
    return module, normal(24, 5, seed=1), torch.randint(3, (24,), generator=generator(2))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=512)


@pytest.fixture(scope="module")
def measured(digits: Dataset) -> dict:
    return measure_optimal_rate(digits, seeds=(0,), quick=True, activation="tanh")


def test_on_one_eigenvalue_a_step_at_its_inverse_reaches_the_minimum_and_no_other_rate_does():
    h, left = 4.0, {}
    for multiple in MULTIPLES:
        module, batches = bowl(h)
        descend(module, energy, batches[:1], multiple / h)
        left[multiple] = abs(float(flat(list(module.parameters()))))
    assert left[1.0] == 0.0
    assert min(value for multiple, value in left.items() if multiple != 1.0) > 0.1
    for multiple, value in left.items():
        assert value == pytest.approx(3.0 * abs(1.0 - multiple), abs=1e-12)


@pytest.mark.parametrize(("multiple", "converges"), [(0.5, True), (1.9, True), (2.1, False), (4.0, False)])
def test_descent_on_a_quadratic_converges_below_two_over_the_eigenvalue_and_diverges_above(
    multiple: float, converges: bool
):
    module, batches = bowl(4.0)
    losses = descend(module, energy, batches, multiple / 4.0)
    factors = [after / before for before, after in pairwise(losses)]
    assert factors == pytest.approx([(1.0 - multiple) ** 2] * 9)
    assert (losses[-1] < losses[0]) is converges


def test_a_descent_ends_with_the_first_loss_that_is_not_finite():
    module, batches = bowl(4.0)
    losses = descend(module, energy, batches, 1e120)
    assert len(losses) < 10
    assert not numpy.isfinite(losses[-1])
    assert numpy.isfinite(losses[:-1]).all()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float):
    module, batches = bowl(4.0)
    with pytest.raises(ValueError, match=r"rate=.* must be positive and finite"):
        descend(module, energy, batches, rate)


def test_replicas_find_the_largest_eigenvalue_of_a_quadratic_though_a_negative_one_is_larger_in_magnitude():
    problem = separable_quadratic([5.0, -9.0, 2.0, 1.0, 0.5, 0.1], [0.3] * 6)
    found = replica_sharpness(problem.module, problem.criterion, *problem.inputs, problem.targets, replicas=4)
    assert found.value == pytest.approx(5.0, rel=1e-3)
    exact = exact_sharpness(problem.module, problem.criterion, *problem.inputs, problem.targets, tolerance=1e-3)
    assert exact.value == pytest.approx(5.0, rel=1e-4)


def test_where_all_curvature_is_negative_the_exact_value_is_the_least_negative():
    problem = separable_quadratic([-9.0, -2.0, -6.0], [0.3] * 3)
    exact = exact_sharpness(problem.module, problem.criterion, *problem.inputs, problem.targets, tolerance=1e-3)
    assert exact.value == pytest.approx(-2.0, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("activation", "error"), [(nn.Tanh(), 0.005), (nn.ReLU(), 0.05)], ids=["tanh", "relu"])
def test_replicas_agree_with_the_dense_hessian_of_all_samples(activation: nn.Module, error: float, seed: int):
    module, inputs, labels = network(activation, seed=seed)
    dense = flat_loss(module, lambda model: cross_entropy(model(inputs), labels))
    truth = float(torch.linalg.eigvalsh(dense.hessian)[-1])
    found = replica_sharpness(module, cross_entropy, inputs, labels)
    exact = exact_sharpness(module, cross_entropy, inputs, labels)
    assert found.value == pytest.approx(truth, rel=error)
    assert exact.value == pytest.approx(truth, rel=0.005)
    assert exact.residual <= 0.02 * exact.value
    assert torch.equal(flat(list(module.parameters())), dense.w)


def test_replicas_agree_with_exact_products_on_the_reference_network_trained_on_digits(measured: dict):
    sharpness = measured["runs"][0]["sharpness"]
    assert sharpness["replicas"]["value"] == pytest.approx(sharpness["exact"]["value"], rel=0.05)


def test_replicas_must_divide_the_samples():
    module, inputs, labels = network(nn.Tanh())
    with pytest.raises(ValueError, match="replicas=7 must divide"):
        replica_sharpness(module, cross_entropy, inputs, labels, replicas=7)


def test_a_measurement_is_json_and_holds_a_run_a_rate(measured: dict):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    run = measured["runs"][0]
    top = run["sharpness"]["replicas"]["value"]
    for setting in SETTINGS:
        assert [entry["multiple"] for entry in run[setting]] == measured["multiples"]
        for entry in run[setting]:
            assert entry["rate"] * top == pytest.approx(entry["multiple"])
            assert entry["relative"] == pytest.approx(entry["loss"] / run["start_loss"])


def test_small_rates_descend_monotonically_and_eight_times_the_optimal_rate_does_not(measured: dict):
    rises = {entry["multiple"]: entry["rises"] for entry in measured["runs"][0]["full_batch"]}
    assert not any(rises[multiple] for multiple in (0.0625, 0.25, 0.5, 1.0))
    assert rises[8.0]
    assert measured["summary"]["full_batch"]["rises_from"][0] in (2.0, 4.0, 8.0)
    assert measured["summary"]["full_batch"]["best"][0] >= 1.0


def test_a_measurement_repeats_itself_and_touches_no_random_state(digits: Dataset, measured: dict):
    before, told = torch.get_rng_state(), []
    again = measure_optimal_rate(
        digits, seeds=(0,), quick=True, activation="tanh", tell=lambda message, done: told.append((message, done))
    )
    assert again == measured
    assert torch.equal(torch.get_rng_state(), before)
    fractions = [done for _, done in told]
    assert fractions == sorted(fractions)
    assert (told[0], told[-1]) == (("seed 0: training to the checkpoint", 0.0), ("done", 1.0))


def test_what_cannot_be_measured_is_refused(digits: Dataset):
    with pytest.raises(ValueError, match="at least one seed"):
        measure_optimal_rate(digits, seeds=())
    with pytest.raises(ValueError, match="none twice"):
        measure_optimal_rate(digits, seeds=(1, 1))
    with pytest.raises(ValueError, match="must hold a batch of 128 samples, got 100"):
        measure_optimal_rate(load_dataset("digits", train_limit=100), quick=True)
    with pytest.raises(ValueError, match="activation="):
        measure_optimal_rate(digits, activation="sine", quick=True)  # type: ignore[arg-type]


def test_nothing_to_descend_is_an_error_and_no_division_by_zero(digits: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimal_rate, "_loss", lambda *_: 0.0)
    with pytest.raises(ValueError, match="loss and λ_max at the checkpoint must be > 0, got 0 and "):
        measure_optimal_rate(digits, seeds=(0,), quick=True)


def test_an_onset_is_where_a_property_starts_to_hold_for_good():
    run = [{"multiple": 2.0**k, "high": high} for k, high in enumerate([True, False, True, True])]
    assert _onset(run, lambda entry: entry["high"]) == 4.0
    assert _onset(run[:2], lambda entry: entry["high"]) is None


def diverged(measurement: dict) -> dict:
    """The measurement with its two largest rates as a run that is not finite leaves them."""
    changed = copy.deepcopy(measurement)
    for run in changed["runs"]:
        for setting in SETTINGS:
            for entry in run[setting][-2:]:
                entry.update(loss=None, relative=None)
    return changed


def crosses(figure: Figure) -> list[list[float]]:
    return [
        [float(x) for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()] for axes in figure.axes
    ]


def test_diverged_runs_are_crosses_in_both_panels(measured: dict):
    figure = optimal_rate_figure([diverged(measured)])
    assert crosses(figure) == [[4.0, 8.0], [4.0, 8.0]]


def test_one_line_a_measurement_with_lambda_by_replicas_and_exact_in_the_legend(measured: dict):
    other = diverged(measured) | {"activation": "relu"}
    figure = optimal_rate_figure([measured, other])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0].startswith("tanh network: 1/λ")
    assert texts[1].startswith("ReLU network: 1/λ")
    sharpness = measured["runs"][0]["sharpness"]
    for method in ("replicas", "exact"):
        assert f"{1 / sharpness[method]['value']:.3g}" in texts[0]
    middle = [entry["relative"] for entry in measured["runs"][0]["full_batch"]]
    assert any(numpy.allclose(line.get_ydata(), middle) for line in figure.axes[0].lines if len(line.get_xdata()) == 7)


def test_the_figure_is_drawn_with_nothing_finite_or_several_seeds(measured: dict, tmp_path: Path):
    lost = copy.deepcopy(measured)
    for setting in SETTINGS:
        for entry in lost["runs"][0][setting]:
            entry.update(loss=None, relative=None)
    assert crosses(optimal_rate_figure([lost])) == [measured["multiples"]] * 2
    several = measured | {"runs": [measured["runs"][0], diverged(measured)["runs"][0], measured["runs"][0]]}
    save_figure(optimal_rate_figure([several]), tmp_path, "optimal_rate")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["optimal_rate.png", "optimal_rate.svg"]
    assert (tmp_path / "optimal_rate.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("count", [0, 5])
def test_a_figure_takes_one_to_four_measurements(measured: dict, count: int):
    with pytest.raises(ValueError, match=f"1 to 4 measurements, got {count}"):
        optimal_rate_figure([measured] * count)
