"""Whole trajectories against the paper's scheme written down literally, and against torch's SGD."""

from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, closure_of, flat, paper_scheme, separable_quadratic, train, trained
from reference import normal
from torch import Tensor

from replica_newton import LocalStep, RandomDirections, ReplicaNewton, Simulated
from replica_newton.spread import Spread

SECANTS = pytest.mark.parametrize("secant_data", ["own", "common"])
RULES = pytest.mark.parametrize("rule", ["paper", "saddle-free"])


def assert_equal(got: Tensor, expected: Tensor, *, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


@SECANTS
@pytest.mark.parametrize("M", [2, 4])
@pytest.mark.parametrize(
    "build", [networks.mlp, networks.tied, networks.frozen, networks.odd_parameters], ids=lambda build: build.__name__
)
def test_the_paper_rule_follows_the_literal_scheme(build: Callable[[], Problem], M: int, secant_data: str):
    problem = build()
    expected = paper_scheme(problem, M, [0.02] * 25, secant_data=secant_data)
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.02, rule="paper", topology=Simulated(M), secant_data=secant_data, rtol=1e-9
    )
    got = train(optimizer, problem, 25)
    assert_equal(got.parameters, expected.parameters)
    assert_equal(got.losses, expected.losses)
    assert got.fallbacks == expected.fallbacks


@SECANTS
def test_the_paper_rule_is_not_sgd(secant_data: str):
    problem = networks.mlp()
    sgd = paper_scheme(problem, 1, [0.02] * 25)
    assert sgd.fallbacks == 0
    paper = paper_scheme(problem, 4, [0.02] * 25, secant_data=secant_data)
    assert float((paper.parameters[-1] - sgd.parameters[-1]).norm()) > 1e-2


@pytest.mark.parametrize(
    ("build", "M", "secant_data"),
    [(networks.mlp, 2, "own"), (networks.mlp, 4, "own"), (networks.odd_parameters, 4, "common")],
    ids=["mlp-2-own", "mlp-4-own", "odd-4-common"],
)
def test_at_a_larger_rate_steps_that_lead_uphill_are_replaced_in_both(
    build: Callable[[], Problem], M: int, secant_data: str
):
    problem = build()
    expected = paper_scheme(problem, M, [0.1] * 25, secant_data=secant_data)
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.1, rule="paper", topology=Simulated(M), secant_data=secant_data, rtol=1e-9
    )
    got = train(optimizer, problem, 25)
    assert 0 < expected.fallbacks < 24
    assert got.fallbacks == expected.fallbacks
    assert_equal(got.parameters, expected.parameters)


@SECANTS
def test_groups_have_rates_of_their_own(secant_data: str):
    problem = networks.mlp()
    first, second = list(problem.module[0].parameters()), list(problem.module[2].parameters())
    rates = torch.tensor([0.05] * 16 + [0.01] * 5, dtype=torch.float64)
    expected = paper_scheme(problem, 4, [rates] * 20, secant_data=secant_data)
    groups = [{"params": first, "lr": 0.05}, {"params": second}]
    optimizer = ReplicaNewton(groups, 0.01, rule="paper", topology=Simulated(4), secant_data=secant_data, rtol=1e-9)
    got = train(optimizer, problem, 20)
    assert_equal(got.parameters, expected.parameters)
    assert got.fallbacks == expected.fallbacks


def test_a_schedule_scales_the_step_and_the_displacements():
    problem = networks.mlp()
    rates = [0.04 * 0.5 ** (step // 5) for step in range(20)]
    expected = paper_scheme(problem, 4, rates, secant_data="common")
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.04, rule="paper", topology=Simulated(4), secant_data="common", rtol=1e-9
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    for step in range(20):
        train(optimizer, problem, 1)
        assert_equal(flat(trained(problem.module)), expected.parameters[step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.04 * 0.5**4


@RULES
def test_one_replica_steps_as_sgd(rule: str):
    problem, plain = networks.convnet(), networks.convnet()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule=rule)
    sgd = torch.optim.SGD(plain.module.parameters(), 0.1)
    for _ in range(20):
        assert_equal(optimizer.step(closure_of(problem, 1)), sgd.step(closure_of(plain, 1)), atol=1e-14)
    assert_equal(flat(trained(problem.module)), flat(trained(plain.module)), atol=1e-13)
    assert optimizer.curvature is None
    assert optimizer.fallbacks == 0


@RULES
@SECANTS
def test_the_first_step_is_that_of_sgd_and_the_second_is_not(rule: str, secant_data: str):
    problem, plain = networks.mlp(), networks.mlp()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.1, rule=rule, topology=Simulated(4), secant_data=secant_data
    )
    sgd = torch.optim.SGD(plain.module.parameters(), 0.1)
    assert optimizer.curvature is None
    train(optimizer, problem, 1)
    sgd.step(closure_of(plain, 4))
    assert_equal(flat(trained(problem.module)), flat(trained(plain.module)), atol=1e-14)
    assert optimizer.curvature is None
    assert optimizer.fallbacks == 0
    train(optimizer, problem, 1)
    sgd.step(closure_of(plain, 4))
    assert float((flat(trained(problem.module)) - flat(trained(plain.module))).abs().max()) > 1e-5
    assert optimizer.curvature is not None


def least_squares() -> Problem:
    """Shards of the same inputs, so of one Hessian (eigenvalues 0.2 to 1.6), and of targets of their own."""
    torch.manual_seed(0)  # or the first parameters are now and then close to the minimum
    module = torch.nn.Linear(4, 1, bias=False).double()
    Q = torch.linalg.qr(normal(4, 4, seed=1)).Q
    X = 2 * torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64) * Q
    return Problem(module, torch.nn.functional.mse_loss, (X.repeat(6, 1),), normal(24, 1, seed=2))


@RULES
@pytest.mark.parametrize("spread", [LocalStep(), RandomDirections(radius=0.1)], ids=repr)
def test_replicas_that_span_a_convex_quadratic_reach_its_minimum_at_once(spread: Spread, rule: str):
    problem = least_squares()
    minimum = torch.linalg.lstsq(problem.inputs[0], problem.targets).solution.flatten()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 1.0, rule=rule, topology=Simulated(6), spread=spread, secant_data="common"
    )
    after_first, after_second = train(optimizer, problem, 2).parameters
    assert_equal(after_second, minimum)
    assert float((after_first - minimum).norm()) > 0.05


