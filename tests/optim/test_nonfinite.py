"""Steps whose loss or gradient is not finite."""

import copy
import logging

import networks
import pytest
import torch
from networks import closure_of, flat, trained

from replica_newton import ReplicaNewton, Simulated
from replica_newton.optim.calls import MAX_SKIPPED_IN_A_ROW


def poisoned() -> tuple[networks.Problem, networks.Problem]:
    """A problem with batch normalisation, and the same module with a batch that holds a nan."""
    problem = networks.batch_norm()
    inputs = tuple(one.clone() for one in problem.inputs)
    inputs[0].view(-1)[-1] = torch.nan
    return problem, problem._replace(inputs=inputs)


def optimizer_of(problem: networks.Problem, **options: str) -> ReplicaNewton:
    return ReplicaNewton(trained(problem.module), 0.05, topology=Simulated(2), **({"rule": "paper"} | options))


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
def test_such_a_step_changes_nothing_batch_norm_statistics_included(nonfinite: str, batched: bool) -> None:
    problem, bad = poisoned()
    optimizer = ReplicaNewton(
        trained(problem.module), 0.05, rule="paper", topology=Simulated(2, batched=batched), nonfinite=nonfinite
    )
    optimizer.step(closure_of(problem, optimizer.topology))
    before = copy.deepcopy((problem.module.state_dict(), optimizer.state_dict()["state"]))
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="replica 1 is not finite"):
            optimizer.step(closure_of(bad, optimizer.topology))
    else:
        assert not optimizer.step(closure_of(bad, optimizer.topology)).isfinite()
    torch.testing.assert_close((problem.module.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert optimizer.skipped == (nonfinite == "skip")
    optimizer.step(closure_of(problem, optimizer.topology))
    assert bool(flat(trained(problem.module)).isfinite().all())


def test_skipped_steps_leave_no_trace_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    ends = []
    for skips in (False, True):
        problem, bad = poisoned()
        optimizer = optimizer_of(problem, nonfinite="skip")
        for step in range(6):
            if skips and step % 2:
                optimizer.step(closure_of(bad, optimizer.topology))
            optimizer.step(closure_of(problem, optimizer.topology))
        ends.append(flat(trained(problem.module)))
    assert torch.equal(*ends)
    assert optimizer.skipped == 3
    assert [record.levelno for record in caplog.records if "step skipped" in record.message] == [logging.WARNING] * 3


def test_steps_are_not_skipped_for_ever() -> None:
    problem, bad = poisoned()
    optimizer = optimizer_of(problem, nonfinite="skip")
    for _ in range(2):
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            optimizer.step(closure_of(bad, optimizer.topology))
        optimizer.step(closure_of(problem, optimizer.topology))
    for _ in range(MAX_SKIPPED_IN_A_ROW):
        optimizer.step(closure_of(bad, optimizer.topology))
    with pytest.raises(FloatingPointError):
        optimizer.step(closure_of(bad, optimizer.topology))
    assert optimizer.skipped == 3 * MAX_SKIPPED_IN_A_ROW


def test_counts_are_saved_with_the_state_and_old_states_have_none() -> None:
    problem, bad = poisoned()
    optimizer = optimizer_of(problem, nonfinite="skip")
    optimizer.step(closure_of(bad, optimizer.topology))
    optimizer.fallbacks = 7
    state = optimizer.state_dict()
    loaded = optimizer_of(problem, nonfinite="skip")
    loaded.load_state_dict(state)
    assert (loaded.fallbacks, loaded.skipped) == (7, 1)
    del state["counts"]
    loaded.load_state_dict(state)
    assert (loaded.fallbacks, loaded.skipped) == (0, 0)


def test_nothing_else_can_be_done_about_them() -> None:
    with pytest.raises(ValueError, match="nonfinite='halt' must be one of stop, skip"):
        optimizer_of(networks.batch_norm(), nonfinite="halt")
