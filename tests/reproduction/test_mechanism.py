"""The ingredients of the paper's step against closed forms: least squares, power laws, made-up spectra."""

import json
import math
from itertools import pairwise

import pytest
import torch
from reference import F64, displacements, normal, orthogonal, symmetric
from torch import nn
from torch.nn.functional import mse_loss

from replica_newton import SecantCurvature
from replica_newton.reproduction.mechanism import (
    captured_fraction,
    count_outliers,
    inverse_curvatures,
    measure_mechanism,
    signal_to_noise,
)
from replica_newton.reproduction.mechanism_lines import crossing
from replica_newton.reproduction.mechanism_overshoot import KINDS, measure_overshoot, overshoot
from replica_newton.reproduction.mechanism_overshoot import displacements as displaced
from replica_newton.reproduction.mechanism_surface import LossSurface, Samples, top_eigenpairs, train_networks
from replica_newton.training.datasets import load_dataset

M, N = 4, 5


def least_squares(samples: int, *, seed: int = 0) -> tuple[LossSurface, Samples, torch.Tensor]:
    """Mean squared error of a linear layer without bias, with its Hessian `2 XᵀX / n`."""
    X, y = normal(samples, N, seed=seed), normal(samples, 1, seed=seed + 1)
    return LossSurface(nn.Linear(N, 1, bias=False), mse_loss, dtype=F64), Samples(X, y), 2 * X.T @ X / samples


# -- the loss surface


def test_gradients_and_hessian_products_of_least_squares():
    surface, samples, H = least_squares(3000)  # several chunks
    points = normal(M, N, seed=2)
    expected = points @ H - 2 * (samples.inputs.T @ samples.targets).T / 3000
    torch.testing.assert_close(surface.gradients(points, [samples]), expected)
    torch.testing.assert_close(surface.hessian(points[0], samples)(points), points @ H)


def test_every_replica_has_its_own_shard():
    surface, samples, _ = least_squares(12)
    points = normal(M, N, seed=2)
    rows = surface.gradients(points, samples.shards(M))
    for m in range(M):
        alone = Samples(samples.inputs[3 * m : 3 * m + 3], samples.targets[3 * m : 3 * m + 3])
        torch.testing.assert_close(rows[m], surface.gradients(points[m : m + 1], [alone])[0])


def test_a_surface_does_not_follow_its_module():
    module = nn.Linear(N, 1)
    surface = LossSurface(module)
    before = surface.point.clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(surface.point, before)


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    digits = load_dataset("digits")
    state = torch.get_rng_state()
    shares: list[float] = []
    first, last = train_networks(digits, activation="tanh", seed=3, steps=(0, 20), tell=shares.append)
    again = train_networks(digits, activation="tanh", seed=3, steps=(20,), tell=shares.append)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert shares == [0.0, 0.0]
    for before, after, repeated in zip(first.parameters(), last.parameters(), again.parameters(), strict=True):
        assert torch.equal(after, repeated)
        assert not torch.equal(before, after)


def test_eigenpairs_of_a_matrix():
    spectrum = torch.cat([torch.tensor([9.0, -7.0, 5.0, 3.0]), torch.linspace(0.5, -0.5, 56)])
    H = symmetric(spectrum, seed=1)
    values, vectors = top_eigenpairs(lambda rows: rows @ H, 60, 4)
    torch.testing.assert_close(values, torch.tensor([9.0, -7.0, 5.0, 3.0], dtype=F64), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(vectors @ H @ vectors.T, values.diag(), rtol=0.0, atol=1e-2)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4, dtype=F64))


# -- (a) signal and noise


def test_signal_of_common_data_is_the_hessian_times_the_displacements():
    surface, samples, H = least_squares(40)
    W = displacements(M, N, seed=3)
    secants = surface.gradients(surface.point + W, [samples])
    signal, noise = signal_to_noise(W @ H, secants)
    assert signal == pytest.approx(float((W @ H).norm()))
    assert noise < 1e-12


def test_signal_and_noise_of_rows_with_a_common_shift():
    signal = displacements(M, N, seed=1)
    noise = displacements(M, N, seed=2)
    shift = normal(N, seed=3)
    seen = signal_to_noise(signal + 2 * shift, signal + noise - shift)
    assert seen == pytest.approx((float(signal.norm()), float(noise.norm())))


