"""LeCun's optimal rate, 1/λ_max: loss after a fixed number of steps against the rate, λ_max measured by replicas."""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton.monitor import CurvatureMonitor
from replica_newton.reproduction.sharpness import Criterion, exact_sharpness, replica_sharpness
from replica_newton.topology import Simulated
from replica_newton.training.datasets import Dataset
from replica_newton.training.models import Activation, reference_convnet

__all__ = ["MULTIPLES", "SETTINGS", "descend", "measure_optimal_rate"]

SETTINGS: tuple[str, ...] = ("full_batch", "minibatch")
REPLICAS = 8
WARM_UP_RATE, WARM_UP_MOMENTUM = 0.05, 0.9
MULTIPLES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 2**-0.5, 1.0, 2**0.5, 2.0, 2**1.5, 4.0, 2**2.5, 8.0)
"""Rates that are tried, in units of 1/λ_max."""

_MONITOR_PROBES = 12
_ROUNDING = 1.0 + 1e-6  # of a loss in fp32, relative

Batch = tuple[Tensor, Tensor]
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class _Effort:
    """How much is computed: all counts are of samples or steps."""

    samples: int
    batch: int
    warm_up_steps: int
    full_batch_steps: int
    minibatch_steps: int
    multiples: tuple[float, ...]
    end_multiples: tuple[float, ...]  # of which the sharpness at the end is measured as well


_FULL = _Effort(1024, 256, 200, 40, 100, MULTIPLES, (0.5, 1.0, 2.0, 4.0))
_QUICK = _Effort(256, 128, 150, 15, 25, (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0), (1.0,))


def descend(model: nn.Module, criterion: Criterion, batches: Iterable[Batch], rate: float) -> list[float]:
    """Losses of plain gradient descent, `w ← w − rate · ∇L`, one step a batch.

    Args:
        model: is trained.
        criterion: loss of `(model(inputs), targets)`.
        batches: inputs and targets of every step.
        rate: positive.

    Returns:
        The loss of every batch before its step; the first one that is not finite is the last.

    Raises:
        ValueError: if the rate is not positive and finite.
    """
    if not 0.0 < rate < math.inf:
        raise ValueError(f"{rate=} must be positive and finite")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for inputs, targets in batches:
        with torch.enable_grad():
            loss = criterion(model(inputs), targets)
            gradients = torch.autograd.grad(loss, parameters)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    return losses


def _say_nothing(message: str, done: float) -> None:
    """Nobody listens."""


