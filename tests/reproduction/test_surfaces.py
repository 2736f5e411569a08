"""The surfaces of figure 1 and the ways over them."""

import json
from dataclasses import replace

import pytest
import torch
from reference import F64, normal

from replica_newton.reproduction.surface_methods import (
    HOLD,
    METHODS,
    RATES,
    TOLERANCE,
    _follow,
    approach,
    compare_surfaces,
    trajectory,
)
from replica_newton.reproduction.surfaces import SURFACES

EVERY_SURFACE = pytest.mark.parametrize("surface", SURFACES.values(), ids=list(SURFACES))
SECOND_ORDER = [name for name, method in METHODS.items() if not method.is_first_order]


def near(surface, count=6):
    return torch.tensor(surface.start, dtype=F64) * normal(count, 2, seed=3).abs()


def bowl(surface):
    """Quadratic f = (3 x² + y²) / 2 + x y, with the settings of a surface."""
    return replace(
        surface,
        function=lambda x: 1.5 * x[..., 0].square() + 0.5 * x[..., 1].square() + x[..., 0] * x[..., 1],
        start=(0.7, -1.9),
        longest_step=float("inf"),
        minima=((0.0, 0.0),),
        saddles=(),
    )


@pytest.fixture(scope="module")
def comparison():
    return compare_surfaces(seeds=(0,))


