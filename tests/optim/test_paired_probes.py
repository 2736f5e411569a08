"""Newton's step along what replicas find, the metric's elsewhere."""

import copy
import logging
import pickle
from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, closure_of, flat, train, trained
from reference import normal
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from replica_newton import LocalStep, PairedProbes, ReplicaNewton, Simulated
from replica_newton.optim.metric import MetricName
from replica_newton.optim.paired_probes import FIRST_STEP

METRICS = ("identity", "diagonal", "kronecker")


def optimizer_of(problem: Problem, probes: PairedProbes | None = None, M: int = 4, **options: object) -> ReplicaNewton:
    return ReplicaNewton(problem.module.parameters(), topology=Simulated(M), spread=probes, **options)


def dense_hessian(problem: Problem) -> Tensor:
    """Of the whole batch, `(N, N)`."""
    names, values = zip(*problem.module.named_parameters(), strict=True)
    sizes, shapes = [value.numel() for value in values], [value.shape for value in values]

    def gradient(point: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(point.split(sizes), shapes, strict=True)]

        def loss(pieces: list[Tensor]) -> Tensor:
            outputs = functional_call(problem.module, dict(zip(names, pieces, strict=True)), problem.inputs)
            return problem.criterion(outputs, problem.targets)

        return torch.cat([g.flatten() for g in torch.func.grad(loss)(pieces)])

    return torch.func.jacrev(gradient)(flat(values).detach())


def scaling(optimizer: ReplicaNewton, power: float, least: float = 0.0) -> Tensor:
    """D^power of the metric, `(N, N)`."""
    step = optimizer.metric_step
    assert step is not None
    blocks = []
    for p in trained_of(optimizer):
        eye = torch.eye(p.numel(), dtype=p.dtype)
        blocks.append(torch.stack([step.metric.scaled(optimizer.state[p], row, power, least) for row in eye]))
    return torch.block_diag(*blocks)


