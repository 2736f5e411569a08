"""Rules for the step side by side: an untuned one and its variants, and peers at several rates, on small tasks.

Runs are kept in `docs/results/step_rules.jsonl`, one a line, and never repeated; `docs/step_rules.md` is written from
them. A run's budget is a number of gradient evaluations, probes and all; rates of peers fall along half a cosine of it.

    python benchmarks/step_rules.py --data FOLDER          # FOLDER holds mnist.npz and cifar10.npz; about an hour
    python benchmarks/step_rules.py --task digits          # a minute, no files needed
    python benchmarks/step_rules.py --write                # the page alone, from the runs there are
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from step_rules_page import Key, Record, best_rate, write_page
from step_rules_tried import RULES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from replica_newton import ReplicaNewton, Simulated
from replica_newton.optim.metric_step import average_weight
from replica_newton.training.datasets import Dataset, load_dataset
from replica_newton.training.loop import batches
from replica_newton.training.models import Activation, reference_convnet

RESULTS = Path("docs/results/step_rules.jsonl")
BENCHMARK = Path("docs/benchmarks/summary.json")
COSTS = (Path("docs/results/metric_cost.json"), Path("docs/results/metric_cost_cuda.json"))
PAGE = Path("docs/step_rules.md")
SEEDS = (0, 1, 2)
SLOPES_EVERY = 10
RISE = 20


@dataclass(frozen=True)
class Task:
    """A network on a data set: `limit` first samples, `epochs` of them, in batches of `batch_size`."""

    data: str
    model: Callable[[Dataset], nn.Module]
    limit: int
    batch_size: int
    epochs: int


def _mlp(_: Dataset) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def _convnet(activation: Activation) -> Callable[[Dataset], nn.Module]:
    return lambda data: reference_convnet(data.input_shape, data.classes, activation=activation)


TASKS = {
    "digits": Task("digits", _mlp, 1437, 256, 40),
    "mnist-relu": Task("mnist", _convnet("relu"), 20480, 256, 3),
    "mnist-tanh": Task("mnist", _convnet("tanh"), 20480, 256, 3),
    "cifar10-relu": Task("cifar10", _convnet("relu"), 20480, 256, 3),
    "mnist-relu-long": Task("mnist", _convnet("relu"), 60000, 256, 5),
    "cifar10-relu-2048": Task("cifar10", _convnet("relu"), 20480, 2048, 8),
}


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of mnist.npz and cifar10.npz")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="may be repeated (default all)")
    parser.add_argument("--rule", choices=list(RULES), action="append", help="may be repeated (default all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds (default %(default)s)")
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    tasks, rules = options.task or list(TASKS), options.rule or list(RULES)
    if not options.write:
        for key in planned(tasks, rules, options.seeds):
            if key not in read():
                record = train(key, data_of(key.task, options.data))
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
                console.print(f"{key.task}, {key.rule} at {key.rate:g}, seed {key.seed}: {record.loss:.4g}")
    costs = [json.loads(one.read_text()) for one in COSTS if one.exists()]
    benchmark = json.loads(BENCHMARK.read_text())["findings"]
    PAGE.write_text(write_page(read(), list(TASKS), RULES, costs, benchmark))


def planned(tasks: list[str], rules: list[str], seeds: int) -> Iterator[Key]:
    """Every rate with the first seed, then the best rate with all others; peers and the default first."""
    for task in tasks:
        for rule in rules:
            yield from (Key(task, rule, rate, 0) for rate in RULES[rule].rates)
    for task in tasks:
        for rule in rules:
            best = best_rate(read(), task, rule)
            if best is not None and RULES[rule].every_seed:
                yield from (Key(task, rule, best, seed) for seed in range(1, seeds))


def read() -> dict[Key, Record]:
    """All runs so far."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    records = [Record(Key(**entry.pop("key")), **entry) for entry in map(json.loads, lines)]
    return {record.key: record for record in records}


_LOADED: dict[tuple[str, int], Dataset] = {}


def data_of(task: str, folder: Path | None) -> Dataset:
    """The data set of a task; a process keeps the last one."""
    name, limit = TASKS[task].data, TASKS[task].limit
    if (name, limit) not in _LOADED:
        _LOADED.clear()
        path = folder if name != "digits" else None
        _LOADED[name, limit] = load_dataset(name, path, train_limit=limit)
    return _LOADED[name, limit]


