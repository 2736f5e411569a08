"""What users of `torch.optim` rely on."""

from collections.abc import Callable

import networks
import pytest
import torch
from networks import closure_of, flat, train, trained
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from replica_newton import ReplicaNewton, Simulated
from replica_newton.spread import Spread
from replica_newton.topology import ReplicaClosure


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(("secant_data", "evaluations"), [("own", 1), ("common", 2)])
def test_every_sample_is_differentiated_once_and_for_common_secants_twice(secant_data: str, evaluations: int):
    problem = networks.mlp()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.05, rule="paper", topology=Simulated(4), secant_data=secant_data
    )
    counts = []
    for _ in range(3):
        closure = closure_of(problem, 4)
        optimizer.step(closure)
        counts.append(closure.samples_evaluated)
    assert counts == [24, evaluations * 24, evaluations * 24]


def test_the_loss_is_that_of_the_replicas_before_the_step():
    problem = networks.mlp()
    expected = closure_of(problem, 4)()
    loss = ReplicaNewton(problem.module.parameters(), 0.05, rule="paper", topology=Simulated(4)).step(
        closure_of(problem, 4)
    )
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=1e-14)
    assert not loss.requires_grad


@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_on_given_gradients_is_that_of_sgd(maximize: bool):
    problem, plain = networks.mlp(), networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(4), maximize=maximize)
    sgd = torch.optim.SGD(plain.module.parameters(), 0.1, maximize=maximize)
    for module in (problem.module, plain.module):
        mse_loss(module(*problem.inputs), problem.targets).backward()
        module[0].bias.grad = None
    before = problem.module[0].bias.detach().clone()
    assert optimizer.step() is None
    sgd.step()
    assert torch.equal(flat(trained(problem.module)), flat(trained(plain.module)))
    assert torch.equal(problem.module[0].bias, before)
    assert not optimizer.state


def test_a_step_on_given_gradients_keeps_the_displacements():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(4))
    train(optimizer, problem, 2)
    kept = [optimizer.state[p]["displacements"].clone() for p in problem.module.parameters()]
    closure_of(problem, 4)()
    optimizer.step()
    assert all(
        torch.equal(optimizer.state[p]["displacements"], rows)
        for p, rows in zip(problem.module.parameters(), kept, strict=True)
    )
    train(optimizer, problem, 1)
    assert optimizer.curvature is not None


def test_a_sparse_gradient_is_refused_before_anything_moves():
    first, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = ReplicaNewton([first, table.weight], 0.1, rule="paper")
    (first.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))


def test_zero_grad_and_hooks_work():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(4))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, problem, 1)
    handle.remove()
    train(optimizer, problem, 1)
    assert calls == ["before", "after", "before"]
    closure_of(problem, 4)()
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.module.parameters())


def test_a_tensor_rate_is_that_rate():
    problem, other = networks.mlp(), networks.mlp()
    rate = torch.tensor(0.03, dtype=torch.float64)
    optimizer = ReplicaNewton(problem.module.parameters(), rate, rule="paper", topology=Simulated(4))
    got = train(optimizer, problem, 4).parameters
    expected = train(
        ReplicaNewton(other.module.parameters(), 0.03, rule="paper", topology=Simulated(4)), other, 4
    ).parameters
    assert torch.equal(got, expected)
    rate.zero_()
    assert torch.equal(train(optimizer, problem, 1).parameters[0], got[-1])


def test_named_parameters_are_taken():
    problem, other = networks.mlp(), networks.mlp()
    named = ReplicaNewton(problem.module.named_parameters(), 0.03, rule="paper", topology=Simulated(4))
    plain = ReplicaNewton(other.module.parameters(), 0.03, rule="paper", topology=Simulated(4))
    assert torch.equal(train(named, problem, 3).parameters, train(plain, other, 3).parameters)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_group_can_be_added_between_steps():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module[2].parameters(), 0.05, rule="paper", topology=Simulated(4))
    first = problem.module[0].weight.detach().clone()
    train(optimizer, problem, 2)
    assert torch.equal(problem.module[0].weight, first)
    optimizer.add_param_group({"params": problem.module[0].parameters(), "lr": 0.01})
    losses = train(optimizer, problem, 10).losses
    assert not torch.equal(problem.module[0].weight, first)
    assert losses[-1] < losses[0]


def test_frozen_parameters_stay():
    problem = networks.frozen()
    before = flat(list(problem.module[0].parameters()))
    train(ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(4)), problem, 5)
    assert torch.equal(flat(list(problem.module[0].parameters())), before)


def test_a_rate_of_zero_changes_nothing_and_counts_nothing():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.0, rule="paper", topology=Simulated(4))
    before = flat(trained(problem.module))
    train(optimizer, problem, 3)
    assert torch.equal(flat(trained(problem.module)), before)
    assert optimizer.curvature is None
    assert optimizer.fallbacks == 0


