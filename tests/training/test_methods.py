"""Methods by name: the optimizer that each makes, closed forms of first steps, what the number of replicas does."""

import pytest
import torch
from torch import Tensor, nn

from replica_newton.optim import ReplicaNewton
from replica_newton.topology import Simulated
from replica_newton.training.methods import METHODS

TOGETHER = ("sgd", "momentum", "adam", "metric")
PARTING = tuple(name for name in METHODS if name not in TOGETHER)
RATE = 0.05


class Problem:
    """A small linear network on eight samples, the same each time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        self.model = nn.Linear(3, 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    @property
    def vector(self) -> Tensor:
        """All parameters, flattened."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def gradient(self) -> Tensor:
        """Gradient of all samples, flattened."""
        loss = nn.functional.mse_loss(self.model(self.inputs), self.targets)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(self.model.parameters()))])

    def steps(self, method: str, replicas: int, count: int) -> tuple[torch.optim.Optimizer, list[int]]:
        """Take steps; returns the optimizer and the samples that each step evaluated."""
        topology = Simulated(replicas)
        optimizer = METHODS[method].make(self.model.parameters(), RATE, topology)
        samples = []
        for _ in range(count):
            closure = topology.closure(self.model, nn.functional.mse_loss, self.inputs, self.targets)
            optimizer.step(closure)
            samples.append(closure.samples_evaluated)
        return optimizer, samples


def test_methods_of_the_command_are_there():
    assert {"sgd", "momentum", "adam", "paper"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_makes_an_optimizer_of_all_parameters_at_the_given_rate(name):
    problem = Problem()
    optimizer, _ = problem.steps(name, 2, 0)
    (group,) = optimizer.param_groups
    assert group["params"] == list(problem.model.parameters())
    assert group["lr"] == RATE


@pytest.mark.parametrize("name", METHODS)
def test_says_what_it_does_and_has_a_rate_of_its_own(name):
    assert METHODS[name].description
    assert 0.0 < METHODS[name].learning_rate <= 1.0


def test_sgd_steps_along_the_gradient():
    problem = Problem()
    before, gradient = problem.vector, problem.gradient()
    problem.steps("sgd", 1, 1)
    torch.testing.assert_close(problem.vector, before - RATE * gradient)


def test_momentum_adds_nine_tenths_of_the_last_step():
    problem, reference = Problem(), Problem()
    start, first = reference.vector, reference.gradient()
    reference.steps("sgd", 1, 1)
    second = reference.gradient()
    problem.steps("momentum", 1, 2)
    torch.testing.assert_close(problem.vector, start - RATE * (first + (second + 0.9 * first)))


def test_adam_starts_with_steps_of_its_rate():
    problem = Problem()
    before, gradient = problem.vector, problem.gradient()
    problem.steps("adam", 1, 1)
    torch.testing.assert_close(problem.vector, before - RATE * gradient.sign(), rtol=1e-6, atol=1e-6)


def test_the_metric_starts_with_steps_of_a_share_of_the_weights_size():
    problem = Problem()
    before, gradient = problem.vector, problem.gradient()
    problem.steps("metric", 1, 1)
    size = 0.5 * float(before.square().mean().sqrt()) / 20
    for start, end in ((0, 6), (6, 8)):  # weight and bias have units of their own
        unit = gradient[start:end] / gradient[start:end].square().mean().sqrt()
        torch.testing.assert_close(problem.vector[start:end], before[start:end] - RATE * size * unit)


@pytest.mark.parametrize("name", TOGETHER)
def test_number_of_replicas_changes_nothing_for_methods_that_do_not_part_them(name):
    one, four = Problem(), Problem()
    assert one.steps(name, 1, 3)[1] == four.steps(name, 4, 3)[1] == [8, 8, 8]
    torch.testing.assert_close(one.vector, four.vector)
    assert not METHODS[name].parts_replicas


@pytest.mark.parametrize("name", PARTING)
def test_replicas_part_after_the_first_step_and_then_there_is_curvature(name):
    problem = Problem()
    before, gradient = problem.vector, problem.gradient()
    optimizer, _ = problem.steps(name, 4, 1)
    assert isinstance(optimizer, ReplicaNewton)
    torch.testing.assert_close(problem.vector, before - RATE * gradient)
    displacements = optimizer.state[problem.model.weight]["displacements"]
    assert displacements.shape == (4, 2, 3)
    assert bool(displacements.flatten(1).any(dim=1).all())
    torch.testing.assert_close(displacements.mean(dim=0), torch.zeros(2, 3, dtype=torch.float64))
    optimizer, _ = problem.steps(name, 4, 2)
    assert optimizer.curvature.rank == 3
    assert METHODS[name].parts_replicas


@pytest.mark.parametrize("name", PARTING)
def test_one_replica_takes_the_steps_of_sgd(name):
    problem, reference = Problem(), Problem()
    assert problem.steps(name, 1, 3)[1] == [8, 8, 8]
    reference.steps("sgd", 1, 3)
    torch.testing.assert_close(problem.vector, reference.vector)


@pytest.mark.parametrize("name", PARTING)
def test_secants_on_common_data_cost_a_second_evaluation_once_replicas_have_parted(name):
    _, samples = Problem().steps(name, 4, 3)
    assert samples == ([8, 8, 8] if name == "paper" else [8, 16, 16])


def test_methods_that_part_replicas_take_different_steps():
    ends = []
    for name in PARTING:
        problem = Problem()
        problem.steps(name, 4, 4)
        ends.append(problem.vector)
    sgd = Problem()
    sgd.steps("sgd", 4, 4)
    ends.append(sgd.vector)
    distances = torch.pdist(torch.stack(ends))
    assert bool((distances > 1e-6).all())