class Trainer:
    """What a rule may ask for: the gradient of the batch, also by shards, and slopes along the last step."""

    def __init__(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.module, self.inputs, self.targets = module, inputs, targets
        self.parameters = list(module.parameters())
        self.evaluated = 0
        self.shards: list[Tensor] = []
        self._before: list[Tensor] | None = None

    def backward(self, indices: Tensor, shards: int = 1) -> float:
        """Gradient of a batch into `.grad`; `shards` holds those of its parts. Returns the loss."""
        self.module.zero_grad()
        self.evaluated += len(indices)
        self.shards, total, loss = [], torch.zeros(()), 0.0
        for part in indices.chunk(shards):
            part_loss = cross_entropy(self.module(self.inputs[part]), self.targets[part])
            gradients = torch.autograd.grad(part_loss / shards, self.parameters)
            self.shards.append(torch.cat([gradient.flatten() for gradient in gradients]) * shards)
            loss += float(part_loss.detach()) / shards
        total = torch.stack(self.shards).mean(dim=0)
        for parameter, piece in zip(
            self.parameters, torch.split(total, [p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = piece.view_as(parameter)
        return loss

    def step(self, optimizer: ReplicaNewton, indices: Tensor) -> float:
        """Step of an optimizer whose replicas evaluate the batch, and probe it. Returns the loss before."""
        topology = optimizer.topology
        if not isinstance(topology, Simulated):
            raise TypeError(f"replicas must be simulated, got {topology!r}")
        closure = topology.closure(self.module, cross_entropy, self.inputs[indices], self.targets[indices])
        loss = float(optimizer.step(closure))
        self.evaluated += closure.samples_evaluated
        return loss

    def remember(self) -> None:
        """Before a step."""
        self._before = [parameter.detach().clone() for parameter in self.parameters]

    def slopes(self, indices: Tensor, *, counted: bool) -> tuple[float, float] | None:
        """Slopes down the last step, before and after it, on a batch that it has not seen: a paired probe.

        After `backward` on that batch, whose gradients stay; costs one more.

        Returns:
            Both slopes; None before the first step.
        """
        if self._before is None:
            return None
        here = [parameter.detach().clone() for parameter in self.parameters]
        step = torch.cat([(old - new).flatten() for old, new in zip(self._before, here, strict=True)])
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None])
        with torch.no_grad():
            for parameter, old in zip(self.parameters, self._before, strict=True):
                parameter.copy_(old)
        loss = cross_entropy(self.module(self.inputs[indices]), self.targets[indices])
        there = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])
        with torch.no_grad():
            for parameter, new in zip(self.parameters, here, strict=True):
                parameter.copy_(new)
        if counted:
            self.evaluated += len(indices)
        return float(there @ step), float(gradient @ step)


def train(key: Key, data: Dataset) -> Record:
    """One run."""
    task, rule = TASKS[key.task], RULES[key.rule]
    torch.manual_seed(key.seed)
    module = task.model(data)
    trainer = Trainer(module, data.train_inputs, data.train_labels)
    optimizer = rule.make(module.parameters(), key.rate)
    adapt = rule.adapt() if rule.adapt else None
    probing = optimizer if isinstance(optimizer, ReplicaNewton) and optimizer.probes is not None else None
    by_us = rule.averaged and not isinstance(optimizer, ReplicaNewton)
    average = AveragedModel(module, avg_fn=_averaged) if by_us else None
    budget = len(data.train_labels) // task.batch_size * task.batch_size * task.epochs
    start, first, slopes = time.process_time(), math.nan, list[tuple[float, float]]()
    for step, indices in enumerate(_endless(len(data.train_labels), task.batch_size, key.seed)):
        spent = trainer.evaluated / budget
        if spent >= 1.0:
            break
        match rule.schedule:
            case "cosine":
                factor = 0.5 * (1.0 + math.cos(math.pi * spent))
            case "root":
                factor = min((step + 1) / RISE, (RISE / (step + 1)) ** 0.5)
            case "own":
                factor = 1.0
        loss = trainer.backward(indices, rule.shards) if probing is None else trainer.step(probing, indices)
        first = loss if step == 0 else first
        if not loss <= 100.0 * first:
            return _record(key, math.nan, slopes, trainer, start)
        if step and step % SLOPES_EVERY == 0 and 0.25 <= spent <= 0.75 and rule.probes is False and key.seed == 0:
            slopes += [pair for pair in [trainer.slopes(indices, counted=False)] if pair]
        if adapt is not None:
            factor *= adapt(trainer, step, indices, factor)
        for group in optimizer.param_groups:
            group["lr"] = (1.0 if rule.relative else key.rate) * factor
        if probing is None:
            trainer.remember()
            optimizer.step()
        if average is not None:
            average.update_parameters(module)
    with optimizer.averaged() if isinstance(optimizer, ReplicaNewton) and rule.averaged else nullcontext():
        loss = whole_loss(module if average is None else average.module, data)
    return _record(key, loss, slopes, trainer, start)


def _averaged(average: Tensor, point: Tensor, count: Tensor | int) -> Tensor:
    """As the optimizer's own average; `count` points are in it already."""
    return average.lerp(point, average_weight(int(count) + 1))


def _record(key: Key, loss: float, slopes: list[tuple[float, float]], trainer: Trainer, start: float) -> Record:
    before, after = (sum(pair[i] for pair in slopes) for i in (0, 1))
    ratio = (before - after) / before if before else None
    return Record(key, loss, trainer.evaluated, round(time.process_time() - start, 1), ratio)


def whole_loss(module: nn.Module, data: Dataset) -> float:
    """Mean loss over the training set."""
    with torch.no_grad():
        losses = [
            float(cross_entropy(module(x), y, reduction="sum"))
            for x, y in zip(torch.split(data.train_inputs, 1024), torch.split(data.train_labels, 1024), strict=True)
        ]
    return sum(losses) / len(data.train_labels)


def _endless(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    epoch = 0
    while True:
        yield from batches(samples, batch_size, seed, epoch)
        epoch += 1


if __name__ == "__main__":
    main()
