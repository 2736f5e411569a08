"""Decoupled weight decay: parameters shrink, and neither gradients nor secants know of it."""

import copy
from typing import Any

import networks
import pytest
import torch
from networks import closure_of, flat, trained
from torch.nn.functional import mse_loss

from replica_newton import ReplicaNewton, Simulated

RULES: dict[str, dict[str, Any]] = {
    "paper": {"rule": "paper", "lr": 0.1},
    "saddle-free": {"rule": "saddle-free", "lr": 0.1, "damping": 1.0},
    "metric": {"rule": "metric", "lr": 0.5},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("M", [1, 4])
def test_a_step_with_decay_is_one_without_and_shorter_parameters(options: dict[str, Any], M: int):
    problem = networks.mlp()
    modules = problem.module[0], problem.module[2]
    groups = [{"params": module.parameters(), "weight_decay": 0.0} for module in modules]
    optimizer = ReplicaNewton(groups, topology=Simulated(M), **options)
    for _ in range(3):
        optimizer.step(closure_of(problem, M))
    before, ends = flat(trained(problem.module)), []
    for decay in (0.0, 0.2):
        module, other = copy.deepcopy((problem.module, optimizer))
        other.param_groups[1]["weight_decay"] = decay
        other.step(closure_of(problem._replace(module=module), M))
        ends.append(flat(trained(module)))
        if M > 1 and optimizer.metric_step is None:
            assert other.curvature is not None
    first = sum(p.numel() for p in modules[0].parameters())
    rate = options["lr"]
    if other.metric_step is not None:
        size = float(before.square().mean().sqrt())
        rate *= other.metric_step.rate.share * min(other.metric_step.rate.distance, size) * 4 / 20
    assert torch.equal(ends[1][:first], ends[0][:first])
    torch.testing.assert_close(ends[0][first:] - ends[1][first:], rate * 0.2 * before[first:])


@pytest.mark.parametrize("given", [False, True])
def test_with_one_replica_it_is_the_weight_decay_of_sgd(given: bool):
    problem, plain = networks.mlp(), networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(1), weight_decay=0.3)
    sgd = torch.optim.SGD(plain.module.parameters(), 0.1, weight_decay=0.3)
    for _ in range(3):
        sgd.zero_grad()
        mse_loss(plain.module(*plain.inputs), plain.targets).backward()
        sgd.step()
        if given:
            optimizer.zero_grad()
            mse_loss(problem.module(*problem.inputs), problem.targets).backward()
        optimizer.step(None if given else closure_of(problem, 1))
    torch.testing.assert_close(flat(trained(problem.module)), flat(trained(plain.module)))


def test_a_state_of_before_there_was_one_is_loaded():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=Simulated(2), weight_decay=0.3)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["weight_decay"]
    optimizer.load_state_dict(state)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]
    optimizer.step(closure_of(problem, 2))
