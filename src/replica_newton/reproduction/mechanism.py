"""Why the paper's step, read literally, does what it does: its ingredients measured one by one."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from replica_newton.curvature import SecantCurvature
from replica_newton.reproduction.mechanism_lines import crossing, median_and_range
from replica_newton.reproduction.mechanism_overshoot import measure_overshoot
from replica_newton.reproduction.mechanism_setting import QUICK, Scale, Setting
from replica_newton.reproduction.mechanism_surface import LossSurface, Samples, top_eigenpairs, train_networks
from replica_newton.spread import LocalStep, RandomDirections
from replica_newton.training.datasets import Dataset
from replica_newton.training.models import Activation

OUTLIER_RANGE = (5, 15)
"""Numbers of outliers between which `count_outliers` looks for the largest gap."""


def signal_to_noise(signal: Tensor, observed: Tensor) -> tuple[float, float]:
    """How much of observed secants is curvature: `‖S‖_F` and `‖G − S‖_F`, of centred rows.

    Args:
        signal: S, `(M, N)`: `H W`, or differences of gradients on common data.
        observed: G, `(M, N)`: gradients of own shards.

    Returns:
        Signal and noise, in units of a gradient. The noise holds the differences between shards, in their gradients
        and in their Hessians.
    """
    signal, observed = signal - signal.mean(dim=0), observed - observed.mean(dim=0)
    return float(signal.norm()), float((observed - signal).norm())


def inverse_curvatures(W: Tensor, G: Tensor, HW: Tensor) -> tuple[list[float], list[float]]:
    """Inverse curvature along every direction `W v_i`: as the paper's step takes it, and the true one.

    Args:
        W: `(M, N)` displacements.
        G: `(M, N)` gradients there, whose right singular vectors are the v_i and singular values the σ_i.
        HW: `(M, N)` products of the Hessian with the rows of W.

    Returns:
        `‖W v_i‖ / σ_i` and `‖W v_i‖ / ‖H W v_i‖`, in units of an inverse Hessian, by σ_i descending.
    """
    curvature = SecantCurvature(W.double(), G.double())
    U = curvature.left_singular_vectors
    # z_⊥ = 0 for the u_i, so their products are the W v_i / σ_i, and with H W for W the H W v_i / σ_i.
    claimed = curvature.inverse_hvp(U).norm(dim=1)
    responses = SecantCurvature(HW.double(), G.double()).inverse_hvp(U).norm(dim=1)
    return claimed.tolist(), (claimed / responses).tolist()


def captured_fraction(basis: Tensor, vector: Tensor) -> float:
    """Share `‖U Uᵀ z‖² / ‖z‖²` of a vector z, `(N,)`, in the span of orthonormal rows `(k, N)`."""
    return float((basis.double() @ vector.double()).square().sum() / vector.double().square().sum())


def count_outliers(eigenvalues: Sequence[float]) -> int:
    """Number of eigenvalues that stand apart: the k in 5 … 15 with the largest ratio `|θ_k| / |θ_(k+1)|`.

    Args:
        eigenvalues: by magnitude descending, more than 5.

    Returns:
        k; the smallest one of equals.

    Raises:
        ValueError: if there are too few eigenvalues.
    """
    low, high = OUTLIER_RANGE
    sizes = [abs(value) for value in eigenvalues]
    if len(sizes) <= low:
        raise ValueError(f"{len(sizes)} eigenvalues are too few; more than {low} are needed")
    ratios = {k: sizes[k - 1] / max(sizes[k], 1e-300) for k in range(low, min(high, len(sizes) - 1) + 1)}
    return max(ratios, key=lambda k: (ratios[k], -k))


_REPLICAS = 8
_SHARD = 32
_BATCH = 256
_RATE = 0.01
"""The paper's rate; the second of `_TWO_RATES` is one at which SGD still trains this network."""
_TWO_RATES = (0.01, 0.3)