@EVERY_SURFACE
def test_gradients_equal_finite_differences(surface):
    x, h = near(surface), 1e-5
    differences = [
        (surface.function(x + h * e) - surface.function(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)
    ]
    torch.testing.assert_close(surface.gradient(x), torch.stack(differences, dim=-1), rtol=1e-7, atol=1e-8)


@EVERY_SURFACE
def test_hessians_equal_finite_differences(surface):
    x, h = near(surface), 1e-5
    rows = [(surface.gradient(x + h * e) - surface.gradient(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)]
    hessians = surface.hessian(x)
    torch.testing.assert_close(hessians, torch.stack(rows, dim=-2), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(surface.hessian(x[2]), hessians[2])
    assert not hessians.requires_grad


@EVERY_SURFACE
def test_minima_and_saddles_are_what_they_are_called(surface):
    points = torch.tensor([*surface.minima, *surface.saddles], dtype=F64)
    assert float(surface.gradient(points).abs().max()) < 1e-12
    curvatures = torch.linalg.eigvalsh(surface.hessian(points))
    kinds = ["minimum" if low > 0 else "saddle" if low < 0 < high else "" for low, high in curvatures.tolist()]
    assert kinds == ["minimum"] * len(surface.minima) + ["saddle"] * len(surface.saddles)
    assert surface.function(points[: len(surface.minima)]).tolist() == pytest.approx(
        [surface.minimum] * len(surface.minima), abs=1e-15
    )
    grid = torch.cartesian_prod(*(torch.linspace(*limits, 101, dtype=F64) for limits in surface.limits))
    assert float(surface.function(grid).min()) >= surface.minimum


def test_each_surface_is_difficult_as_it_says():
    saddle, plateau, ravine = SURFACES.values()
    starts = [torch.tensor(surface.start, dtype=F64) for surface in SURFACES.values()]
    values = torch.linalg.eigvalsh(saddle.hessian(starts[0]))
    assert values[0] < 0 < values[1]
    assert float(plateau.gradient(starts[1]).norm()) < 0.1
    assert torch.linalg.eigvalsh(plateau.hessian(starts[1]))[0] < 0
    assert 100 < float(torch.linalg.cond(ravine.hessian(torch.tensor(ravine.minima[0], dtype=F64)))) < 1000


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_one_step_to_the_minimum_of_a_quadratic(name):
    way = trajectory(bowl(SURFACES["saddle"]), METHODS[name], 2, noise=0.0)
    torch.testing.assert_close(way[1:], torch.zeros(2, 2, dtype=F64), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("replicas", [3, 8])
@pytest.mark.parametrize("exact", ["newton", "saddle-free"])
@EVERY_SURFACE
def test_replicas_close_together_take_the_exact_step(surface, exact, replicas):
    name = f"{'paper' if exact == 'newton' else exact}-{replicas}"
    close = replace(surface, radius=1e-6, longest_step=float("inf"))
    step, expected = (trajectory(close, METHODS[one], 1, noise=0.0) for one in (name, exact))
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


def test_h_inverse_is_drawn_to_the_saddle_and_its_absolute_value_leaves_it():
    surface = SURFACES["saddle"]
    for name in SECOND_ORDER:
        end = trajectory(surface, METHODS[name], 15)[-1]
        if METHODS[name].rule == "newton":
            assert float(end.norm()) < 0.01, name
        else:
            assert min(float((end - torch.tensor(point, dtype=F64)).norm()) for point in surface.minima) < 0.05, name


def test_h_inverse_climbs_on_the_plateau_and_its_absolute_value_comes_down():
    surface = SURFACES["plateau"]
    heights = {name: surface.function(trajectory(surface, METHODS[name], 15)) for name in ("newton", "saddle-free-8")}
    assert heights["newton"][-1] > heights["newton"][0]
    assert heights["saddle-free-8"][-1] < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_a_way_starts_at_the_start_and_depends_on_its_seed_alone(name):
    surface = SURFACES["ravine"]
    way = trajectory(surface, METHODS[name], 3)
    assert way.shape == (4, 2)
    assert way.dtype == F64
    assert tuple(way[0].tolist()) == surface.start
    torch.manual_seed(1)
    assert torch.equal(trajectory(surface, METHODS[name], 3), way)
    assert not torch.equal(trajectory(surface, METHODS[name], 3, seed=1), way)
    assert torch.equal(trajectory(surface, METHODS[name], 1, start=way[0]), way[:2])
    if not METHODS[name].is_first_order:
        assert float(way.diff(dim=0).norm(dim=1).max()) < surface.longest_step + 1e-12


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("sgd", lambda w: torch.optim.SGD([w], lr=0.01)),
        ("momentum", lambda w: torch.optim.SGD([w], lr=0.01, momentum=0.9)),
        ("adam", lambda w: torch.optim.Adam([w], lr=0.01)),
    ],
)
def test_first_order_methods_are_those_of_torch(name, build):
    surface = SURFACES["ravine"]
    w = torch.tensor(surface.start, dtype=F64, requires_grad=True)
    optimizer = build(w)
    points = [w.detach().clone()]
    for _ in range(8):
        w.grad = surface.gradient(w)
        optimizer.step()
        points.append(w.detach().clone())
    torch.testing.assert_close(trajectory(surface, METHODS[name], 8, rate=0.01, noise=0.0), torch.stack(points))


def test_noise_has_its_standard_deviation():
    surface = bowl(SURFACES["saddle"])
    start = torch.zeros(2, dtype=F64)
    steps = [trajectory(surface, METHODS["sgd"], 1, rate=1.0, noise=0.5, seed=s, start=start)[1] for s in range(200)]
    assert float(torch.stack(steps).std()) == pytest.approx(0.5 / 8**0.5, rel=0.1)


def test_arrival_is_the_first_of_many_points_at_the_minimum():
    surface = SURFACES["plateau"]
    # Three trajectories: one that passes, one that stays, and one that is there from the start.
    inside = torch.zeros(2 * HOLD + 5, 3, dtype=torch.bool)
    inside[3 : HOLD + 2, 0] = inside[HOLD:, 1] = inside[:, 2] = True
    points = torch.where(inside.unsqueeze(-1), 0.0, torch.tensor(surface.start, dtype=F64))
    steps, heights, ends = _follow(surface, points)
    assert steps.tolist() == [float("inf"), HOLD, 0]
    assert heights[1:].tolist() == [0.0, 0.0]
    assert tuple(ends[0].tolist()) == surface.start


@pytest.mark.parametrize(
    ("changes", "message"), [({"steps": -1}, "steps=-1 must"), ({"noise": -1.0}, "noise=-1.0 must")]
)
def test_errors_name_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        trajectory(SURFACES["saddle"], METHODS["sgd"], **({"steps": 1} | changes))


def test_the_comparison_is_json_and_complete(comparison):
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert list(comparison["surfaces"]) == list(SURFACES)
    for surface in comparison["surfaces"].values():
        assert list(surface["methods"]) == list(METHODS)


def test_the_rates_of_the_surfaces_are_the_best_of_the_grid(comparison):
    for name, surface in SURFACES.items():
        rows = comparison["surfaces"][name]["methods"]
        assert {method: rows[method]["rate"] for method in surface.rates} == dict(surface.rates)
        for method in surface.rates:
            assert rows[method]["rates_tried"] == list(RATES)
            assert RATES[0] < rows[method]["rate"] < RATES[-1]


def test_the_comparison_tells_the_story_of_the_figure(comparison):
    rows = {name: surface["methods"] for name, surface in comparison["surfaces"].items()}
    for name, surface in rows.items():
        first_order = [row["steps"] for method, row in surface.items() if METHODS[method].is_first_order]
        assert None not in first_order
        assert 5 * surface["saddle-free"]["steps"] < min(first_order)
        assert 2 * surface["saddle-free-8"]["steps"] < min(first_order)
        if name != "ravine":
            for method in ("newton", "paper-3", "paper-8"):
                assert surface[method]["steps"] is None
    at_saddle = {(name, m) for name, surface in rows.items() for m, row in surface.items() if row["ended_at_saddle"]}
    assert at_saddle == {("saddle", "newton"), ("saddle", "paper-3"), ("saddle", "paper-8")}
    assert rows["saddle"]["newton"]["final_value"] == pytest.approx(0.25, abs=1e-3)


def test_the_steps_of_the_comparison_are_those_of_the_approach(comparison):
    surface = SURFACES["saddle"]
    for name in ("adam", "saddle-free-3"):
        points, arrived = approach(surface, METHODS[name])
        assert arrived
        assert comparison["surfaces"]["saddle"]["methods"][name]["steps_by_seed"] == [len(points) - 1]
        assert torch.equal(trajectory(surface, METHODS[name], len(points) - 1), points)
