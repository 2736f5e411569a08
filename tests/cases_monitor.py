"""What each process of a test of the monitor runs."""

import ctypes
from functools import partial
from typing import Any

import torch
from cases_buckets import M_MMAP_THRESHOLD, resident, start_peak
from reference import generator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import CurvatureMonitor, Simulated, TreeReduction
from replica_newton.training.datasets import load_dataset
from replica_newton.training.loop import train
from replica_newton.training.run import RunConfig, RunState
from replica_newton.training.watch import CurvatureWatch

SAMPLES = 24


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of a batch."""
    return cross_entropy(module(x), y)


def watched_run(
    rank: int | None,
    count: int,
    *,
    order: int = 4,
    adam: bool = False,
    step: float | None = None,
    plain: bool = False,
    reuse: bool = False,
    dtype: torch.dtype = torch.float32,
    bucket_bytes: int = 25 << 20,
) -> dict[str, Any]:
    """Ten training steps watched by every second call: process `rank` of `count`, or all replicas at once (None)."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    build = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = build(module.parameters(), 0.05)
    topology = Simulated(count) if rank is None else TreeReduction(timeout=60.0, bucket_bytes=bucket_bytes)
    monitor = CurvatureMonitor(
        module,
        optimizer=optimizer,
        rank=order,
        every=2,
        dtype=dtype,
        topology=topology,
        relative_step=step,
        reuse_gradient=reuse,
        seed=3,
    )
    seen, evaluations = [], []
    for i in range(10 * max(order, count) // count):
        x = torch.randn(SAMPLES, 5, generator=generator(i))
        y = torch.randint(3, (SAMPLES,), generator=generator(100 + i))
        share = slice(None) if rank is None else slice(rank * SAMPLES // count, (rank + 1) * SAMPLES // count)
        closure = topology.closure(module, cross_entropy, x[share], y[share])
        optimizer.zero_grad()
        if reuse:
            loss(module, x[share], y[share]).backward()
        evaluated = 0

        def counted(x: Tensor = x[share], y: Tensor = y[share]) -> Tensor:
            nonlocal evaluated
            evaluated += 1
            return loss(module, x, y)

        observation = monitor.observe(counted if plain else closure)
        if observation is not None:
            seen.append(observation)
            evaluations.append(evaluated)
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()  # the same in all processes, as after an all-reduce
        optimizer.step()
    size = sum(p.numel() for p in module.parameters())
    z = torch.randn(size, generator=generator(7))
    return {
        "seen": [vars(one) for one in seen],
        "evaluations": evaluations,
        "eigenvectors": monitor.eigenvectors,
        "hvp": monitor.hvp(z),
        "inverse_hvp": monitor.inverse_hvp(z, 1.0, absolute=True),
        "bytes": {k: v.nbytes for k, v in monitor.subspace.state_dict().items() if isinstance(v, torch.Tensor)},
        "size": size,
    }


def memory(rank: int, count: int, *, elements: int, order: int, **options: Any) -> dict[str, float]:
    """Resident memory that a monitor takes, in floats a parameter; see `test_monitor_memory`."""
    # What is freed goes back at once, or the peak would depend on what the allocator keeps.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    watched_run(
        rank if count > 1 else None, count
    )  # what is imported and mapped by the first probe would count as well
    module = nn.ParameterList([nn.Parameter(torch.ones(elements // 8)) for _ in range(8)])
    data = torch.randn(elements // 8, generator=generator(rank))

    def evaluate() -> Tensor:
        return sum((torch.tanh(parameter) @ data) ** 2 for parameter in module) / elements

    evaluate().backward()
    before = resident()
    topology = TreeReduction() if count > 1 else None
    monitor = CurvatureMonitor(module, rank=order, every=1, topology=topology, **options)
    for _ in range(2):
        monitor.observe(evaluate)
    start_peak()
    for _ in range(2 * order):  # two sweeps, or more
        monitor.observe(evaluate)
    peak, after = resident("VmHWM"), resident()
    return {"kept": (after - before) / elements, "peak": (peak - after) / elements}


def mean_gradient(rank: int, count: int) -> list[str]:
    """One process has a `.grad` that is not that of its own loss: all say so."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3, generator=generator(rank))
    y = torch.zeros(4, dtype=torch.long)
    monitor = CurvatureMonitor(
        module, rank=2, every=1, topology=TreeReduction(timeout=60.0), relative_step=1e-3, reuse_gradient=True
    )
    said = []
    for factor in (0.5 if rank == count - 1 else 1.0, 1.0):
        module.zero_grad()
        (factor * loss(module, x, y)).backward()
        try:
            monitor.observe(partial(loss, module, x, y))
            said.append("seen")
        except ValueError as error:
            said.append(str(error).partition(":")[0])
    return said


def not_finite(rank: int, count: int) -> list[str]:
    """One process has a loss that is not finite: all say so, and go on."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    monitor = CurvatureMonitor(module, rank=2, every=1, topology=TreeReduction(timeout=60.0))
    said = []
    for factor in (1.0, float("nan") if rank == count - 1 else 1.0, 1.0):
        try:
            monitor.observe(lambda factor=factor: factor * module(torch.ones(4, 3)).square().sum())
            said.append("seen")
        except FloatingPointError as error:
            said.append(str(error))
    return said


class Silent:
    """Observer that keeps nothing."""

    def start_run(self, _: str, **__: int) -> None:
        """See `Observer`."""

    def step(self, **_: float | None) -> None:
        """See `Observer`."""

    def finish_epoch(self, **_: float) -> None:
        """See `Observer`."""

    def finish_run(self) -> None:
        """See `Observer`."""


def watched_training(rank: int, count: int) -> tuple[Any, Any, list[Any]]:
    """Parameters after a run that is not watched and after one that is, and what was seen: replicas stand apart."""
    del rank
    seen: list[Any] = []
    config = RunConfig("digits", "paper-common", epochs=2, batch_size=24, replicas=count, topology="tree")
    ends = []
    for watch in (None, CurvatureWatch(2, lambda step, what: seen.append((step, what)))):
        state = RunState(config)
        train(state, load_dataset("digits", train_limit=96), None, Silent(), watch, topology=TreeReduction())
        ends.append(state.model)
    return *ends, seen
