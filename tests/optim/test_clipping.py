"""Clipping of the mean gradient."""

import copy

import networks
import pytest
import torch
from networks import flat, trained
from torch import nn

from replica_newton import ReplicaNewton, Simulated


def test_a_clipped_first_step_is_that_of_clip_grad_norm() -> None:
    problem = networks.mlp()
    reference = copy.deepcopy(problem.module)
    topology = Simulated(4)
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=topology, max_norm=0.01)
    optimizer.step(topology.closure(problem.module, problem.criterion, problem.inputs, problem.targets))
    problem.criterion(reference(*problem.inputs), problem.targets).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    assert float(norm) > 0.02, "the gradient is long enough to be clipped"
    torch.optim.SGD(reference.parameters(), 0.1).step()
    torch.testing.assert_close(
        flat(trained(problem.module)), flat(list(reference.parameters())), rtol=1e-12, atol=1e-12
    )


def test_given_gradients_are_clipped_as_well() -> None:
    problem = networks.mlp()
    reference = copy.deepcopy(problem.module)
    optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", max_norm=0.01)
    for module in (problem.module, reference):
        problem.criterion(module(*problem.inputs), problem.targets).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    optimizer.step()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    torch.testing.assert_close(
        flat(trained(problem.module)), flat(list(reference.parameters())), rtol=1e-12, atol=1e-12
    )


def test_a_short_gradient_is_left_alone() -> None:
    ends = []
    for max_norm in (None, 1e6):
        problem = networks.mlp()
        topology = Simulated(4)
        optimizer = ReplicaNewton(problem.module.parameters(), 0.1, rule="paper", topology=topology, max_norm=max_norm)
        for _ in range(4):
            optimizer.step(topology.closure(problem.module, problem.criterion, problem.inputs, problem.targets))
        ends.append(flat(trained(problem.module)))
    assert torch.equal(*ends)


def test_secants_do_not_see_it() -> None:
    # Least squares in two dimensions: three replicas with common data see the whole Hessian, whatever is clipped.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    module = nn.Linear(2, 1, bias=False).double()
    topology = Simulated(3)
    optimizer = ReplicaNewton(
        module.parameters(), 0.01, rule="paper", topology=topology, secant_data="common", max_norm=1e-3
    )
    for _ in range(2):
        before = flat(trained(module))
        closure = topology.closure(module, nn.functional.mse_loss, inputs, 5.0 + 3.0 * inputs[:, :1])
        optimizer.step(closure)
    common = inputs[:4]
    exact = torch.linalg.eigvalsh(2.0 / 4 * common.T @ common).flip(0)
    torch.testing.assert_close(optimizer.curvature.eigenvalues, exact, rtol=1e-8, atol=1e-10)
    # The step is the inverse-Hessian product of the clipped gradient.
    moved = flat(trained(module)) - before
    assert 0.0 < float(moved.norm()) <= 0.01 * 1e-3 / float(exact.min()) * (1 + 1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_must_be_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        ReplicaNewton([nn.Parameter(torch.ones(1))], rule="paper", max_norm=max_norm)
