"""The end of a step must be the same however its columns are asked for, and be complete when others are lost."""

import pytest
import torch
from reference import F64, normal
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from replica_newton import ReplicaNewton, Simulated
from replica_newton.optim import advance as module
from replica_newton.optim.advance import Advance
from replica_newton.spread import LocalStep, RandomDirections, Spread
from replica_newton.spread.spread import Held
from replica_newton.topology.standing import Standing

M, N = 3, 41
W, G, DIRECTION, SHARED = normal(M, N, seed=1), normal(M, N, seed=2), normal(N, seed=3), normal(N, seed=4)


def advance(rates: Tensor | float, kept: Tensor | float, *, writes: bool) -> Advance:
    """A step whose spread writes to the memory that it is given, or does not."""

    def parted(some: slice, memory: Tensor) -> Tensor:
        own = rates[some] if isinstance(rates, Tensor) else rates
        held = Held(N, Simulated(M), G.mean(dim=0)[some], memory if writes else None)
        return LocalStep().displacements(G[:, some], own, 0, held)

    return Advance(Standing(SHARED, W), DIRECTION.__getitem__, parted, rates=rates, kept=kept)


@pytest.mark.parametrize("at_a_time", [1, 100, 1 << 20])
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("by_element", [True, False])
def test_columns_are_those_of_the_formula(monkeypatch, at_a_time: int, writes: bool, by_element: bool) -> None:
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
    rates = 0.1 + normal(N, seed=5).abs() if by_element else 0.3
    kept = 1.0 - 0.01 * rates
    moving = advance(rates, kept, writes=writes)
    points = torch.cat([moving.points(slice(low, low + 13), torch.empty(M * 13, dtype=F64)) for low in (0, 13)], dim=1)
    moving.finish()
    shared = kept * SHARED - rates * DIRECTION
    displacements = -rates * (G - G.mean(dim=0))
    torch.testing.assert_close(moving.shared, shared, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moving.displacements, displacements, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(points, (shared + displacements)[:, :26], rtol=1e-14, atol=1e-14)


def test_a_step_is_complete_when_a_process_is_lost_while_points_travel(monkeypatch) -> None:
    """The others go on from it."""

    def lost(*_: object) -> None:
        raise ConnectionError("a process is lost")

    optimizer = first_step("paper", LocalStep(), replicas=M)
    for name, value in (("distributed", True), ("lay_out", lambda *_: [N]), ("place", lost)):
        monkeypatch.setattr(Simulated, name, value)
    parameters, moving = optimizer.param_groups[0]["params"], advance(0.3, 1.0, writes=True)
    with pytest.raises(ConnectionError):
        optimizer._settle(parameters, moving, 2)
    kept = optimizer.state[parameters[0]]
    torch.testing.assert_close(kept["shared"], SHARED - 0.3 * DIRECTION)
    torch.testing.assert_close(kept["displacements"], -0.3 * (G - G.mean(dim=0)))


@pytest.mark.parametrize("rule", ["paper", "saddle-free"])
def test_a_spread_that_needs_whole_rows_gets_them(monkeypatch, rule: str) -> None:
    monkeypatch.setattr(module, "_AT_A_TIME", 1)
    norms = []
    for spread in (LocalStep(), RandomDirections(seed=3)):
        optimizer = first_step(rule, spread, replicas=4)
        parameters = optimizer.param_groups[0]["params"]
        rows = [optimizer.state[one]["displacements"].flatten(start_dim=1) for one in parameters]
        norms.append(float(torch.cat(rows, dim=1).norm()))
    assert norms[0] == pytest.approx(norms[1])  # as long as local steps, which only whole rows can tell


def first_step(rule: str, spread: Spread, replicas: int) -> ReplicaNewton:
    """An optimizer after its first step."""
    torch.manual_seed(0)
    network, topology = nn.Linear(4, 2).double(), Simulated(replicas)
    optimizer = ReplicaNewton(network.parameters(), 0.1, rule=rule, topology=topology, spread=spread)
    samples = 2 * replicas
    optimizer.step(topology.closure(network, mse_loss, normal(samples, 4, seed=6), normal(samples, 2, seed=7)))
    return optimizer