def measure_optimal_rate(
    dataset: Dataset,
    *,
    activation: Activation = "relu",
    seeds: Sequence[int] = (0, 1, 2),
    quick: bool = False,
    tell: Tell = _say_nothing,
) -> dict[str, Any]:
    """Loss after a fixed number of steps against the rate, around the rate 1/λ_max that replicas measure.

    SGD with momentum trains the reference network off its initial plateau. There eight replicas measure λ_max on a
    fixed subset of the training set, and from there plain descent starts at rates from 1/32 to 8 times 1/λ_max:
    `full_batch` on the subset, to which the theory applies, and `minibatch` on batches of the whole training set, the
    same ones at every rate. The loss is that of the subset in both. For a quadratic with one eigenvalue, 1/λ_max
    reaches the minimum in one step; with many, any rate below 2/λ_max converges and any above diverges.

    Off the plateau, because on it the displacements of a ReLU network cross more kinks than its small Hessian weighs:
    there replicas see several times the exact value.

    Args:
        dataset: whose first training samples (1,024; quick: 256) are the subset.
        activation: of the reference network.
        seeds: of the initial parameters and of the batches, one run each.
        quick: fewer steps, samples and rates, to see that all works.
        tell: is told what begins, and the fraction that is done.

    Returns:
        A dictionary for JSON. `runs` has one entry a seed: `start_loss`; `sharpness` with `replicas` and `exact`, each
        `value`, `residual` and `rounds`, and `monitor`, what a `CurvatureMonitor` with replicas on own shards reports;
        and for either setting a list with `multiple` (of 1/λ_max of the replicas), `rate`, `loss` at the end and
        `relative` to the start, None where it is not finite. Under full batch also `peak`, the largest loss on the way
        relative to the start (None as before); `rises`, whether any step raised the loss; and for some rates
        `end_sharpness`, by replicas. `summary` has for either setting, one number a seed, in multiples:
        `best`; `at_optimal_rate`, the relative loss at 1/λ_max, and `at_best`; `worse_from`, from which on all runs
        end above their start; and under full batch `rises_from`, from which on all have steps that raise the loss.

    Raises:
        ValueError: if there are no seeds or one is repeated, the activation is unknown, or the training set is smaller
            than a batch; if the network has learned its samples so well that loss or λ_max is 0.

    Source:
        LeCun, Simard and Pearlmutter (1993); LeCun, Bottou, Orr and Müller (1998), Efficient BackProp, section 5;
        proposed for replicas by Arnold and Wang (2017), arXiv 1709.05069.
    """
    effort = _QUICK if quick else _FULL
    size = len(dataset.train_labels)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{seeds=} must hold at least one seed, and none twice")
    if size < effort.batch:
        raise ValueError(f"the training set must hold a batch of {effort.batch} samples, got {size}")
    samples = min(effort.samples, size // REPLICAS * REPLICAS)
    runs = []
    for index, seed in enumerate(seeds):

        def tell_of_seed(message: str, done: float, index: int = index, seed: int = seed) -> None:
            tell(f"seed {seed}: {message}", (index + done) / len(seeds))

        runs.append(_measure_seed(dataset, activation, seed, effort, samples, tell_of_seed))
    tell("done", 1.0)
    return {
        "dataset": dataset.name,
        "activation": activation,
        "replicas": REPLICAS,
        "samples": samples,
        "batch": effort.batch,
        "steps": {"full_batch": effort.full_batch_steps, "minibatch": effort.minibatch_steps},
        "warm_up": {"steps": effort.warm_up_steps, "rate": WARM_UP_RATE, "momentum": WARM_UP_MOMENTUM},
        "multiples": sorted(effort.multiples),
        "runs": runs,
        "summary": {setting: _summarise([run[setting] for run in runs]) for setting in SETTINGS},
    }


def _measure_seed(
    dataset: Dataset, activation: Activation, seed: int, effort: _Effort, samples: int, tell: Tell
) -> dict[str, Any]:
    """Checkpoint, sharpness and descents of one seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(
        len(dataset.train_labels), (effort.warm_up_steps + effort.minibatch_steps, effort.batch), generator=generator
    )
    drawn = [(dataset.train_inputs[rows], dataset.train_labels[rows]) for rows in order]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = reference_convnet(dataset.input_shape, dataset.classes, activation=activation)
    tell("training to the checkpoint", 0.0)
    optimizer = torch.optim.SGD(model.parameters(), WARM_UP_RATE, momentum=WARM_UP_MOMENTUM)
    for inputs, labels in drawn[: effort.warm_up_steps]:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    inputs, labels = dataset.train_inputs[:samples], dataset.train_labels[:samples]
    tell("measuring the sharpness", 0.05)
    sharpness = _sharpness(model, inputs, labels)
    top = sharpness["replicas"]["value"]
    start = _loss(model, inputs, labels)
    if not min(start, top) > 0.0:
        raise ValueError(f"loss and λ_max at the checkpoint must be > 0, got {start:g} and {top:g}: nothing to descend")
    run: dict[str, Any] = {"seed": seed, "start_loss": start, "sharpness": sharpness}
    descents = {"full_batch": [(inputs, labels)] * effort.full_batch_steps, "minibatch": drawn[effort.warm_up_steps :]}
    done, total = 0, len(SETTINGS) * len(effort.multiples)
    for setting, batches in descents.items():
        run[setting] = []
        for multiple in sorted(effort.multiples):
            tell(f"{setting.replace('_', ' ')}, {multiple:.2g}/λ_max", 0.2 + 0.8 * done / total)
            trained = copy.deepcopy(model)
            losses = descend(trained, cross_entropy, batches, multiple / top)
            end = _finite(_loss(trained, inputs, labels))
            entry = {"multiple": multiple, "rate": multiple / top, "loss": end, "relative": end and end / start}
            if setting == "full_batch":
                losses.append(math.inf if end is None else end)
                entry["peak"] = _finite(max(losses) / start)
                entry["rises"] = any(after > before * _ROUNDING for before, after in pairwise(losses))
                if multiple in effort.end_multiples and end is not None:
                    found = replica_sharpness(trained, cross_entropy, inputs, labels)
                    entry["end_sharpness"] = found.value
            run[setting].append(entry)
            done += 1
    return run


def _sharpness(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Sharpness at the checkpoint, by replicas, exactly, and as a monitor with own shards sees it."""
    monitor = CurvatureMonitor(model, rank=REPLICAS, every=1)
    closure = Simulated(REPLICAS).closure(model, cross_entropy, inputs, labels)
    for _ in range(_MONITOR_PROBES):
        monitor.observe(closure)
    found = {
        "replicas": replica_sharpness(model, cross_entropy, inputs, labels),
        "exact": exact_sharpness(model, cross_entropy, inputs, labels),
    }
    return {name: asdict(one) for name, one in found.items()} | {
        "monitor": monitor.last.sharpness if monitor.last is not None else None
    }


def _summarise(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Where the best rate and the limits of stability lie, one number a seed, and the median of the best."""
    summary: dict[str, Any] = {"best": [], "at_best": [], "at_optimal_rate": [], "worse_from": []}
    for run in runs:
        best = min(run, key=lambda entry: math.inf if entry["relative"] is None else entry["relative"])
        summary["best"].append(best["multiple"])
        summary["at_best"].append(best["relative"])
        summary["at_optimal_rate"].append(next(entry["relative"] for entry in run if entry["multiple"] == 1.0))
        summary["worse_from"].append(_onset(run, lambda entry: entry["relative"] is None or entry["relative"] > 1.0))
        if "rises" in run[0]:
            summary.setdefault("rises_from", []).append(_onset(run, lambda entry: bool(entry["rises"])))
    return summary | {"median_best": statistics.median(summary["best"])}


def _onset(run: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> float | None:
    """Smallest multiple from which on something holds for all larger ones; None if it does not for the largest."""
    onset = None
    for entry in reversed(run):
        if not holds(entry):
            break
        onset = entry["multiple"]
    return onset


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(cross_entropy(model(inputs), labels))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