def measure_mechanism(
    dataset: Dataset,
    *,
    activation: Activation = "relu",
    seed: int = 0,
    quick: bool = False,
    tell: Callable[[str, float], None] = lambda _what, _share: None,
) -> dict[str, Any]:
    """Signal, curvature, overshoot, captured gradient and spectrum behind the paper's step.

    The reference network is trained by SGD for 600 steps (100 where quick). There M replicas take local steps
    `d_m = −α (g_m − ḡ)` on one batch, and their gradients at `w + d_m` are taken on the next one. Gradients of shards
    and exact Hessian products are in fp32, but for the signal against the rate, which is in fp64.

    Args:
        dataset: the training data.
        activation: of the network.
        seed: of the network and of all that is drawn.
        quick: whether to measure less, in seconds and not minutes.
        tell: is told what is being measured, and the share of it that is done.

    Returns:
        What JSON can hold: `task`, and one entry for each quantity: `signal_against_rate`, `signal_against_shard`,
        `inverse_curvature`, `overshoot`, `captured` and `spectrum`. Where a line has `median`, `low` and `high`, these
        are over batches (over seeds for `overshoot`).

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, sections 2 and 3.
    """
    scale = QUICK if quick else Scale()
    steps = (scale.early_step, scale.steps)
    early, late = train_networks(
        dataset, activation=activation, seed=seed, steps=steps, tell=lambda share: tell("training", share)
    )
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(seed + 1))
    size = scale.reference
    reference, fresh, pool = (
        Samples(dataset.train_inputs[rows], dataset.train_labels[rows])
        for rows in (order[:size], order[size : 2 * size], order[2 * size :])
    )
    surface = LossSurface(late)
    precise = LossSurface(late, dtype=torch.float64)
    setting = Setting(surface, precise, LossSurface(early), reference, fresh, pool, scale, seed)

    spectrum, vectors = _spectrum(setting, {scale.early_step: early, scale.steps: late}, tell)
    against_rate, inverse = _against_rate(setting, tell)
    against_shard = _against_shard(setting, tell)
    captured = _captured(setting, vectors, tell)
    measured = {
        "task": {
            "dataset": dataset.name,
            "activation": activation,
            "parameters": surface.point.numel(),
            "seed": seed,
            "quick": quick,
            "steps": scale.steps,
            "loss": float(surface.loss(surface.point, reference)),
            "reference_samples": len(reference.targets),
        },
        "signal_against_rate": against_rate,
        "signal_against_shard": against_shard,
        "inverse_curvature": inverse,
        "overshoot": measure_overshoot(
            sizes=scale.sizes,
            exponents=(1.0, 2.0),
            replicas=scale.replicas,
            seeds=scale.seeds,
            tell=lambda share: tell("overshoot on quadratics", share),
        ),
        "captured": captured,
        "spectrum": spectrum,
    }
    return {name: _without_nan(of) for name, of in measured.items()}


def _without_nan(value: Any) -> Any:
    """The same lists and dictionaries with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_without_nan(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_order(
    surface: LossSurface, hessian: Callable[[Tensor], Tensor], before: Sequence[Samples], after: Sequence[Samples]
) -> tuple[Tensor, Tensor, float]:
    """Local steps of rate 1 on some shards, `H` times them, and signal over noise, both to first order, on the next."""
    here = surface.point.expand(len(before), -1)
    local = LocalStep().displacements(surface.gradients(here, before), 1.0, 0)
    product = hessian(local)
    noise = surface.gradients(here, after)
    return local, product, float(product.norm() / (noise - noise.mean(dim=0)).norm())


def _against_rate(setting: Setting, tell: Callable[[str, float], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Signal to noise and inverse curvatures of secants at several rates, on the same batches."""
    scale, surface, precise = setting.scale, setting.surface, setting.precise
    hessian = surface.hessian(surface.point, setting.reference)
    early_hessian = setting.early.hessian(setting.early.point, setting.reference.take(torch.arange(scale.spectrum)))
    common = setting.reference.take(torch.arange(scale.secant_samples))
    linear: list[list[float]] = [[] for _ in scale.rates]
    early: list[list[float]] = [[] for _ in scale.rates]
    secant: list[list[float]] = [[] for _ in scale.rates]
    curvatures: list[float] = []
    groups: list[dict[str, Any]] = [
        {"data": data, "rate": rate, "true": [], "claimed": []} for data in ("own", "common") for rate in _TWO_RATES
    ]
    for batch in range(scale.batches):
        drawn = [setting.draw(_REPLICAS, _SHARD, 2 * batch + step) for step in (0, 1)]
        shards = drawn[1]
        local, product, slope = _first_order(surface, hessian, *drawn)
        slope_early = _first_order(setting.early, early_hessian, *drawn)[2]
        curvatures.append(float(product.norm() / local.norm()))
        for i, rate in enumerate(scale.rates):
            tell("signal against rate", (batch + i / len(scale.rates)) / scale.batches)
            points = precise.point + rate * local.double()
            signal, noise = signal_to_noise(precise.gradients(points, [common]), precise.gradients(points, shards))
            secant[i].append(signal / noise)
            linear[i].append(rate * slope)
            early[i].append(rate * slope_early)
        for group in groups:
            W = group["rate"] * local
            samples = shards if group["data"] == "own" else shards[:1]
            G = surface.gradients(surface.point + W, samples)
            claimed, true = inverse_curvatures(W, G, group["rate"] * product)
            group["claimed"] += claimed
            group["true"] += true
    for group in groups:
        group["median_over_rate"] = median(group["claimed"]) / group["rate"]
        group["median_over_true"] = median(c / t for c, t in zip(group["claimed"], group["true"], strict=True))
        group["log_correlation"] = float(torch.corrcoef(torch.tensor([group["claimed"], group["true"]]).log())[0, 1])
    return (
        {
            "replicas": _REPLICAS,
            "shard": _SHARD,
            "rates": list(scale.rates),
            "linear": median_and_range(linear),
            "early_step": scale.early_step,
            "early": median_and_range(early),
            "secant": median_and_range(secant),
            "linear_crossing": crossing(scale.rates, median_and_range(linear)["median"]),
            "secant_crossing": crossing(scale.rates, median_and_range(secant)["median"]),
            "local_step_curvature": median_and_range([curvatures]),
        },
        {"replicas": _REPLICAS, "shard": _SHARD, "groups": groups},
    )


