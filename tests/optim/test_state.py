"""Checkpoints, copies and what they keep."""

import copy
import io
import pickle
from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, closure_of, flat, train, trained
from torch.nn.functional import mse_loss

from replica_newton import LocalStep, RandomDirections, ReplicaNewton, Simulated
from replica_newton.spread import Spread

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def problem_of(dtype: torch.dtype) -> Problem:
    module, criterion, inputs, targets = networks.mlp()
    return Problem(module.to(dtype), criterion, (inputs[0].to(dtype),), targets.to(dtype))


def optimizer_of(problem: Problem, M: int = 4, *, spread: Spread | None = None) -> ReplicaNewton:
    return ReplicaNewton(
        problem.module.parameters(), 0.05, rule="paper", topology=Simulated(M), spread=spread, secant_data="common"
    )


def displacements(optimizer: ReplicaNewton) -> list[torch.Tensor]:
    return [optimizer.state[p]["displacements"] for group in optimizer.param_groups for p in group["params"]]


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("spread", [LocalStep(), RandomDirections(2)], ids=repr)
@pytest.mark.parametrize("passed", [lambda state: state, through_a_file], ids=["state", "file"])
@DTYPES
def test_a_loaded_state_goes_on_bit_for_bit(dtype: torch.dtype, passed: Callable[[dict], dict], spread: Spread):
    problem = problem_of(dtype)
    optimizer = optimizer_of(problem, spread=spread)
    train(optimizer, problem, 6)
    resumed_problem = problem_of(dtype)
    resumed_problem.module.load_state_dict(passed(problem.module.state_dict()))
    resumed = optimizer_of(resumed_problem, spread=spread)
    resumed.load_state_dict(passed(optimizer.state_dict()))
    assert torch.equal(train(resumed, resumed_problem, 5).parameters, train(optimizer, problem, 5).parameters)


def test_without_the_state_it_goes_on_otherwise():
    problem = problem_of(torch.float64)
    optimizer = optimizer_of(problem)
    train(optimizer, problem, 6)
    fresh_problem = copy.deepcopy(problem)
    fresh = train(optimizer_of(fresh_problem), fresh_problem, 5)
    assert not torch.allclose(fresh.parameters, train(optimizer, problem, 5).parameters)


@DTYPES
def test_displacements_keep_fp32_where_parameters_have_less(dtype: torch.dtype):
    problem = problem_of(dtype)
    optimizer = optimizer_of(problem)
    train(optimizer, problem, 3)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    resumed = optimizer_of(problem)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for rows, loaded in zip(displacements(optimizer), displacements(resumed), strict=True):
        assert rows.dtype == loaded.dtype == expected
        assert torch.equal(rows, loaded)
        assert float(rows.sum(dim=0).abs().max()) < 1e-7
        if dtype == torch.bfloat16:
            assert not torch.equal(rows, rows.bfloat16().float())
    assert all(parameter.dtype == dtype for parameter in problem.module.parameters())


def test_a_loaded_state_is_a_copy():
    problem = problem_of(torch.float32)
    optimizer = optimizer_of(problem)
    train(optimizer, problem, 2)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other_problem = problem_of(torch.float32)
    other = optimizer_of(other_problem)
    other.load_state_dict(state)
    train(other, other_problem, 3)
    for index, saved in kept["state"].items():
        assert torch.equal(state["state"][index]["displacements"], saved["displacements"])


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (4, 1)])
def test_a_state_of_another_number_of_replicas_goes_on_after_one_sgd_step(before: int, after: int):
    problem = problem_of(torch.float64)
    optimizer = optimizer_of(problem, before)
    train(optimizer, problem, 4)
    plain = copy.deepcopy(problem)
    changed = optimizer_of(problem, after)
    changed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(changed, problem, 1)
    assert changed.curvature is None
    torch.optim.SGD(plain.module.parameters(), 0.05).step(closure_of(plain, after))
    torch.testing.assert_close(flat(trained(problem.module)), flat(trained(plain.module)), rtol=0.0, atol=1e-14)
    losses = train(changed, problem, 5).losses
    assert losses[-1] < losses[0]
    assert (changed.curvature is None) == (after == 1)


def test_the_state_holds_no_more_than_numbers_and_tensors():
    problem = problem_of(torch.float32)
    optimizer = optimizer_of(problem, spread=RandomDirections())
    train(optimizer, problem, 2)
    for saved in optimizer.state_dict()["state"].values():
        assert {name: type(value) for name, value in saved.items()} == {"displacements": torch.Tensor, "step": int}
        assert saved["step"] == 2