def test_noise_falls_with_the_root_of_the_shard_size():
    surface, _, H = least_squares(8)
    W = 0.01 * displacements(M, N, seed=3)
    squares = []
    for size in (10, 160):
        noises = []
        for seed in range(60):
            _, samples, _ = least_squares(M * size, seed=10 * seed)
            noises.append(signal_to_noise(W @ H, surface.gradients(surface.point + W, samples.shards(M)))[1] ** 2)
        squares.append(sum(noises) / len(noises))
    assert math.sqrt(squares[0] / squares[1]) == pytest.approx(4.0, rel=0.15)


def test_local_steps_carry_the_noise_of_their_shards_so_that_its_size_cancels():
    """`‖H W‖/noise = α‖H Δ‖/‖Δ'‖` with Δ and Δ' of one distribution: bounded by α λ_max up to luck, for any shard."""
    surface, _, _ = least_squares(8)
    ratios = []
    for size in (10, 160):
        _, everything, H = least_squares(20_000, seed=7)
        seen = []
        for k in range(30):
            rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(k))
            first, second = rows[: M * size], rows[M * size : 2 * M * size]
            g = surface.gradients(surface.point.expand(M, N), everything.take(first).shards(M))
            W = -0.01 * (g - g.mean(dim=0))
            signal, noise = signal_to_noise(
                W @ H, surface.gradients(surface.point + W, everything.take(second).shards(M))
            )
            seen.append(signal / noise)
        ratios.append(sum(seen) / len(seen))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.15)
    assert ratios[0] == pytest.approx(0.02, rel=0.25)  # H ≈ 2 I, α = 0.01


def test_crossing():
    assert crossing([1.0, 10.0, 100.0], [0.01, 0.1, 10.0]) == pytest.approx(math.sqrt(1000))
    assert crossing([1.0, 10.0], [0.2, 1.0]) == pytest.approx(10.0)
    assert crossing([1.0, 10.0], [0.2, 0.9]) is None
    assert crossing([1.0, 10.0], [2.0, 3.0]) is None


# -- (b) inverse curvature


def test_common_data_give_the_true_inverse_curvature_of_a_quadratic():
    H = symmetric([5.0, 3.0, 1.0, -2.0, 0.1], seed=1)
    W = displacements(M, N, seed=2)
    claimed, true = inverse_curvatures(W, W @ H + normal(N, seed=3), W @ H)
    assert len(claimed) == M - 1
    assert claimed == pytest.approx(true)


def test_inverse_curvatures_follow_the_formula():
    W, G, H = displacements(M, N, seed=1), displacements(M, N, seed=2), symmetric([4.0, 3.0, 2.0, 1.0, 0.5], seed=3)
    _, sigma, Vh = torch.linalg.svd(G.T, full_matrices=False)
    directions = (W.T @ Vh.T)[:, : M - 1]
    claimed, true = inverse_curvatures(W, G, W @ H)
    assert claimed == pytest.approx((directions.norm(dim=0) / sigma[: M - 1]).tolist())
    assert true == pytest.approx((directions.norm(dim=0) / (H @ directions).norm(dim=0)).tolist())


def test_pure_noise_gives_the_step_size():
    rate, size = 0.02, 4000
    W, G = -rate * normal(8, size, seed=1), normal(8, size, seed=2)
    claimed, _ = inverse_curvatures(W - W.mean(dim=0), G, W)
    assert claimed == pytest.approx([rate] * 7, rel=0.15)


# -- (c) overshoot


@pytest.mark.parametrize("kind", KINDS)
def test_equal_eigenvalues_never_overshoot(kind):
    spectrum = torch.ones(30, dtype=F64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        seen = overshoot(spectrum, normal(30, seed=seed), displaced(kind, spectrum, 6, generator))
        assert seen.length <= 1.0
        assert seen.value == pytest.approx(1.0 - seen.length**2)


def test_displacements_along_eigenvectors_take_the_newton_step_there():
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)
    error = torch.tensor([3.0, 4.0, 12.0, 84.0], dtype=F64)
    seen = overshoot(spectrum, error, torch.eye(4, dtype=F64)[:3] - torch.eye(4, dtype=F64)[:3].mean(dim=0))
    # Differences of three eigenvectors span two of the four dimensions: less than Newton's step in three.
    assert seen.length <= 13 / 85
    along = overshoot(spectrum, error, torch.cat((torch.zeros(1, 4, dtype=F64), torch.eye(4, dtype=F64)[:2])))
    assert along.length == pytest.approx(5 / 85)
    assert along.captured_length == pytest.approx(1.0)
    assert along.value == pytest.approx((2 * 144 + 84**2) / (8 * 9 + 4 * 16 + 2 * 144 + 84**2))


