"""The rule "metric" in a `torch.optim` optimizer."""

import copy
import io
import math
import pickle
from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, closure_of, flat, train, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from replica_newton import LocalStep, PairedProbes, ReplicaNewton, Simulated
from replica_newton.optim.metric import MetricName
from replica_newton.training.datasets import load_dataset

METRICS = ("identity", "diagonal", "kronecker")
NETWORKS = [build for build in networks.BATCHABLE if build is not networks.bilinear]  # whose batching warns


def optimizer_of(problem: Problem, M: int = 2, **options: object) -> ReplicaNewton:
    return ReplicaNewton(problem.module.parameters(), rule="metric", topology=Simulated(M), **options)


def problem_of(dtype: torch.dtype) -> Problem:
    module, criterion, inputs, targets = networks.mlp()
    return Problem(module.to(dtype), criterion, (inputs[0].to(dtype),), targets.to(dtype))


@pytest.mark.parametrize("problem", NETWORKS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("metric", METRICS)
def test_every_network_descends(problem: Callable[[], Problem], metric: MetricName):
    one = problem()
    losses = train(optimizer_of(one, metric=metric), one, 60).losses
    assert losses.min() < 0.97 * losses[0]
    assert bool(losses.isfinite().all())
    assert losses.max() < 2.0 * losses[0]


@pytest.mark.parametrize("metric", ["identity", "diagonal"])
def test_the_number_of_replicas_does_not_matter(metric: MetricName):
    # Not so exactly in the Kronecker metric: directions of no gradient have no basis of their own but rounding.
    ends = []
    for M in (1, 4):
        problem = networks.convnet()
        ends.append(train(optimizer_of(problem, M, metric=metric), problem, 40).parameters)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_a_closure_a_plain_closure_and_given_gradients_are_the_same_step():
    ends = []
    for how in ("replicas", "plain", "given"):
        problem = networks.mlp()
        optimizer = optimizer_of(problem, 1)

        def closure(problem: Problem = problem, optimizer: ReplicaNewton = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = problem.criterion(problem.module(*problem.inputs), problem.targets)
            loss.backward()
            return loss

        for _ in range(5):
            if how == "replicas":
                loss = optimizer.step(closure_of(problem, 1))
            elif how == "plain":
                loss = optimizer.step(closure)
            else:
                expected = closure().detach()
                assert optimizer.step() is None
        ends.append(flat(trained(problem.module)))
        if how != "given":
            assert loss.shape == ()
            assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(ends[1], ends[2], rtol=0.0, atol=0.0)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_scales_of_loss_and_parameters_do_not_matter(loss_scale: float, scale: float):
    curvatures, start = (1.0, 30.0, 1e3), (1.0, -0.5, 2.0)
    plain = networks.separable_quadratic(curvatures, start)
    scaled = networks.separable_quadratic(curvatures, [scale * value for value in start])
    scaled = scaled._replace(criterion=lambda w, t: loss_scale * plain.criterion(w / scale, t))
    expected = train(optimizer_of(plain, 1), plain, 60).parameters
    got = train(optimizer_of(scaled, 1), scaled, 60).parameters
    torch.testing.assert_close(got / scale, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_a_quadratic_is_solved_whatever_its_condition(condition: float):
    problem = networks.separable_quadratic((1.0, condition**0.5, condition), (1.0, 1.0, 1.0))
    optimizer = optimizer_of(problem, 1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    best = torch.stack([t.mean() for t in problem.targets.T]) / -torch.tensor([1.0, condition**0.5, condition])
    for _ in range(250):
        optimizer.step(closure_of(problem, 1))
        scheduler.step()
    assert float((flat(trained(problem.module)) - best).abs().max()) < 0.02


def test_half_the_relative_rate_is_half_the_step_and_groups_have_their_own():
    moves = []
    for options in ({"lr": 1.0}, {"lr": 0.5}, {"lr": torch.tensor(0.5)}):
        problem = networks.mlp()
        before = flat(trained(problem.module))
        optimizer_of(problem, 1, **options).step(closure_of(problem, 1))
        moves.append(flat(trained(problem.module)) - before)
    torch.testing.assert_close(moves[1], moves[0] / 2)
    torch.testing.assert_close(moves[2], moves[1])
    problem = networks.mlp()
    first, last = problem.module[0], problem.module[2]
    before = flat(trained(problem.module))
    groups = [{"params": first.parameters(), "lr": 0.0}, {"params": last.parameters()}]
    ReplicaNewton(groups, rule="metric").step(closure_of(problem, 1))
    moved = flat(trained(problem.module)) - before
    count = sum(p.numel() for p in first.parameters())
    torch.testing.assert_close(moved[count:], moves[0][count:])
    assert bool((moved[:count] == 0.0).all())


def test_maximizing_is_minimizing_the_negative():
    ends = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        problem = networks.mlp()
        problem = problem._replace(criterion=lambda y, t, sign=sign: sign * mse_loss(y, t))
        ends.append(train(optimizer_of(problem, maximize=maximize), problem, 10).parameters)
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)


def test_a_parameter_without_a_gradient_stays_and_comes_in_later():
    problem = networks.mlp()
    optimizer = optimizer_of(problem, 1)
    late = problem.module[0].bias
    before = late.detach().clone()
    for step in range(4):
        problem.module.zero_grad()
        problem.criterion(problem.module(*problem.inputs), problem.targets).backward()
        if step < 2:
            late.grad = None
        optimizer.step()
        assert torch.equal(late, before) == (step < 2)
    assert optimizer.state[late]["step"] == 2
    problem.module.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("passed", ["state", "file"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_state_goes_on_bit_for_bit_with_another_number_of_replicas_too(dtype: torch.dtype, passed: str):
    problem = problem_of(dtype)
    optimizer = optimizer_of(problem, 2)
    train(optimizer, problem, 6)
    state = optimizer.state_dict()
    if passed == "file":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    other, fewer = copy.deepcopy(problem), copy.deepcopy(problem)
    resumed, single = optimizer_of(other, 2), optimizer_of(fewer, 1)
    resumed.load_state_dict(state)
    single.load_state_dict(state)
    expected = train(optimizer, problem, 8).parameters
    assert torch.equal(train(resumed, other, 8).parameters, expected)
    if dtype == torch.float64:
        torch.testing.assert_close(train(single, fewer, 3).parameters, expected[:3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
def test_copies_go_on_by_themselves(clone: Callable[[object], tuple[Problem, ReplicaNewton]]):
    problem = networks.mlp()._replace(criterion=mse_loss)
    optimizer = optimizer_of(problem)
    train(optimizer, problem, 5)
    other_problem, other = clone((problem, optimizer))
    expected = train(optimizer, problem, 5).parameters
    assert torch.equal(train(other, other_problem, 5).parameters, expected)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(nonfinite: str):
    problem = networks.mlp()
    optimizer = optimizer_of(problem, nonfinite=nonfinite)
    train(optimizer, problem, 3)
    before = copy.deepcopy(
        (problem.module.state_dict(), optimizer.state_dict()["state"], optimizer.state_dict()["rate"])
    )
    bad = problem._replace(inputs=(problem.inputs[0] * math.nan,))
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="is not finite"):
            optimizer.step(closure_of(bad, 2))
    else:
        optimizer.step(closure_of(bad, 2))
    after = (problem.module.state_dict(), optimizer.state_dict()["state"], optimizer.state_dict()["rate"])
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
    assert optimizer.skipped == (nonfinite == "skip")
    trained(problem.module)[0].grad = torch.full((4, 3), math.inf, dtype=torch.float64)
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="a gradient is not finite"):
            optimizer.step()


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.1, 1.0, 10.0])
def test_digits_are_learnt_by_a_linear_model_from_any_scale(scale: float):
    digits = load_dataset("digits", train_limit=512)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    optimizer = ReplicaNewton(module.parameters(), rule="metric")
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 - step / 600

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(module(digits.train_inputs), digits.train_labels)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    assert float(loss) < 0.1 * math.log(10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": LocalStep()}, "spread=.* has no meaning for rule='metric'"),
        ({"secant_data": "common"}, "secant_data='common' has no meaning"),
        ({"damping": 0.1}, "damping=0.1 has no meaning"),
        ({"max_norm": 1.0}, "max_norm=1.0 has no meaning"),
        ({"metric": "shampoo"}, "metric='shampoo' must be one of"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ReplicaNewton([nn.Parameter(torch.ones(2))], rule="metric", **options)


def test_probes_over_other_topologies_of_processes_are_refused_before_anything_starts():
    class Distributed(Simulated):
        distributed = True

    with pytest.raises(ValueError, match="needs one process or a TreeReduction of whole replicas"):
        ReplicaNewton([nn.Parameter(torch.ones(2))], rule="metric", topology=Distributed(2), spread=PairedProbes())


def near_its_solution(*, told: bool) -> float:
    """Final loss of a network that begins a thousandth of its weights' size from the solution, one sample at a time."""
    inputs = 0.1 * torch.randn(512, 1, generator=torch.Generator().manual_seed(1))
    targets = 1e-3 * torch.cat((inputs.sin(), inputs.cos()), dim=1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 128, bias=False), nn.GELU(), nn.Linear(128, 2, bias=False))
    nn.init.zeros_(module[2].weight)
    optimizer = ReplicaNewton(module.parameters())
    for row in range(300):

        def loss(row: int = row) -> Tensor:
            optimizer.zero_grad()
            value = mse_loss(module(inputs[row]), targets[row])
            value.backward()
            return value

        if told:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    with optimizer.averaged(), torch.no_grad():
        return float(mse_loss(module(inputs), targets))


def test_steps_that_are_too_long_are_cut_if_they_tell_their_loss():
    assert near_its_solution(told=True) < 0.2 * near_its_solution(told=False)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    first, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = ReplicaNewton([first, table.weight], rule="metric")
    (first.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))
