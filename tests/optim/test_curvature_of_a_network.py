"""Live curvature on real data against the exact Hessian in the span of the replicas."""

from typing import NamedTuple

import pytest
import torch
from networks import Problem, closure_of, flat, train, trained
from reference import F64, centred, flat_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import LocalStep, RandomDirections, ReplicaNewton, Simulated
from replica_newton.spread import Spread

M = 4


def digits() -> Problem:
    """64 images and a 64–4–10 tanh network: 310 parameters."""
    data = load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10)).double()
    inputs = torch.as_tensor(data.data[:64] / 16.0, dtype=F64)
    return Problem(module, cross_entropy, (inputs,), torch.as_tensor(data.target[:64], dtype=torch.int64))


class Observation(NamedTuple):
    """Ritz values that the optimizer saw, and those of the exact Hessian of the first shard, in the same span."""

    seen: Tensor
    exact: Tensor
    largest: float


def observe(spread: Spread, *, secant_data: str = "common", steps: int = 8) -> Observation:
    problem = digits()
    optimizer = ReplicaNewton(
        problem.module.parameters(), 0.05, rule="paper", topology=Simulated(M), spread=spread, secant_data=secant_data
    )
    train(optimizer, problem, steps)
    rows = torch.cat(
        [optimizer.state[p]["displacements"].flatten(start_dim=1) for p in problem.module.parameters()], dim=1
    )
    size = len(problem.targets) // M
    shard, targets = problem.inputs[0][:size], problem.targets[:size]
    exact = flat_loss(problem.module, lambda model: cross_entropy(model(shard), targets))
    assert torch.equal(exact.w, flat(trained(problem.module)))
    Q = torch.linalg.qr(centred(rows)[:, :-1]).Q
    values = torch.linalg.eigvalsh(Q.T @ exact.hessian @ Q)
    optimizer.step(closure_of(problem, M))
    return Observation(
        optimizer.curvature.eigenvalues,
        values[values.abs().argsort(descending=True)],
        float(torch.linalg.eigvalsh(exact.hessian)[-1]),
    )


def test_common_secants_show_the_hessian_of_their_shard_to_five_per_cent():
    seen, exact, largest = observe(LocalStep())
    assert len(seen) == M - 1
    torch.testing.assert_close(seen, exact, rtol=0.0, atol=0.05 * float(exact[0]))
    # The span of local steps holds a good part of the sharpest curvature there is, and cannot show more.
    assert 0.1 * largest < float(seen[0]) < 1.05 * largest


def test_the_error_of_the_secants_is_of_first_order_in_the_displacements():
    errors = []
    for radius in (1e-1, 1e-2, 1e-3):
        seen, exact, _ = observe(RandomDirections(radius=radius), steps=1)
        errors.append(float((seen - exact).abs().max() / exact[0].abs()))
    assert errors[0] < 0.5
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.5)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.5)


def test_secants_of_own_shards_show_the_rate_instead_of_the_hessian():
    """On one batch gradients differ by data far more than by parameters: G ≈ −W/lr, so that all θ ≈ −1/lr."""
    seen, exact, _ = observe(LocalStep(), secant_data="own")
    torch.testing.assert_close(seen, torch.full((3,), -1 / 0.05, dtype=F64), rtol=0.01, atol=0.0)
    assert float(exact[0]) < 2.0
