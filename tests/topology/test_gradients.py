"""Gradients of simulated replicas against deep copies of the module, differentiated one by one."""

from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, copies, flat, points_around, trained
from reference import normal
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from replica_newton import Simulated

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

MODES = pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
DATA = pytest.mark.parametrize("data", ["own", "common"])
PROBLEMS = pytest.mark.parametrize("build", networks.BATCHABLE, ids=lambda build: build.__name__)


def closure_of(problem: Problem, M: int, *, batched: bool | None = None):
    return Simulated(M, batched=batched).closure(problem.module, problem.criterion, problem.inputs, problem.targets)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("M", [1, 2, 6])
@DATA
@MODES
@PROBLEMS
def test_gradients_equal_those_of_module_copies(build: Callable[[], Problem], batched: bool, data: str, M: int):
    problem = build()
    parameters = trained(problem.module)
    points = points_around(parameters, M)
    expected = copies(problem, points, data)
    got = closure_of(problem, M, batched=batched).gradients(parameters, points, data=data)
    assert_equal(got.losses, expected.losses)
    assert_equal(got.gradients, expected.gradients)
    assert got.gradients.abs().amax(dim=1).min() > 1e-3


@MODES
@PROBLEMS
def test_an_evaluation_at_other_points_leaves_parameters_and_their_grad_alone(build: Callable[[], Problem], batched):
    problem = build()
    before = flat(list(problem.module.parameters()))
    parameters = trained(problem.module)
    closure_of(problem, 2, batched=batched).gradients(parameters, points_around(parameters, 2))
    assert torch.equal(flat(list(problem.module.parameters())), before)
    assert all(parameter.grad is None for parameter in parameters)


@MODES
def test_the_mean_over_replicas_at_one_point_is_the_gradient_of_the_global_batch(batched: bool):
    problem = networks.convnet()
    parameters = trained(problem.module)
    closure = closure_of(problem, 4, batched=batched)
    loss = closure()
    replicas = closure.gradients(parameters, flat(parameters).expand(4, -1))
    assert_equal(replicas.losses.mean(), loss)
    assert_equal(replicas.gradients.mean(dim=0), flat([parameter.grad for parameter in parameters]))


@MODES
def test_parameters_that_do_not_vary_are_as_they_stand_in_the_module(batched: bool):
    problem = networks.mlp()
    names = ["0.bias", "2.weight"]
    parameters = [dict(problem.module.named_parameters())[name] for name in names]
    points = points_around(parameters, 3)
    got = closure_of(problem, 3, batched=batched).gradients(parameters, points)
    assert_equal(got.gradients, copies(problem, points, names=names).gradients)
    # Nothing of the pass may live on through the parameters that stay.
    assert not got.gradients.requires_grad
    assert not got.losses.requires_grad


@MODES
def test_a_parameter_that_the_loss_does_not_use_has_a_zero_gradient(batched: bool):
    problem = networks.odd_parameters()
    unused = [problem.module.unused, problem.module.scale]
    got = closure_of(problem, 2, batched=batched).gradients(unused, points_around(unused, 2))
    assert torch.equal(got.gradients[:, :2], torch.zeros(2, 2, dtype=torch.float64))
    assert (got.gradients[:, 2] != 0).all()


@MODES
def test_gradients_are_taken_inside_no_grad_too(batched: bool):
    problem = networks.mlp()
    parameters = trained(problem.module)
    points = points_around(parameters, 2)
    closure = closure_of(problem, 2, batched=batched)
    with torch.no_grad():
        got = closure.gradients(parameters, points)
        loss = closure()
    assert_equal(got.gradients, copies(problem, points).gradients)
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in parameters)


@MODES
def test_points_in_fp32_reach_half_precision_parameters_in_their_dtype(batched: bool):
    problem = networks.mlp()
    module = problem.module.bfloat16()
    inputs, targets = problem.inputs[0].bfloat16(), problem.targets.bfloat16()
    closure = Simulated(2, batched=batched).closure(module, mse_loss, inputs, targets)
    got = closure.gradients(trained(module), points_around(trained(module), 2).float())
    assert got.gradients.dtype == torch.bfloat16
    assert got.gradients.isfinite().all()


@MODES
def test_on_own_shards_buffers_become_the_mean_over_replicas(batched: bool):
    problem = networks.batch_norm()
    parameters = trained(problem.module)
    points = points_around(parameters, 3)
    norms = [module[1] for module in copies(problem, points).modules]
    closure_of(problem, 3, batched=batched).gradients(parameters, points)
    got = problem.module[1]
    assert_equal(got.running_mean, torch.stack([norm.running_mean for norm in norms]).mean(dim=0))
    assert_equal(got.running_var, torch.stack([norm.running_var for norm in norms]).mean(dim=0))
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean)
    assert int(got.num_batches_tracked) == 1


@MODES
def test_on_common_data_buffers_stay(batched: bool):
    problem = networks.batch_norm()
    parameters = trained(problem.module)
    before = {name: buffer.clone() for name, buffer in problem.module.named_buffers()}
    closure_of(problem, 3, batched=batched).gradients(parameters, points_around(parameters, 3), data="common")
    for name, buffer in problem.module.named_buffers():
        assert torch.equal(buffer, before[name]), name


@MODES
def test_constant_buffers_do_not_drift(batched: bool):
    class Shifted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("shift", torch.rand(100, generator=torch.Generator().manual_seed(0)))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift[0]

    module = Shifted()
    before = module.shift.clone()
    closure = Simulated(7, batched=batched).closure(module, mse_loss, torch.ones(7, 3), torch.zeros(7, 1))
    for _ in range(5):
        closure.gradients(trained(module), flat(trained(module)).expand(7, -1))
    assert torch.equal(module.shift, before)
    assert torch.equal(module.mask, torch.tensor([0.0, -torch.inf]))


@MODES
def test_sparse_gradients_are_refused(batched: bool):
    module = nn.Embedding(5, 2, sparse=True)
    closure = Simulated(2, batched=None if batched else False).closure(
        module, mse_loss, torch.tensor([0, 1, 2, 3]), torch.zeros(4, 2)
    )
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        closure.gradients([module.weight], normal(2, 10, seed=0).float())
