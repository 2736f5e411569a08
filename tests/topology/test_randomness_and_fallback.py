"""Random numbers of the replicas, and modules that no batched pass can follow."""

import logging

import networks
import pytest
import torch
from networks import Problem, copies, flat, points_around, trained
from reference import normal
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from replica_newton import Simulated
from replica_newton.topology import ReplicaClosure

MODES = pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
LOGGER = "replica_newton.topology.simulated"


def closure_of(problem: Problem, topology: Simulated) -> ReplicaClosure:
    return topology.closure(problem.module, problem.criterion, problem.inputs, problem.targets)


def dropout_closure(batched: bool, M: int = 4) -> tuple[list[nn.Parameter], Tensor, ReplicaClosure]:
    """A network with dropout, M times the same point, and a batch whose shards are all the same."""
    module = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    shard = normal(2, 3, seed=1)
    closure = Simulated(M, batched=batched).closure(
        module, mse_loss, shard.repeat(M, 1), torch.zeros(2 * M, 1).double()
    )
    return trained(module), flat(trained(module)).expand(M, -1), closure


def distinct_rows(rows: Tensor) -> int:
    return len({tuple(row.tolist()) for row in rows})


@MODES
def test_on_common_data_all_replicas_drop_the_same_units(batched: bool):
    torch.manual_seed(0)
    parameters, points, closure = dropout_closure(batched)
    first = closure.gradients(parameters, points, data="common").gradients
    second = closure.gradients(parameters, points, data="common").gradients
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=0.0, atol=1e-14)
    # Dropout acts, and the next evaluation has a mask of its own.
    assert not torch.allclose(first, second)


@MODES
def test_on_own_shards_every_replica_drops_units_of_its_own(batched: bool):
    torch.manual_seed(0)
    parameters, points, closure = dropout_closure(batched)
    assert distinct_rows(closure.gradients(parameters, points, data="own").gradients) == 4


@MODES
@pytest.mark.parametrize("data", ["own", "common"])
def test_the_same_seed_gives_the_same_masks(batched: bool, data: str):
    parameters, points, closure = dropout_closure(batched)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(closure.gradients(parameters, points, data=data).gradients)
    assert torch.equal(*results)


def test_a_module_that_cannot_be_batched_runs_in_a_loop_with_one_warning(caplog: pytest.LogCaptureFixture):
    problem = networks.branching()
    parameters = trained(problem.module)
    topology = Simulated(4)
    with caplog.at_level(logging.WARNING):
        for data in ("own", "common", "own"):
            points = points_around(parameters, 4)
            got = closure_of(problem, topology).gradients(parameters, points, data=data)
            torch.testing.assert_close(got.gradients, copies(problem, points, data).gradients, rtol=0.0, atol=1e-12)
    assert [record.name for record in caplog.records] == [LOGGER]
    assert "Branching cannot be batched" in caplog.text
    assert "data-dependent" in caplog.text


def test_another_module_is_tried_on_its_own(caplog: pytest.LogCaptureFixture):
    topology = Simulated(2)
    for problem in (networks.branching(), networks.branching(), networks.mlp()):
        parameters = trained(problem.module)
        closure_of(problem, topology).gradients(parameters, points_around(parameters, 2))
    assert len(caplog.records) == 2


def test_demanding_a_batched_pass_raises_the_reason(caplog: pytest.LogCaptureFixture):
    problem = networks.branching()
    parameters = trained(problem.module)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        closure_of(problem, Simulated(4, batched=True)).gradients(parameters, points_around(parameters, 4))
    assert not caplog.records


def test_demanding_a_loop_tries_nothing_else(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    problem = networks.branching()
    parameters = trained(problem.module)
    monkeypatch.setattr("replica_newton.topology.simulated._batched", None)
    closure_of(problem, Simulated(4, batched=False)).gradients(parameters, points_around(parameters, 4))
    assert not caplog.records


@pytest.mark.parametrize("data", ["own", "common"])
def test_an_attempt_that_fails_draws_no_random_numbers(data: str):
    """Else a resumed run, which tries again, would differ from the one that was not interrupted."""
    results = []
    for batched in (None, False):
        problem = networks.branching(dropout=0.5)
        parameters = trained(problem.module)
        torch.manual_seed(7)
        closure = closure_of(problem, Simulated(4, batched=batched))
        results.append(closure.gradients(parameters, points_around(parameters, 4), data=data).gradients)
        results.append(torch.rand(1))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_an_attempt_that_fails_leaves_the_buffers_to_the_loop():
    problem = networks.batch_norm()
    module = nn.Sequential(problem.module, networks.Branching().double())
    module[1].linear = nn.Linear(1, 1).double()
    topology = Simulated(2)
    closure = topology.closure(module, problem.criterion, problem.inputs, problem.targets)
    closure.gradients(trained(module), points_around(trained(module), 2))
    assert int(problem.module[1].num_batches_tracked) == 1


def test_an_error_of_the_module_itself_reaches_the_caller_without_a_warning(caplog: pytest.LogCaptureFixture):
    problem = networks.mlp()
    parameters = trained(problem.module)
    closure = Simulated(2).closure(problem.module, mse_loss, normal(24, 7, seed=0), problem.targets)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        closure.gradients(parameters, points_around(parameters, 2))
    assert not caplog.records