def _against_shard(setting: Setting, tell: Callable[[str, float], None]) -> dict[str, Any]:
    """Signal to noise at the paper's rate, against the number of samples in a shard."""
    scale, surface = setting.scale, setting.surface
    sizes = [size for size in scale.shards if _REPLICAS * size <= len(setting.pool.targets)]
    hessian = surface.hessian(surface.point, setting.reference.take(torch.arange(scale.secant_samples)))
    parts: dict[str, list[list[float]]] = {"ratio": [], "signal": [], "noise": [], "fixed": []}
    unit = 0.0
    for i, size in enumerate(sizes):
        seen: dict[str, list[float]] = {name: [] for name in parts}
        for batch in range(scale.batches):
            tell("signal against shard size", (i + batch / scale.batches) / len(sizes))
            local = LocalStep().displacements(setting.gradients(_REPLICAS, size, 2 * batch), _RATE, 0)
            own = surface.gradients(surface.point + local, setting.draw(_REPLICAS, size, 2 * batch + 1))
            signal, noise = signal_to_noise(hessian(local), own)
            unit = unit or float(local.norm())
            # The signal is linear in the displacements: the same directions, as long as with the smallest shards.
            fixed = signal * unit / float(local.norm()) / noise
            for name, value in zip(parts, (signal / noise, signal, noise, fixed), strict=True):
                seen[name].append(value)
        for name, values in seen.items():
            parts[name].append(values)
    ratios = median_and_range(parts["ratio"])
    return {
        "replicas": _REPLICAS,
        "rate": _RATE,
        "shards": sizes,
        **{name: median_and_range(rows) for name, rows in parts.items()},
        "crossing": crossing(sizes, ratios["median"]),
    }


def _captured(setting: Setting, vectors: Tensor, tell: Callable[[str, float], None]) -> dict[str, Any]:
    """Share of gradients in the span of the secants, against the number of replicas."""
    scale, surface = setting.scale, setting.surface
    fresh = surface.gradients(surface.point[None], [setting.fresh])[0]
    kinds = ("own", "common", "random")
    shares: dict[str, dict[str, list[list[float]]]] = {
        kind: {which: [] for which in ("fresh", "batch", "replica")} for kind in kinds
    }
    for i, M in enumerate(scale.replicas):
        for lists in shares.values():
            for rows in lists.values():
                rows.append([])
        for batch in range(scale.captured_batches):
            tell("captured gradient", (i + batch / scale.captured_batches) / len(scale.replicas))
            before = setting.gradients(M, _BATCH // M, 2 * batch)
            shards = setting.draw(M, _BATCH // M, 2 * batch + 1)
            for kind in kinds:
                spread = RandomDirections(setting.seed) if kind == "random" else LocalStep()
                W = spread.displacements(before, _RATE, batch)
                own = surface.gradients(surface.point + W, shards)
                G = own if kind == "own" else surface.gradients(surface.point + W, shards[:1])
                U = SecantCurvature(W, G).left_singular_vectors
                shares[kind]["fresh"][-1].append(captured_fraction(U, fresh))
                shares[kind]["batch"][-1].append(captured_fraction(U, own.mean(dim=0)))
                shares[kind]["replica"][-1].append(sum(captured_fraction(U, row) for row in own) / M)
    return {
        "replicas": list(scale.replicas),
        "batch": _BATCH,
        "rate": _RATE,
        **{kind: {which: median_and_range(rows) for which, rows in lists.items()} for kind, lists in shares.items()},
        "eigenvectors": [captured_fraction(vectors[: M - 1], fresh) for M in scale.replicas],
    }


def _spectrum(
    setting: Setting, networks: dict[int, torch.nn.Sequential], tell: Callable[[str, float], None]
) -> tuple[dict[str, Any], Tensor]:
    """Top eigenvalues at several checkpoints, and the eigenvectors at the last one, as many as any span needs."""
    scale = setting.scale
    samples = setting.reference.take(torch.arange(scale.spectrum))
    checkpoints = []
    vectors = torch.empty(0)
    for done, (step, network) in enumerate(networks.items()):
        tell("spectrum", done / len(networks))
        surface = LossSurface(network)
        last = done == len(networks) - 1
        count = max(scale.eigenvalues, max(scale.replicas) - 1) if last else scale.eigenvalues
        values, vectors = top_eigenpairs(surface.hessian(surface.point, samples), surface.point.numel(), count)
        eigenvalues = values[: scale.eigenvalues].tolist()
        outliers = count_outliers(eigenvalues)
        gap = abs(eigenvalues[outliers - 1] / eigenvalues[outliers])
        checkpoints.append({"step": step, "eigenvalues": eigenvalues, "outliers": outliers, "gap": gap})
    return {"samples": scale.spectrum, "checkpoints": checkpoints}, vectors