def with_options() -> tuple[Problem, ReplicaNewton]:
    problem = problem_of(torch.float64)
    optimizer = ReplicaNewton(
        problem.module.parameters(),
        0.1,
        rule="saddle-free",
        topology=Simulated(4, batched=False),
        spread=RandomDirections(5, radius=0.01),
        secant_data="common",
        damping=0.1,
        rtol=1e-4,
    )
    train(optimizer, problem, 4)
    optimizer.fallbacks = 3
    return problem, optimizer


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)
def test_a_copy_keeps_its_options_and_goes_on_alike(clone: Callable):
    problem, optimizer = with_options()
    module, copied = clone((problem.module, optimizer))
    assert copied.param_groups[0]["params"][0] is next(module.parameters())
    for name in ("rule", "secant_data", "damping", "rtol", "fallbacks"):
        assert getattr(copied, name) == getattr(optimizer, name), name
    assert (copied.topology.replicas, copied.topology.batched) == (4, False)
    assert repr(copied.spread) == "RandomDirections(seed=5, radius=0.01)"
    assert copied.curvature is None
    copied_problem = problem._replace(module=module)
    assert torch.equal(train(copied, copied_problem, 4).parameters, train(optimizer, problem, 4).parameters)


def test_a_state_of_other_groups_is_refused():
    problem = problem_of(torch.float32)
    optimizer = optimizer_of(problem)
    train(optimizer, problem, 2)
    other = ReplicaNewton(list(problem.module.parameters())[:2], 0.1, rule="paper", topology=Simulated(4))
    with pytest.raises(ValueError, match="parameter group"):
        other.load_state_dict(optimizer.state_dict())


def nan_problem(shard: int) -> Problem:
    problem = problem_of(torch.float64)
    problem.inputs[0][shard * 6] = torch.nan
    return problem


@pytest.mark.parametrize("steps", [0, 3])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(steps: int):
    problem = problem_of(torch.float64)
    optimizer = optimizer_of(problem)
    for _ in range(steps):
        train(optimizer, problem, 1)
    before = copy.deepcopy((problem.module.state_dict(), optimizer.state_dict(), optimizer.fallbacks))
    curvature = optimizer.curvature
    broken = nan_problem(2)._replace(module=problem.module)
    with pytest.raises(FloatingPointError, match=r"loss or gradient of replica 2 is not finite \(loss nan\)"):
        optimizer.step(closure_of(broken, 4))
    after = (problem.module.state_dict(), optimizer.state_dict(), optimizer.fallbacks)
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
    assert optimizer.curvature is curvature


def test_a_gradient_that_is_not_finite_is_named_though_its_loss_is_finite():
    module = torch.nn.Linear(1, 1, bias=False)
    inputs = torch.tensor([[1.0], [0.0]]) * module.weight.detach().sign()
    closure = Simulated(2).closure(module, lambda output, _: output.sqrt().mean(), inputs, torch.zeros(2))
    optimizer = ReplicaNewton(module.parameters(), rule="paper", topology=Simulated(2))
    before = module.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"replica 1 is not finite \(loss 0.0\)"):
        optimizer.step(closure)
    assert torch.equal(module.weight, before)
    assert not optimizer.state


def test_a_secant_that_is_not_finite_on_common_data_alone_is_named_too():
    """`t log(x + w)` from w = 1: replica 1 comes to −0.36, where only its own sample is fine."""
    module = networks.LinearTerms(1.0)
    inputs, targets = torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [5.0]])
    module.forward = lambda x: torch.log(x + module.w[0])
    closure = Simulated(2, batched=False).closure(module, lambda y, t: (t * y).mean(), inputs, targets)
    optimizer = ReplicaNewton(module.parameters(), 3.0, rule="paper", topology=Simulated(2), secant_data="common")
    optimizer.step(closure)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    with pytest.raises(FloatingPointError, match=r"replica 1 is not finite \(loss nan\)"):
        optimizer.step(closure)
    torch.testing.assert_close((module.state_dict(), optimizer.state_dict()), before, rtol=0.0, atol=0.0)


def test_half_precision_parameters_are_trained():
    problem = problem_of(torch.bfloat16)
    losses = train(optimizer_of(problem), problem, 20).losses
    assert losses[-1] < 0.9 * losses[0]
    assert mse_loss(problem.module(*problem.inputs), problem.targets) < 0.9 * losses[0]
