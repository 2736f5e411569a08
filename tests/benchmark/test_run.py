import math
from dataclasses import replace

import pytest
import torch

from replica_newton.benchmark.results import as_kept
from replica_newton.benchmark.run import POINTS, Record, Run, do_run, whole_loss
from replica_newton.benchmark.tasks import TASKS

RUN = Run("digits-mlp", "sgd", 0.3, seed=0, epochs=3, train_limit=128)


def run(**changes: object) -> Record:
    one = replace(RUN, **changes)  # type: ignore[arg-type]
    return do_run(one, TASKS[one.task].read(None, one.train_limit))


def test_a_run_spends_its_budget_and_repeats_bit_for_bit() -> None:
    told: list[float] = []
    data = TASKS["digits-mlp"].read(None, 128)
    first = do_run(RUN, data, told.append)
    assert first.evaluations == 3 * 128
    assert first.steps == 3
    assert told == [1.0, 2.0]
    assert [at for at, _, _ in first.curve] == [128, 256, 384]
    assert first.last_epoch_nll == first.curve[-1][2]
    again = run()
    assert replace(again, seconds=0.0, curve=()) == replace(first, seconds=0.0, curve=())
    assert [nll for _, _, nll in again.curve] == [nll for _, _, nll in first.curve]
    assert run(seed=1).final_nll != first.final_nll


def test_dearer_steps_are_fewer_at_the_same_budget() -> None:
    plain, dear = run(epochs=12), run(epochs=12, method="M=8")
    assert plain.steps == 12
    # One gradient in the first step, two in each of the others.
    assert dear.steps == 7
    assert 12 * 128 <= dear.evaluations < 13.5 * 128


def test_sgd_follows_half_a_cosine() -> None:
    data = TASKS["digits-mlp"].read(None, 64)
    found = do_run(replace(RUN, epochs=4, train_limit=64), data)
    torch.manual_seed(0)
    module = TASKS["digits-mlp"].model(data)
    for step in range(4):
        rate = 0.3 * 0.5 * (1.0 + math.cos(math.pi * step / 4))
        loss = torch.nn.functional.cross_entropy(module(data.inputs), data.targets)
        for parameter, gradient in zip(
            module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            parameter.data.sub_(gradient, alpha=rate)
    final = whole_loss(module, torch.nn.functional.cross_entropy, data.inputs, data.targets)
    assert found.final_nll == pytest.approx(final, rel=1e-5)


def test_a_long_run_has_as_many_points_as_a_curve_has() -> None:
    found = run(epochs=50)
    assert len(found.curve) == POINTS
    assert found.curve[-1][0] == found.evaluations
    assert found.final_nll < found.curve[0][2]


@pytest.mark.parametrize("rate", [1e4, 1e20])
def test_a_run_that_diverges_is_recorded_as_such(rate: float) -> None:
    found = run(rate=rate, epochs=20)
    assert found.diverged
    assert math.isnan(found.final_nll)
    assert math.isnan(found.last_epoch_nll)
    assert found.evaluations < 20 * 128
    kept = as_kept(found)
    assert kept.diverged
    assert kept.run == found.run


def test_what_is_kept_is_read_again() -> None:
    found = run()
    kept = as_kept(found)
    assert as_kept(kept) == kept
    assert kept.run == RUN
    assert kept.final_nll == pytest.approx(found.final_nll, rel=1e-5)


def test_a_stand_in_is_the_same_run() -> None:
    assert replace(RUN, tentative=True) == RUN
    assert hash(replace(RUN, tentative=True)) == hash(RUN)


def test_the_whole_loss_is_a_mean_over_samples() -> None:
    data, task = TASKS["digits-mlp"].read(None), TASKS["digits-mlp"]
    module = task.model(data)
    whole = float(task.criterion(module(data.inputs), data.targets).detach())
    # 1437 samples, in parts of 1024 and 413.
    assert whole_loss(module, task.criterion, data.inputs, data.targets) == pytest.approx(whole, rel=1e-6)
