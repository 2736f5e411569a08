"""The average at which the rule "metric" is evaluated."""

from pathlib import Path

import networks
import pytest
import torch
from networks import closure_of, flat, trained

from replica_newton import ReplicaNewton, Simulated, save_checkpoint


def test_it_is_that_of_the_last_steps_and_the_module_comes_back():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule="metric", topology=Simulated(2))
    points = []
    for _ in range(30):
        optimizer.step(closure_of(problem, 2))
        points.append(flat(trained(problem.module)).clone())
    weights = torch.ones(30, dtype=torch.float64)
    for t in range(2, 31):
        weights[: t - 1] *= 1.0 - 9.0 / (t + 8)
        weights[t - 1] = 9.0 / (t + 8)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights[20:].sum()) > 0.9, "nearly all of the weight is on the last third"
    with optimizer.averaged():
        torch.testing.assert_close(flat(trained(problem.module)), (weights[:, None] * torch.stack(points)).sum(dim=0))
    assert torch.equal(flat(trained(problem.module)), points[-1])


def test_under_noise_it_is_closer_to_the_minimum_than_any_single_point():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(200, dtype=torch.float64))
    optimizer = ReplicaNewton([w], rule="metric")
    last, averaged = [], []
    for step in range(2000):
        w.grad = w.detach() + 3.0 * torch.randn_like(w)
        optimizer.step()
        if step > 1000 and step % 50 == 0:
            last.append(float(w.detach().norm()))
            with optimizer.averaged():
                averaged.append(float(w.detach().norm()))
    assert max(averaged) < 0.7 * min(last)


def test_the_module_comes_back_after_an_error_and_steps_inside_are_refused():
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule="metric")
    optimizer.step(closure_of(problem, 1))
    optimizer.step(closure_of(problem, 1))
    before = flat(trained(problem.module)).clone()

    def step_inside() -> None:
        with optimizer.averaged():
            assert not torch.equal(flat(trained(problem.module)), before)
            optimizer.step(closure_of(problem, 1))

    with pytest.raises(RuntimeError, match="must not be taken inside"):
        step_inside()
    assert torch.equal(flat(trained(problem.module)), before)
    optimizer.step(closure_of(problem, 1))


def test_a_checkpoint_to_train_on_from_is_not_saved_inside(tmp_path: Path):
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule="metric")
    optimizer.step(closure_of(problem, 1))
    with optimizer.averaged(), pytest.raises(RuntimeError, match="must not be saved inside"):
        save_checkpoint(tmp_path, 1, problem.module, optimizer)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path, 1, problem.module, optimizer)


@pytest.mark.parametrize("rule", ["paper", "metric"])
def test_where_there_is_no_average_the_module_stays(rule: str):
    problem = networks.mlp()
    optimizer = ReplicaNewton(problem.module.parameters(), rule=rule, topology=Simulated(2))
    for _ in range(3 if rule == "paper" else 0):
        optimizer.step(closure_of(problem, 2))
    before = flat(trained(problem.module)).clone()
    with optimizer.averaged():
        assert torch.equal(flat(trained(problem.module)), before)


def test_parameters_in_half_precision_have_an_average_in_single():
    w = torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = ReplicaNewton([w], rule="metric")
    for _ in range(3):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert optimizer.state[w]["average"].dtype == torch.float32
    with optimizer.averaged():
        assert torch.equal(w.detach(), optimizer.state[w]["average"].bfloat16())