def test_gradients_that_vanish_are_harmless():
    module = nn.Linear(2, 1)
    closure = Simulated(2).closure(module, lambda y, _: 0.0 * y.mean(), torch.ones(4, 2), torch.ones(4))
    optimizer = ReplicaNewton(module.parameters(), 0.1, rule="paper", topology=Simulated(2), secant_data="common")
    before = flat(trained(module))
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(flat(trained(module)), before)


def test_a_spread_of_the_users_own_is_asked_for_the_next_displacements():
    class Alternating:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def displacements(self, gradients: Tensor, rates: Tensor | float, step: int) -> Tensor:
            self.steps.append(step)
            assert rates == 0.05
            return 0.01 * torch.tensor([1.0, -1.0], dtype=gradients.dtype)[:, None].expand_as(gradients)

    problem, spread = networks.mlp(), Alternating()
    taken: Spread = spread
    optimizer = ReplicaNewton(problem.module.parameters(), 0.05, rule="paper", topology=Simulated(2), spread=taken)
    train(optimizer, problem, 3)
    assert spread.steps == [0, 1, 2]
    assert torch.equal(
        optimizer.state[problem.module[2].bias]["displacements"], torch.tensor([[0.01], [-0.01]], dtype=torch.float64)
    )


def test_one_replica_is_said_to_be_sgd(caplog: pytest.LogCaptureFixture):
    ReplicaNewton([parameter()], rule="paper")
    assert "one replica has no curvature" in caplog.text
    caplog.clear()
    ReplicaNewton([parameter()], rule="paper", topology=Simulated(2))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.5}, r"lr=-0\.5 must be finite and >= 0"),
        ({"lr": float("nan")}, "lr=nan must be finite and >= 0"),
        ({"lr": float("inf")}, "lr=inf must be finite and >= 0"),
        ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1\.\) must be finite and >= 0"),
        ({"rule": "newton"}, "rule='newton' must be one of paper, saddle-free"),
        ({"secant_data": "global"}, "secant_data='global' must be one of own, common"),
        ({"damping": -1.0}, r"damping=-1\.0 must be finite and >= 0"),
        ({"damping": float("nan")}, "damping=nan must be finite and >= 0"),
        ({"damping": float("inf")}, "damping=inf must be finite and >= 0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must be finite and >= 0"),
        ({"rtol": -0.1}, r"rtol=-0\.1 must be in \[0, 1\)"),
        ({"rtol": 1.0}, r"rtol=1\.0 must be in \[0, 1\)"),
        ({"rtol": float("nan")}, r"rtol=nan must be in \[0, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ReplicaNewton([parameter()], topology=Simulated(2), **({"rule": "paper"} | options))


GROUPS = [
    ({"params": [parameter()], "lr": -1.0}, r"lr=-1\.0 must be finite and >= 0"),
    ({"params": [parameter()], "lr": float("nan")}, "lr=nan must be finite and >= 0"),
    ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, r"dense and real, got .* torch\.complex64"),
    ({"params": [torch.ones(2, dtype=torch.int64)]}, r"dense and real, got .* torch\.int64"),
    ({"params": [nn.Parameter(torch.eye(2).to_sparse())]}, r"dense and real, got torch\.sparse_coo"),
]


@pytest.mark.parametrize(("group", "message"), GROUPS, ids=[message for _, message in GROUPS])
def test_a_bad_group_is_refused_and_not_added(group: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ReplicaNewton([dict(group)], rule="paper", topology=Simulated(2))
    optimizer = ReplicaNewton([parameter()], rule="paper", topology=Simulated(2))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("closure", [lambda: torch.tensor(1.0), print], ids=["lambda", "print"])
def test_a_plain_function_cannot_evaluate_replicas(closure: Callable[[], Tensor]):
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule="paper", topology=Simulated(2))
    with pytest.raises(TypeError, match=r"closure must come from topology\.closure.*got .*(lambda|print)"):
        optimizer.step(closure)


@pytest.mark.parametrize(("own", "other"), [(4, 8), (8, 4), (4, 1), (1, 4)])
def test_a_closure_of_another_number_of_replicas_is_refused(own: int, other: int):
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule="paper", topology=Simulated(own))
    closure: ReplicaClosure = closure_of(problem, other)
    with pytest.raises(ValueError, match=f"closure evaluates {other} replicas, the optimizer's topology has {own}"):
        optimizer.step(closure)
    assert closure.samples_evaluated == 0


def test_a_parameter_outside_the_module_of_the_closure_is_refused():
    problem = networks.mlp()
    optimizer = ReplicaNewton([*problem.module.parameters(), parameter()], rule="paper", topology=Simulated(2))
    with pytest.raises(ValueError, match="must belong to the module of the closure"):
        optimizer.step(closure_of(problem, 2))


def test_parameters_that_all_are_frozen_are_refused():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.requires_grad_(False).parameters(), rule="paper", topology=Simulated(2))
    with pytest.raises(ValueError, match="no parameter of the optimizer requires a gradient"):
        optimizer.step(closure_of(problem, 2))