def trained_of(optimizer: ReplicaNewton) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("relative_step", [None, 1e-4], ids=["exact", "differences"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_eigenvalues_are_those_of_the_hessian_in_the_metric(metric: MetricName, relative_step: float | None):
    # Where nobody moves, gradients and with them the metric stay as they are. All replicas hold the same samples.
    problem = networks.mlp()
    problem = problem._replace(inputs=(problem.inputs[0][:6].repeat(4, 1),), targets=problem.targets[:6].repeat(4, 1))
    probes = PairedProbes(every=1, rank=3, smoothing=0.5, relative_step=relative_step)
    optimizer = optimizer_of(problem, probes, lr=0.0, metric=metric)
    train(optimizer, problem, FIRST_STEP + 60)
    contraction = scaling(optimizer, -0.5, probes._least)
    expected = torch.linalg.eigvalsh(contraction @ dense_hessian(problem) @ contraction)
    expected = expected[expected.abs().argsort(descending=True)][:3]
    # Values of nearly equal size, of which one is negative, are hardly told apart: the largest are enough.
    torch.testing.assert_close(probes.eigenvalues[0][:2], expected[:2], rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_powers_of_a_metric_are_those_of_one_matrix(metric: MetricName):
    problem = networks.convnet()
    optimizer = optimizer_of(problem, metric=metric)
    train(optimizer, problem, 12)
    root, inverse, whole = (scaling(optimizer, power) for power in (0.5, -0.5, 1.0))
    eye = torch.eye(len(root), dtype=root.dtype)
    torch.testing.assert_close(root @ inverse, eye, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(root @ root, whole)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(scaling(optimizer, 1.0, 1e3), 1e3 * eye)
    assert float(torch.linalg.eigvalsh(whole).min()) > 0.0


@pytest.mark.parametrize("growth", [1.0, 4.0])
@pytest.mark.parametrize("blocks", ["all", "tensor"])
def test_the_step_is_newtons_along_the_pairs_and_the_metrics_elsewhere(blocks: str, growth: float):
    problem = networks.mlp()
    probes = PairedProbes(every=1, rank=2, blocks=blocks, growth=growth, relative_step=1e-4)
    optimizer = optimizer_of(problem, probes)
    train(optimizer, problem, FIRST_STEP + 20)
    step = optimizer.metric_step
    assert step is not None
    parameters = trained_of(optimizer)
    states = [optimizer.state[p] for p in parameters]
    units = [normal(*p.shape, seed=place) for place, p in enumerate(parameters)]
    rate = 0.3
    bent = flat(probes.bent(step.metric, states, units, rate))

    vectors, ratios = [], []
    for space in probes._spaces:
        vectors.append(space.eigenvectors.double())
        known = space.uncertainties <= 0.5 * space.eigenvalues.abs()
        newton = (1.0 / (space.eigenvalues.abs() * rate)).clamp_max(growth)
        ratios.append(torch.where(known, newton, 1.0))
    X, ratio = torch.block_diag(*vectors), torch.cat(ratios)
    assert bool((ratio != 1.0).any())
    eye = torch.eye(X.shape[1], dtype=X.dtype)
    inside = eye + X.T @ torch.diag(ratio - 1.0) @ X
    expected = scaling(optimizer, -0.5, probes._least) @ inside @ scaling(optimizer, 0.5, probes._least) @ flat(units)
    torch.testing.assert_close(bent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["identity", "diagonal"])
def test_curvature_takes_a_stiff_problem_further_than_the_metric_alone(metric: MetricName):
    # A linear model on all of its samples; four directions are up to a thousand times sharper than the rest.
    scales = torch.tensor([30.0, 20.0, 14.0, 10.0] + [1.0] * 26, dtype=torch.float64)
    inputs, true = normal(240, 30, seed=1) * scales, normal(30, 1, seed=2)
    ends = []
    for probes in (None, PairedProbes(every=5, relative_step=1e-3, rank=6)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Linear(30, 1, bias=False).double()
        problem = Problem(module, mse_loss, (inputs,), inputs @ true)
        optimizer = optimizer_of(problem, probes, metric=metric, M=8)
        spent = 0
        while spent < 400 * len(inputs):
            closure = closure_of(problem, 8)
            optimizer.step(closure)
            spent += closure.samples_evaluated
        with optimizer.averaged(), torch.no_grad():
            ends.append(float(mse_loss(module(inputs), problem.targets)))
    assert ends[1] < 0.5 * ends[0]


def test_there_is_a_probe_every_so_many_steps_after_the_first_ones_and_it_counts():
    for relative_step, gradients in ((3e-3, 2), (None, 3)):
        problem = networks.mlp()
        probes = PairedProbes(every=4, relative_step=relative_step)
        optimizer = optimizer_of(problem, probes)
        counts = []
        for _ in range(FIRST_STEP + 9):
            closure = closure_of(problem, 4)
            optimizer.step(closure)
            counts.append(closure.samples_evaluated // 24)
        assert counts == [1] * FIRST_STEP + [gradients, 1, 1, 1] * 2 + [gradients]
        assert probes.taken == 3


def test_without_a_probe_steps_are_those_of_the_metric():
    ends = []
    for probes in (None, PairedProbes(every=1000)):
        problem = networks.convnet()
        ends.append(train(optimizer_of(problem, probes), problem, 30).parameters)
    assert torch.equal(*ends)


@pytest.mark.parametrize("problem", networks.BATCHABLE, ids=lambda build: build.__name__)
@pytest.mark.parametrize("blocks", ["all", "group", "tensor"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_every_network_descends(problem: Callable[[], Problem], blocks: str):
    one = problem()
    optimizer = optimizer_of(one, PairedProbes(every=2, rank=4, blocks=blocks), M=2)
    losses = train(optimizer, one, 60).losses
    assert bool(losses.isfinite().all())
    assert losses[-1] < 0.97 * losses[0]
    assert losses.max() < 2.0 * losses[0]
    assert optimizer.probes is not None
    assert optimizer.probes.taken == 20


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
def test_a_probe_draws_the_random_numbers_of_the_step_and_leaves_no_trace(batched: bool):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    problem = Problem(module, mse_loss, (normal(24, 3, seed=1),), normal(24, 1, seed=2))
    closure = closure_of(problem, Simulated(4, batched=batched))
    parameters = trained(module)
    points = flat(parameters).expand(4, -1).clone()
    torch.manual_seed(3)
    first = closure.gradients(parameters, points).gradients
    buffers, state = [buffer.clone() for buffer in module.buffers()], torch.get_rng_state()
    again = closure.gradients_again(parameters, points)
    assert torch.equal(again, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(module.buffers(), buffers, strict=True))
    assert not torch.allclose(closure.gradients(parameters, points).gradients, first), "other numbers, other gradients"
    closure.restore()
    assert all(torch.equal(*pair) for pair in zip(module.buffers(), buffers, strict=True))


def test_maximizing_is_minimizing_the_negative():
    ends = []
    for sign in (1.0, -1.0):
        problem = networks.mlp()
        problem = problem._replace(criterion=lambda y, t, sign=sign: sign * mse_loss(y, t))
        optimizer = optimizer_of(problem, PairedProbes(every=2), maximize=sign < 0.0)
        ends.append(train(optimizer, problem, 40).parameters)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_groups_are_blocks_of_their_own():
    problem = networks.mlp()
    first, second = [list(layer.parameters()) for layer in (problem.module[0], problem.module[2])]
    probes = PairedProbes(every=1, blocks="group")
    optimizer = ReplicaNewton([{"params": first}, {"params": second, "lr": 0.5}], topology=Simulated(4), spread=probes)
    train(optimizer, problem, FIRST_STEP + 4)
    assert [len(values) for values in probes.eigenvalues] == [8, 5]
    problem.module[0].requires_grad_(False)
    train(optimizer, problem, 4)
    assert [len(values) for values in probes.eigenvalues] == [5]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_with_the_same_bits(way: str):
    problem = networks.mlp()
    optimizer = optimizer_of(problem, PairedProbes(every=3, blocks="tensor"))
    train(optimizer, problem, 33)
    other = copy.deepcopy(problem)
    if way == "state_dict":
        theirs = optimizer_of(other, PairedProbes(every=3, blocks="tensor"))
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (problem.module, optimizer)
        module, theirs = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))  # noqa: S301
        other = other._replace(module=module)
    assert torch.equal(train(optimizer, problem, 20).parameters, train(theirs, other, 20).parameters)
    assert theirs.probes is not None
    assert theirs.probes.taken == 11


def test_a_state_of_another_rank_is_refused_and_changes_nothing():
    problem = networks.mlp()
    small, large = PairedProbes(every=1, rank=2), PairedProbes(every=1, rank=4)
    for probes in (small, large):
        train(optimizer_of(problem, probes), problem, FIRST_STEP + 3)
    before = large.eigenvalues[0].clone()
    with pytest.raises(ValueError, match=r"the state is of PairedProbes\(rank=2\), got rank=4"):
        large.load_state_dict(small.state_dict())
    assert torch.equal(large.eigenvalues[0], before)
    assert large.taken == 3


def test_a_state_of_other_replicas_begins_anew(caplog: pytest.LogCaptureFixture):
    problem = networks.mlp()
    four = optimizer_of(problem, PairedProbes(every=1))
    train(four, problem, FIRST_STEP + 5)
    two = optimizer_of(problem, PairedProbes(every=1), M=2)
    two.load_state_dict(copy.deepcopy(four.state_dict()))
    train(two, problem, 1)
    assert "what probes had learnt was of other blocks or replicas: they begin anew" in caplog.text
    assert two.probes is not None
    assert two.probes.taken == 6
    assert len(two.probes.eigenvalues[0]) == 0
    train(two, problem, 6)
    assert len(two.probes.eigenvalues[0]) == 8


@pytest.mark.parametrize("topology", [Simulated(2), None], ids=repr)
def test_half_precision_is_refused(topology: Simulated | None):
    module = nn.Linear(3, 1).to(torch.bfloat16)
    optimizer = ReplicaNewton(module.parameters(), spread=PairedProbes(), topology=topology)
    inputs, targets = torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"parameters must be fp32 or fp64 to be probed, got torch\.bfloat16"):
        optimizer.step((topology or Simulated(1)).closure(module, mse_loss, inputs, targets))


def test_a_probe_that_is_not_finite_is_dropped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    problem = networks.mlp()
    probes = PairedProbes(every=1)
    optimizer = optimizer_of(problem, probes)
    train(optimizer, problem, FIRST_STEP + 4)
    before = probes.eigenvalues[0]
    closure = closure_of(problem, 4)
    monkeypatch.setattr(closure, "gradients_again", lambda _, points: torch.full_like(points, torch.nan))
    with caplog.at_level(logging.WARNING):
        assert float(optimizer.step(closure)) > 0.0
    assert "probe 4 is dropped: a gradient beside the parameters is not finite" in caplog.text
    assert torch.equal(probes.eigenvalues[0], before)
    assert bool(train(optimizer, problem, 5).parameters.isfinite().all())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"every": 0}, "every=0 must be >= 1"),
        ({"rank": 0}, "rank=0 must be >= 1"),
        ({"growth": 0.5}, "growth=0.5 must be >= 1"),
        ({"blocks": "layer"}, "blocks='layer' must be one of all, group, tensor"),
        ({"smoothing": 0.0}, r"smoothing=0.0 must be in \(0, 1\]"),
        ({"relative_step": 1.0}, r"relative_step=1.0 must be in \(0, 1\), or None"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        PairedProbes(**option)


def test_probes_need_the_rule_metric_and_a_closure_of_the_topology():
    problem = networks.mlp()
    with pytest.raises(ValueError, match="is for rule='metric', got rule='paper'"):
        optimizer_of(problem, PairedProbes(), rule="paper")
    with pytest.raises(ValueError, match=r"spread=.* has no meaning for rule='metric'"):
        optimizer_of(problem, LocalStep())
    optimizer = optimizer_of(problem, PairedProbes(), M=1)

    def plain() -> Tensor:
        raise AssertionError

    with pytest.raises(TypeError, match=r"needs a closure of topology\.closure"):
        optimizer.step(plain)
    closure_of(problem, 1)()
    assert optimizer.step() is None, "gradients that are there are a step without a probe"
