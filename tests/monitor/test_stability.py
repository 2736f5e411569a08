"""Metric and limit of optimizers, against torch's own steps on a parabola."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from reference import F64, normal
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from replica_newton.monitor.stability import (
    added_weight_decay,
    has_metric,
    is_known,
    metric_of,
    stable_sharpness,
)

OPTIMIZERS: dict[str, Callable[[list], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "ignored-dampening": lambda p: SGD(p, 0.1, dampening=0.5),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "dampened": lambda p: SGD(p, 0.1, momentum=0.8, dampening=0.5),
    "nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd-decay": lambda p: SGD(p, 0.1, momentum=0.5, weight_decay=3.0),
    "tensor-rate": lambda p: SGD(p, torch.tensor(0.1, dtype=F64), momentum=0.5),
    "adam": lambda p: Adam(p, 0.1, betas=(0.9, 1.0 - 1e-12)),
    "adam-decay": lambda p: Adam(p, 0.1, betas=(0.8, 1.0 - 1e-12), weight_decay=3.0),
    "amsgrad": lambda p: Adam(p, 0.1, betas=(0.9, 1.0 - 1e-12), amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.5, betas=(0.9, 1.0 - 1e-12), weight_decay=0.4),
}
METRIC = 3.0
START = 1e-6  # so small that the gradients leave Adam's metric alone


def settled(build: Callable[[list], Optimizer]) -> tuple[Optimizer, nn.Parameter]:
    """An optimizer of one parameter; Adam after so many steps that its metric, 3, stays."""
    parameter = nn.Parameter(torch.tensor(START, dtype=F64))
    optimizer = build([parameter])
    if has_metric(optimizer):
        step = 1e6
        v = (METRIC - 1e-8) ** 2 * (1.0 - optimizer.param_groups[0]["betas"][1] ** step)
        state = {"step": torch.tensor(step), "exp_avg": torch.zeros((), dtype=F64)}
        moments = {name: torch.tensor(v, dtype=F64) for name in ("exp_avg_sq", "max_exp_avg_sq")}
        optimizer.state[parameter] = state | moments
    return optimizer, parameter


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_shrink_below_the_limit_and_grow_above_it(build: Callable[[list], Optimizer]):
    for factor in (0.97, 1.03):
        optimizer, parameter = settled(build)
        metric = metric_of(optimizer, [parameter]) if has_metric(optimizer) else torch.ones(1)
        curvature = factor * stable_sharpness(optimizer) * float(metric) - added_weight_decay(optimizer)
        for _ in range(400):
            parameter.grad = curvature * parameter.detach()
            optimizer.step()
            growth = abs(float(parameter.detach())) / START
            if growth > 1e3:
                break
        assert growth > 1e3 if factor > 1.0 else growth < 1e-2


class Renamed(SGD):
    """May step as it likes."""


@pytest.mark.parametrize(
    "build",
    [lambda p: RMSprop(p), lambda p: Renamed(p, 0.1), lambda p: SGD(p, 0.1, maximize=True)],
    ids=["rmsprop", "subclass", "maximise"],
)
def test_of_other_optimizers_nothing_is_known(build: Callable[[list], Optimizer]):
    assert not is_known(build([nn.Parameter(torch.ones(1))]))


def groups(build: type[Optimizer], first: dict, second: dict) -> Optimizer:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    return build([{"params": [p]} | options for p, options in zip(parameters, (first, second), strict=True)], lr=0.1)


@pytest.mark.parametrize(
    ("build", "options"),
    [(SGD, {"lr": 0.2}), (SGD, {"momentum": 0.5}), (Adam, {"lr": 0.2}), (AdamW, {"betas": (0.8, 0.999)})],
)
def test_there_is_no_one_limit_for_groups_that_differ(build: type[Optimizer], options: dict):
    assert stable_sharpness(groups(build, {}, {})) is not None
    assert stable_sharpness(groups(build, {}, options)) is None


def test_decays_that_differ_are_no_multiple_of_the_identity_but_where_they_are_decoupled():
    decays = ({"weight_decay": 0.0}, {"weight_decay": 0.3})
    assert added_weight_decay(groups(SGD, *decays)) is None
    assert added_weight_decay(groups(Adam, *decays)) is None
    assert added_weight_decay(groups(AdamW, *decays)) == 0.0
    same = groups(AdamW, decays[1], decays[1])
    assert stable_sharpness(groups(AdamW, *decays)) == stable_sharpness(same)


def test_a_rate_of_zero_is_stable_everywhere():
    assert stable_sharpness(SGD([nn.Parameter(torch.ones(1))], 0.0)) == float("inf")


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_metric_divides_the_step_that_adam_takes(amsgrad: bool):
    """With β₁ = 0, a step is −lr g/P of the state after it."""
    parameters = [nn.Parameter(normal(3, 2, seed=0)), nn.Parameter(normal(4, seed=1)), nn.Parameter(torch.ones(2))]
    optimizer = Adam(parameters, 0.1, betas=(0.0, 0.9), eps=1e-2, amsgrad=amsgrad)
    assert metric_of(optimizer, parameters) is None
    for step in range(5):
        for parameter, seed in zip(parameters[:2], itertools.count(10 * step)):
            parameter.grad = (step + 1.0) ** -2 * normal(*parameter.shape, seed=seed)
        before = copy.deepcopy(parameters)
        optimizer.step()
    metric = metric_of(optimizer, parameters)
    assert torch.equal(metric[10:], torch.full((2,), torch.inf))
    steps = torch.cat([(old - new).flatten() for old, new in zip(before, parameters, strict=True)])[:10]
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters[:2]])
    torch.testing.assert_close(steps.detach(), 0.1 * gradients / metric[:10].to(F64), rtol=1e-5, atol=0.0)
