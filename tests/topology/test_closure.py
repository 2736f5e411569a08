"""A closure over one global batch: for any optimizer, and its errors."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import networks
import pytest
import torch
from networks import Problem, flat, points_around, trained
from reference import normal
from torch import Tensor
from torch.nn.functional import mse_loss

from replica_newton import Simulated


def closure_of(problem: Problem, M: int):
    return Simulated(M).closure(problem.module, problem.criterion, problem.inputs, problem.targets)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "L-BFGS": partial(torch.optim.LBFGS, lr=0.5, max_iter=5),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer_takes_the_closure(build: Callable[..., torch.optim.Optimizer]):
    problem, plain = networks.convnet(), networks.convnet()
    optimizer, plain_optimizer = build(problem.module.parameters()), build(plain.module.parameters())

    def plain_closure() -> Tensor:
        plain_optimizer.zero_grad()
        loss = plain.criterion(plain.module(*plain.inputs), plain.targets)
        loss.backward()
        return loss

    for _ in range(5):
        loss, plain_loss = optimizer.step(closure_of(problem, 4)), plain_optimizer.step(plain_closure)
        assert torch.equal(loss, plain_loss)
    assert torch.equal(flat(trained(problem.module)), flat(trained(plain.module)))


def test_a_second_call_replaces_the_gradient_of_the_first():
    problem = networks.mlp()
    closure = closure_of(problem, 2)
    loss = closure()
    first = flat([parameter.grad for parameter in trained(problem.module)])
    closure()
    assert torch.equal(flat([parameter.grad for parameter in trained(problem.module)]), first)
    assert not loss.requires_grad


def test_every_sample_whose_gradient_is_computed_counts():
    problem = networks.mlp()
    parameters = trained(problem.module)
    points = points_around(parameters, 4)
    closure = closure_of(problem, 4)
    counts = [closure.samples_evaluated]
    closure()
    counts.append(closure.samples_evaluated)
    closure.gradients(parameters, points)
    counts.append(closure.samples_evaluated)
    closure.gradients(parameters, points, data="common")
    counts.append(closure.samples_evaluated)
    assert counts == [0, 24, 48, 72]


@pytest.mark.parametrize("replicas", [0, -2, True, 2.5, "4", None])
def test_the_number_of_replicas_must_be_a_positive_integer(replicas: object):
    with pytest.raises(ValueError, match=r"replicas=.* must be an integer >= 1") as raised:
        Simulated(replicas)
    assert repr(replicas) in str(raised.value)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((24, 20), r"same number of samples, got \[20, 24\]"),
        ((10, 10), "replicas=4 must divide the batch of 10 samples"),
        ((2, 2), "replicas=4 must divide the batch of 2 samples"),
        ((0, 0), "replicas=4 must divide the batch of 0 samples"),
    ],
)
def test_a_batch_must_split_into_equal_shards(samples: tuple[int, int], message: str):
    module = networks.mlp().module
    with pytest.raises(ValueError, match=message):
        Simulated(4).closure(module, mse_loss, normal(samples[0], 3, seed=0), normal(samples[1], 1, seed=0))


def test_several_inputs_must_hold_the_same_number_of_samples():
    problem = networks.bilinear()
    with pytest.raises(ValueError, match="same number of samples"):
        Simulated(2).closure(problem.module, mse_loss, (problem.inputs[0][:12], problem.inputs[1]), problem.targets)


def test_a_parameter_of_another_module_is_refused():
    problem = networks.mlp()
    foreign = torch.nn.Parameter(torch.ones(2))
    closure = closure_of(problem, 2)
    with pytest.raises(ValueError, match="must belong to the module of the closure"):
        closure.gradients([*trained(problem.module), foreign], torch.zeros(2, 23))
    assert closure.samples_evaluated == 0


@pytest.mark.parametrize("shape", [(2, 21), (8, 21), (4, 20)], ids=str)
def test_points_of_another_number_of_replicas_or_parameters_are_refused(shape: tuple[int, int]):
    problem = networks.mlp()
    closure = closure_of(problem, 4)
    with pytest.raises(ValueError, match=r"points must be \(M, N\) = \(4, 21\), got") as raised:
        closure.gradients(trained(problem.module), torch.zeros(shape))
    assert str(shape) in str(raised.value)
    assert closure.samples_evaluated == 0


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda topology: pickle.loads(pickle.dumps(topology))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("batched", [None, False])
def test_a_topology_that_has_been_used_can_be_copied(clone: Callable[[Simulated], Simulated], batched: bool | None):
    problem = networks.branching()
    parameters = trained(problem.module)
    points = points_around(parameters, 2)
    topology = Simulated(2, batched=batched)
    arguments = (problem.module, problem.criterion, problem.inputs, problem.targets)
    expected = topology.closure(*arguments).gradients(parameters, points).gradients
    cloned = clone(topology)
    assert (cloned.replicas, cloned.batched) == (2, batched)
    assert torch.equal(cloned.closure(*arguments).gradients(parameters, points).gradients, expected)


def test_the_topology_says_how_many_replicas_it_has():
    assert repr(Simulated(8)) == "Simulated(8)"
    assert closure_of(networks.mlp(), 8).replicas == 8
