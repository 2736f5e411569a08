"""What a monitor reports, what it costs, and what it leaves alone."""

import copy
import io
from collections.abc import Callable

import networks
import pytest
import torch
from networks import Problem, closure_of, copies, flat, separable_quadratic, trained
from reference import F64, generator, normal
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from replica_newton import CurvatureMonitor, CurvatureObservation

INPUTS, LABELS = normal(24, 5, seed=1).float(), torch.randint(3, (24,), generator=generator(2))


def network(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *layers, nn.Linear(8, 3))


def classification(*layers: nn.Module) -> Problem:
    return Problem(network(*layers), cross_entropy, (INPUTS,), LABELS)


def loss_of(problem: Problem) -> Callable[[], Tensor]:
    return lambda: problem.criterion(problem.module(*problem.inputs), problem.targets)


def watched(monitor: CurvatureMonitor, evaluate: object, probes: int) -> CurvatureObservation:
    for _ in range(probes):
        seen = monitor.observe(evaluate)
    return seen


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors]


def everything(module: nn.Module) -> list[bytes]:
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return [*bits(tensors), *bits([torch.get_rng_state()])]


class Counting(nn.Module):
    """Buffers that a forward pass replaces, or cannot write to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("zeros", torch.zeros(1).expand(8))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.passes = self.passes + 1.0
        return x + self.zeros


@pytest.mark.parametrize("M", [None, 3], ids=["loss", "three-replicas"])
def test_a_probe_leaves_parameters_gradients_buffers_and_random_state_bit_for_bit(M: int | None):
    problem = classification(nn.BatchNorm1d(8), nn.Dropout(0.5), *([Counting()] if M is None else []))
    problem.module[0].bias.requires_grad_(False).fill_(-0.0)
    loss_of(problem)().backward()
    before, storage = everything(problem.module), [p.data_ptr() for p in problem.module.parameters()]
    seen = watched(
        CurvatureMonitor(problem.module, every=1), loss_of(problem) if M is None else closure_of(problem, M), 9
    )
    assert everything(problem.module) == before
    assert [p.data_ptr() for p in problem.module.parameters()] == storage
    assert float(seen.eigenvalues.abs().min()) > 0.0
    loss_of(problem)()  # which does change them
    assert everything(problem.module) != before


def test_an_error_while_probing_leaves_all_as_it_was():
    problem = classification(nn.BatchNorm1d(8), nn.Dropout(0.5))
    monitor = CurvatureMonitor(problem.module, every=1, relative_step=1e-3)
    points: list[Tensor] = []

    def failing() -> Tensor:
        loss = loss_of(problem)()
        points.append(flat(trained(problem.module)))
        if len(points) == 2:
            raise ZeroDivisionError
        return loss

    before = everything(problem.module)
    with pytest.raises(ZeroDivisionError):
        monitor.observe(failing)
    assert everything(problem.module) == before
    assert float((points[1] - points[0]).norm()) == pytest.approx(1e-3 * float(points[0].norm()), rel=1e-3)


def test_a_graph_made_before_a_probe_is_refused():
    """Its parameters have been written to: an error, not a wrong gradient."""
    problem = classification()
    loss = loss_of(problem)()
    CurvatureMonitor(problem.module, every=1).observe(loss_of(problem))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_an_autocast_around_the_call_changes_nothing(grad_mode: Callable):
    problem = classification()
    monitors = [CurvatureMonitor(problem.module, rank=3, every=1) for _ in range(2)]
    for _ in range(9):
        expected = monitors[0].observe(loss_of(problem))
        with torch.autocast("cpu", torch.bfloat16), grad_mode():
            seen = monitors[1].observe(loss_of(problem))
        assert torch.equal(seen.eigenvalues, expected.eigenvalues)
    assert float(seen.sharpness) > 0.1


@pytest.mark.parametrize("reuse", [False, True])
def test_the_casts_that_an_autocast_keeps_are_never_those_of_another_point(reuse: bool):
    problem = classification()
    cast_loss = torch.autocast("cpu", torch.bfloat16)(loss_of(problem))
    expected = cast_loss()
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            monitor = CurvatureMonitor(problem.module, rank=1, every=1, relative_step=0.5, reuse_gradient=reuse)
            assert float(monitor.observe(cast_loss).eigenvalues.abs()) > 1e-3
            assert torch.equal(loss_of(problem)(), expected)


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [({}, 1), ({"relative_step": 1e-3}, 2), ({"relative_step": 1e-3, "reuse_gradient": True}, 1)],
    ids=["exact", "differences", "reused"],
)
def test_a_probe_costs_one_evaluation_or_two_and_the_calls_between_none(options: dict, evaluations: int):
    problem, calls = classification(), 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(problem)()

    monitor = CurvatureMonitor(problem.module, every=3, **options)
    loss_of(problem)().backward()
    for step in range(8):
        seen = monitor.observe(counted)
        compared = 1 if options.get("reuse_gradient") else 0  # once
        assert calls == compared + evaluations * (step // 3 + 1)
        assert (seen is not None) == (step % 3 == 0)
        assert monitor.last.step == step // 3 * 3
        assert seen is None or seen is monitor.last
    assert monitor.steps == 8
    assert monitor.samples_evaluated == 0


def test_a_reused_gradient_gives_the_same_pairs_as_an_evaluated_one():
    problem = classification(nn.BatchNorm1d(8))
    loss_of(problem)().backward()
    seen = [
        watched(
            CurvatureMonitor(problem.module, every=1, relative_step=1e-3, reuse_gradient=reuse), loss_of(problem), 20
        )
        for reuse in (False, True)
    ]
    assert torch.equal(seen[0].eigenvalues, seen[1].eigenvalues)
    assert seen[0].captured_gradient_fraction == seen[1].captured_gradient_fraction


def test_without_a_gradient_there_is_none_to_reuse():
    problem = classification()
    monitor = CurvatureMonitor(problem.module, relative_step=1e-3, reuse_gradient=True)
    with pytest.raises(ValueError, match=r"reuse_gradient=True needs the \.grad that backward leaves, got none"):
        monitor.observe(loss_of(problem))


@pytest.mark.parametrize("factor", [0.99, 2.0, -1.0])
def test_a_gradient_of_another_loss_is_not_reused(factor: float):
    problem = classification()
    (factor * loss_of(problem)()).backward()
    monitor = CurvatureMonitor(problem.module, every=1, relative_step=1e-3, reuse_gradient=True)
    with pytest.raises(ValueError, match=r"needs a \.grad that is the gradient of this loss, got another: averaged"):
        monitor.observe(loss_of(problem))
    assert monitor.last is None


@pytest.mark.parametrize("options", [{}, {"relative_step": 1e-3}, {"relative_step": 1e-3, "reuse_gradient": True}])
def test_samples_are_counted_where_the_replicas_know_them(options: dict):
    problem = classification()
    monitor, closure = CurvatureMonitor(problem.module, every=2, **options), closure_of(problem, 3)
    closure()
    watched(monitor, closure, 5)
    assert monitor.samples_evaluated == 3 * 2 * 24
    assert closure.samples_evaluated == 24  # by the closure itself


@pytest.mark.parametrize("failing", [0, 1], ids=["at-w", "displaced"])
@pytest.mark.parametrize("earlier", [3, 12])
def test_a_gradient_that_is_not_finite_is_an_error_and_leaves_the_space_usable(failing: int, earlier: int):
    problem = classification()
    step = 1e-3 if failing else None
    monitor, undisturbed = (CurvatureMonitor(problem.module, every=1, relative_step=step) for _ in range(2))
    for each in (monitor, undisturbed):
        watched(each, loss_of(problem), earlier)
    factors = iter([1.0] * failing + [float("nan")] + [1.0])
    with pytest.raises(FloatingPointError, match=f"gradient at step {earlier} is not finite"):
        monitor.observe(lambda: next(factors) * loss_of(problem)())
    seen, expected = (watched(each, loss_of(problem), 10) for each in (monitor, undisturbed))
    assert torch.equal(seen.eigenvalues, expected.eigenvalues)
    assert seen.step == expected.step + 1


@pytest.mark.parametrize("M", [2, 6])
def test_the_noise_scale_is_the_variance_of_a_sample_over_the_squared_mean(M: int):
    problem = networks.mlp()
    g = copies(problem, flat(trained(problem.module)).expand(M, -1)).gradients
    mean = sum(g) / M
    variance_of_shards = sum((row - mean) @ (row - mean) for row in g) / (M - 1)
    of_a_sample = 24 / M * variance_of_shards
    expected = of_a_sample / (mean @ mean - variance_of_shards / M)
    seen = CurvatureMonitor(problem.module).observe(closure_of(problem, M))
    assert float(expected) > 0.0
    assert seen.gradient_noise_scale == pytest.approx(float(expected), rel=1e-9)


def test_the_noise_scale_needs_two_replicas_and_is_infinite_without_a_signal():
    problem = separable_quadratic([3.0, 2.0], [0.0, 0.0])
    problem = problem._replace(
        targets=torch.ones(24, 2).to(F64) * torch.tensor([1.0, -1.0]).repeat_interleave(12)[:, None]
    )
    monitor = CurvatureMonitor(problem.module, rank=2, every=1)
    assert monitor.observe(loss_of(problem)).gradient_noise_scale is None
    assert monitor.observe(closure_of(problem, 1)).gradient_noise_scale is None
    assert monitor.observe(closure_of(problem, 2)).gradient_noise_scale == float("inf")


def test_the_captured_fraction_is_that_of_the_projected_mean_gradient():
    problem = networks.mlp()
    monitor = CurvatureMonitor(problem.module, rank=5, every=1)
    assert monitor.observe(closure_of(problem, 4)).captured_gradient_fraction == 0.0
    seen = watched(monitor, closure_of(problem, 4), 5)
    g = flat(torch.autograd.grad(loss_of(problem)(), trained(problem.module)))
    X = monitor.subspace.eigenvectors.to(F64)
    projected = X.T @ torch.linalg.solve(X @ X.T, X @ g)
    assert 0.01 < seen.captured_gradient_fraction < 0.99
    assert seen.captured_gradient_fraction == pytest.approx(float(projected @ projected / (g @ g)), rel=1e-5)


def test_in_the_first_sweep_there_is_no_sharpness():
    problem = classification()
    monitor = CurvatureMonitor(problem.module, rank=3, every=1)
    for seen in (monitor.observe(loss_of(problem)), monitor.observe(loss_of(problem))):
        assert seen.eigenvalues.shape == seen.residuals.shape == (0,)
        assert seen.sharpness != seen.sharpness
        assert seen.learning_rate != seen.learning_rate
    assert monitor.observe(loss_of(problem)).eigenvalues.shape == (3,)


@pytest.mark.parametrize(
    ("curvatures", "sharpness", "rate"),
    [([-5.0, 2.0, 1.0], 2.0, 0.5), ([-3.0, -2.0, -1.0], -1.0, float("nan")), ([0.0, 0.0, 0.0], 0.0, float("nan"))],
)
def test_the_sharpness_is_the_largest_eigenvalue_and_the_rate_its_inverse(
    curvatures: list[float], sharpness: float, rate: float
):
    problem = separable_quadratic(curvatures, [1.0, -2.0, 3.0])
    seen = watched(CurvatureMonitor(problem.module, rank=3, every=1), closure_of(problem, 3), 20)
    assert seen.sharpness == pytest.approx(sharpness, rel=1e-4)
    assert seen.learning_rate == pytest.approx(rate, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("steps", [0, 5, 31])
def test_a_loaded_state_goes_on_bit_for_bit(steps: int):
    problem = classification()
    monitor = CurvatureMonitor(problem.module, every=2)
    watched(monitor, loss_of(problem), steps) if steps else None
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    resumed = CurvatureMonitor(copy.deepcopy(problem.module), every=2, seed=4)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (monitor, resumed):
        watched(each, loss_of(Problem(each._model, *problem[1:])), 20)
    assert resumed.last.step == monitor.last.step
    assert torch.equal(resumed.last.eigenvalues, monitor.last.eigenvalues)
    assert torch.equal(resumed.subspace.eigenvectors, monitor.subspace.eigenvectors)


def test_an_observation_has_an_uncertainty_for_every_pair_once_a_direction_is_probed_for_the_third_time():
    problem = classification()
    monitor = CurvatureMonitor(problem.module, rank=3, every=1)
    assert bool(watched(monitor, closure_of(problem, 3), 2).uncertainties.isinf().all())
    seen = watched(monitor, closure_of(problem, 3), 30)
    assert seen.uncertainties.shape == (3,)
    # Shards of eight samples differ; directions that turn let their differences show, though the batch stays the same.
    relative = float(seen.uncertainties[0]) / seen.sharpness
    assert 0.005 < relative < 0.5
    assert torch.equal(monitor.eigenvectors, monitor.subspace.eigenvectors)


def test_the_state_of_another_rank_is_refused():
    module = network()
    with pytest.raises(ValueError, match=r"state has \(order, N\) = \(4, 75\), the space \(8, 75\)"):
        CurvatureMonitor(module).load_state_dict(CurvatureMonitor(module, rank=4).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"order=0 must be in \[1, 75\], the number of parameters"),
        ({"rank": 76}, r"order=76 must be in \[1, 75\]"),
        ({"every": 0}, "every=0 must be >= 1"),
        ({"smoothing": 0.0}, "smoothing=0.0 must be in"),
        ({"relative_step": 0.0}, r"relative_step=0.0 must be in \(0, 1\)"),
        ({"reuse_gradient": True}, "reuse_gradient=True needs a relative_step"),
        ({"relative_step": float("nan")}, r"relative_step=nan must be in \(0, 1\)"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CurvatureMonitor(network(), **options)


def test_a_model_in_half_precision_or_with_nothing_to_train_is_refused():
    with pytest.raises(TypeError, match=r"parameters must be fp32 or fp64 to be probed, got torch.bfloat16"):
        CurvatureMonitor(network().bfloat16())
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        CurvatureMonitor(network().requires_grad_(False))


def test_more_replicas_than_the_rank_see_the_same_pairs():
    problem = classification()
    shard = problem._replace(inputs=(problem.inputs[0][:4],), targets=problem.targets[:4])
    same = shard._replace(inputs=(shard.inputs[0].repeat(6, 1),), targets=shard.targets.repeat(6))
    few, many = (CurvatureMonitor(problem.module, rank=4, every=1, smoothing=0.3) for _ in range(2))
    seen = watched(few, loss_of(shard), 400), watched(many, closure_of(same, 6), 100)
    torch.testing.assert_close(seen[1].eigenvalues[:2], seen[0].eigenvalues[:2], rtol=1e-3, atol=0.0)


class SquaredOnce(torch.autograd.Function):
    """`x²`, whose gradient cannot be differentiated again, as that of many fused operations."""

    @staticmethod
    def forward(ctx, x):  # noqa: D102
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # noqa: D102
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


def test_what_cannot_be_differentiated_twice_is_an_error_that_names_the_way_out():
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)

    def loss() -> Tensor:
        return SquaredOnce.apply(model.weight).square().sum()

    monitor = CurvatureMonitor(model, every=1, rank=1)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice, relative_step=1e-3 takes differences"):
        monitor.observe(loss)
    monitor = CurvatureMonitor(model, every=1, rank=1, relative_step=1e-6)
    for _ in range(3):
        seen = monitor.observe(loss)
    assert seen.sharpness == pytest.approx(12.0, rel=1e-4)
    assert torch.equal(model.weight, torch.ones(1, 3, dtype=torch.float64))