def test_sgd_at_the_same_rate_does_not_reach_it():
    problem = least_squares()
    minimum = torch.linalg.lstsq(problem.inputs[0], problem.targets).solution.flatten()
    sgd = torch.optim.SGD(problem.module.parameters(), 1.0)
    for _ in range(2):
        sgd.step(closure_of(problem, 6))
    assert float((flat(trained(problem.module)) - minimum).norm()) > 0.01


SADDLE = (1.0, -0.5)


def saddle() -> tuple[Problem, Tensor, Tensor]:
    """`½x² − ¼y²` plus linear terms; its curvatures and mean linear term."""
    problem = separable_quadratic(SADDLE, (0.3, 2.0))
    return problem, torch.tensor(SADDLE, dtype=torch.float64), problem.targets.mean(dim=0)


def test_the_saddle_free_rule_descends_along_negative_curvature():
    problem, h, linear = saddle()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.1, rule="saddle-free", topology=Simulated(4), secant_data="common"
    )
    (w, after), fallbacks, losses = train(optimizer, problem, 2)
    assert_equal(after, w - 0.1 * (h * w + linear) / h.abs())
    assert fallbacks == 0
    assert_equal(optimizer.curvature.eigenvalues, h)
    assert closure_of(problem, 4)() < losses[1]


def test_the_paper_rule_falls_back_to_sgd_where_its_step_leads_uphill():
    problem, h, linear = saddle()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.1, rule="paper", topology=Simulated(4), secant_data="common"
    )
    (w, after), fallbacks, _ = train(optimizer, problem, 2)
    gradient = h * w + linear
    assert float(gradient @ (gradient / h)) < 0
    assert_equal(after, w - 0.1 * gradient)
    assert fallbacks == 1


def test_descent_counts_every_group_by_its_rate():
    problem = separable_quadratic(SADDLE, (20.0, 2.0))
    x, y = problem.module.parameters()
    optimizer = ReplicaNewton(
        [{"params": [x], "lr": 1e-4}, {"params": [y], "lr": 0.1}],
        rule="paper",
        topology=Simulated(4),
        secant_data="common",
    )
    w, after = train(optimizer, problem, 2).parameters
    gradient = torch.tensor(SADDLE, dtype=torch.float64) * w + problem.targets.mean(dim=0)
    literal = gradient / torch.tensor(SADDLE, dtype=torch.float64)
    rates = torch.tensor([1e-4, 0.1], dtype=torch.float64)
    # The literal direction descends, the literal step does not.
    assert float(literal @ gradient) > 0 > float((rates * literal) @ gradient)
    assert optimizer.fallbacks == 1
    assert_equal(after, w - rates * gradient)


@RULES
@SECANTS
def test_to_maximize_is_to_minimize_the_negated_loss(rule: str, secant_data: str):
    problem, negated = networks.mlp(), networks.mlp()
    negated = negated._replace(criterion=lambda output, target: -problem.criterion(output, target))
    options = {"rule": rule, "topology": Simulated(4), "secant_data": secant_data}
    up = train(ReplicaNewton(problem.module.parameters(), 0.02, maximize=True, **options), problem, 10)
    down = train(ReplicaNewton(negated.module.parameters(), 0.02, **options), negated, 10)
    assert_equal(up.parameters, down.parameters, atol=0.0)
    assert_equal(up.losses, -down.losses, atol=0.0)
    assert up.fallbacks == down.fallbacks
    assert up.losses[-1] > up.losses[0]


def test_a_group_may_maximize_while_the_other_minimizes():
    """`½x² − ¼y²` is minimal in x and maximal in y at its saddle: the Newton step goes there at once."""
    problem, h, linear = saddle()
    x, y = problem.module.parameters()
    optimizer = ReplicaNewton(
        [{"params": [x]}, {"params": [y], "maximize": True}],
        1.0,
        rule="paper",
        topology=Simulated(4),
        secant_data="common",
    )
    assert_equal(train(optimizer, problem, 2).parameters[-1], -linear / h)


def test_damping_shortens_the_step():
    problem = least_squares()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 1.0, rule="paper", topology=Simulated(6), secant_data="common", damping=0.5
    )
    w, after = train(optimizer, problem, 2).parameters
    X, y = problem.inputs[0], problem.targets
    H = 2 * X.T @ X / len(X)
    gradient = 2 * (X.T @ (X @ w[:, None] - y)).flatten() / len(X)
    assert_equal(after, w - torch.linalg.solve(H + 0.5 * torch.eye(4).double(), gradient))