def test_random_displacements_overshoot_by_the_root_of_the_dimension():
    """One direction, one dominant eigenvalue with all the error: `‖W v‖/σ · λ = ‖d‖/|d₁|`, of order √N."""
    seen = measure_overshoot(sizes=(400,), exponents=(4.0,), replicas=(2,), seeds=30)
    lengths = {g["displacements"]: g["length"]["median"][0] for g in seen["groups"] if g["error"] == "sharp"}
    assert 20 < lengths["random"] < 45  # √400 / 0.67, the median of |N(0, 1)|
    assert lengths["local"] < 2
    assert lengths["power"] < 2


# -- (d) captured gradient


def test_captured_fraction_grows_with_the_space():
    basis, vector = orthogonal(N, seed=1), normal(N, seed=2)
    shares = [captured_fraction(basis[:k], vector) for k in range(N + 1)]
    assert shares[0] == 0.0
    assert shares[-1] == pytest.approx(1.0)
    assert all(0.0 <= small <= large <= 1.0 + 1e-12 for small, large in pairwise(shares))


def test_the_mean_gradient_is_not_in_the_span_of_centred_gradients_by_construction():
    """But a replica's own gradient is, up to the mean: `g_m = ḡ + G_m`."""
    g = normal(8, 4000, seed=1)
    U = SecantCurvature(normal(8, 4000, seed=2), g).left_singular_vectors
    assert captured_fraction(U, g.mean(dim=0)) < 0.02
    assert captured_fraction(U, g[3]) > 0.8
    assert captured_fraction(U, normal(4000, seed=3)) < 0.02


# -- (e) outliers


@pytest.mark.parametrize("count", [5, 9, 10, 15])
def test_outliers_are_counted_up_to_the_largest_gap(count):
    bulk = [1.0 / (1 + 0.01 * i) for i in range(24 - count)]
    outliers = [(-1) ** i * (60.0 - 2 * i) for i in range(count)]
    assert count_outliers([*outliers, *bulk]) == count


def test_gaps_outside_the_range_do_not_count():
    assert count_outliers([100.0, 10, 9, 8, 7, 6, 5, 2, 1.9, 1.8]) == 7
    assert count_outliers([1.0] * 24) == 5
    with pytest.raises(ValueError, match="too few"):
        count_outliers([3.0, 2.0, 1.0])


# -- all of it


@pytest.fixture(scope="module")
def quick():
    told: list[tuple[str, float]] = []
    seen = measure_mechanism(load_dataset("digits"), quick=True, tell=lambda *progress: told.append(progress))
    return seen, told


def test_quick_measurements_of_digits(quick):
    seen, _ = quick
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen
    assert seen["task"]["dataset"] == "digits"
    assert seen["task"]["parameters"] == 6758
    rate = seen["signal_against_rate"]
    # Linear in α to first order, and never above what the largest eigenvalue allows, as noise and noise are of a size.
    for x, y in zip(rate["rates"], rate["linear"]["median"], strict=True):
        assert y / x == pytest.approx(rate["linear"]["median"][0] / rate["rates"][0])
        assert y < 2 * x * seen["spectrum"]["checkpoints"][-1]["eigenvalues"][0]
    for group in seen["inverse_curvature"]["groups"]:
        assert len(group["true"]) == len(group["claimed"]) == 2 * 7
        assert min(group["true"] + group["claimed"]) > 0
    for kind in ("own", "common", "random"):
        for line in seen["captured"][kind].values():
            assert all(0 <= low <= high <= 1 for low, high in zip(line["low"], line["high"], strict=True))
    assert seen["captured"]["eigenvectors"] == sorted(seen["captured"]["eigenvectors"])
    for checkpoint in seen["spectrum"]["checkpoints"]:
        assert len(checkpoint["eigenvalues"]) == 16
        assert 5 <= checkpoint["outliers"] <= 15


def test_progress_is_told(quick):
    _, told = quick
    assert {what for what, _ in told} == {
        "training",
        "spectrum",
        "signal against rate",
        "signal against shard size",
        "captured gradient",
        "overshoot on quadratics",
    }
    assert all(0.0 <= share <= 1.0 for _, share in told)


def test_same_seed_same_measurements(quick):
    seen, _ = quick
    assert measure_mechanism(load_dataset("digits"), quick=True) == seen
