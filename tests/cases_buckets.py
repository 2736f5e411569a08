"""What processes do in the tests of buckets, wrapped and sharded modules, and the same in one process."""

import ctypes
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CLASSES, batch, network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from replica_newton import PairedProbes, RandomDirections, ReplicaNewton, Simulated, TreeReduction
from replica_newton.topology import buckets as buckets_module
from replica_newton.topology.buckets import local


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def train(
    rank: int | None,
    count: int,
    *,
    steps: int = 8,
    bucket_bytes: int = 400,
    first_bytes: int = 1 << 20,
    micro_batches: int = 1,
    changed: bool = False,
    dropped: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train with many small buckets, over processes or (rank None) in this one.

    Args:
        rank: of the process, None for all replicas in one.
        count: M.
        steps: of training.
        bucket_bytes: of a bucket.
        first_bytes: of the first, if it is less.
        micro_batches: backward passes in a step.
        changed: whether the closure halves the gradients after the backward pass, and doubles the loss before.
        dropped: whether replica 1 has no gradient in the first layer in every other step.
        options: of the optimizer.

    Returns:
        What a test may want to know.
    """
    module = network(torch.float64)
    buckets_module._FIRST_BUCKET_BYTES = first_bytes
    topology: Any = Simulated(count) if rank is None else TreeReduction(bucket_bytes=bucket_bytes)
    optimizer = ReplicaNewton(module.parameters(), 0.05, topology=topology, **({"rule": "paper"} | options))
    losses, calls = [], []
    for step in range(steps):
        inputs, targets = batch(step, torch.float64)
        if rank is None:
            losses.append(float(optimizer.step(topology.closure(module, cross_entropy, inputs, targets))))
            continue
        inputs, targets = inputs.chunk(count)[rank], targets.chunk(count)[rank]
        started = topology._for_gradients.start_exchange

        def exchange(*arguments: Any) -> Any:
            calls.append((step, arguments[3], inside[0]))  # noqa: B023
            return started(*arguments)  # noqa: B023

        inside = [False]
        topology._for_gradients.start_exchange = exchange

        def closure() -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            pairs = list(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True))  # noqa: B023
            for number, (x, y) in enumerate(pairs):
                hidden = module.first.weight.detach() if dropped and rank == 1 else module.first.weight
                first = nn.functional.linear(x, hidden, module.first.bias)
                logits = module.second(torch.tanh(first)) * module.scale
                loss = cross_entropy(logits, y) / len(pairs) * (2.0 if changed else 1.0)
                inside[0] = True  # noqa: B023
                if changed or number < len(pairs) - 1:
                    with topology.no_sync():
                        loss.backward()
                else:
                    loss.backward()
                inside[0] = False  # noqa: B023
                total += loss.detach()
            if changed:
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= 2.0
            return total / (2.0 if changed else 1.0)

        losses.append(float(optimizer.step(closure)))
        topology._for_gradients.start_exchange = started
    optimizer.synchronise()
    return {
        "losses": losses,
        "parameters": flat(module),
        "calls": calls,
        "sent": dict(topology.elements_sent) if rank is not None else {},
        "buckets": topology.lay_out(list(module.parameters())),
        "groups": [len(group) for group in topology._buckets.groups] if rank is not None else [],
    }


def gradient_changed(rank: int, count: int) -> tuple[str, bool]:
    """What is said to closures with two backward passes or changed gradients, and whether training goes on."""
    module = network(torch.float64)
    topology = TreeReduction()
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
    inputs, targets = (one.chunk(count)[rank] for one in batch(0, torch.float64))

    def twice() -> Tensor:
        for _ in range(2):
            loss = cross_entropy(module(inputs), targets)
            loss.backward()
        return loss

    def halved() -> Tensor:
        loss = cross_entropy(module(inputs), targets)
        loss.backward()
        module.first.weight.grad /= 2.0
        return loss

    said = []
    for closure in (twice, halved):
        before = flat(module)
        try:
            optimizer.step(closure)
        except RuntimeError as error:
            said.append(str(error))
        unchanged = torch.equal(flat(module), before)
    optimizer.step(topology.closure(module, cross_entropy, inputs, targets))
    return "\n".join(said), unchanged and bool(torch.isfinite(flat(module)).all())


def wrapped(rank: int, count: int) -> tuple[list[Tensor], str]:
    """Parameters without DistributedDataParallel and with it, in both ways; what is said to averaged gradients."""
    ends, said = [], ""
    for how in ("plain", "closure", "no_sync", "averaged"):
        module = network(torch.float64)
        del module.unused  # DistributedDataParallel wants a gradient for every parameter
        model = module if how == "plain" else DistributedDataParallel(module)
        topology = TreeReduction()
        optimizer = ReplicaNewton(model.parameters(), 0.05, rule="paper", topology=topology)
        for step in range(4):
            inputs, targets = (one.chunk(count)[rank] for one in batch(step, torch.float64))

            def closure() -> Tensor:
                with model.no_sync() if how == "no_sync" else nullcontext():  # noqa: B023
                    loss = cross_entropy(model(inputs), targets)  # noqa: B023
                    loss.backward()
                return loss

            made = topology.closure(model, cross_entropy, inputs, targets)
            try:
                optimizer.step(made if how in {"plain", "closure"} else closure)
            except RuntimeError as error:
                said = str(error)
                break
        optimizer.synchronise()
        ends.append(flat(module))
    return ends, said


def meshes(rank: int, count: int) -> dict[str, Any]:
    """Replicas of one- and two-dimensional meshes, and what is said to others."""
    line = init_device_mesh("cpu", (count,))
    plane = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("shard", "replicate"))
    unnamed = init_device_mesh("cpu", (2, count // 2))
    said = []
    for options in ({"process_group": dist.group.WORLD, "device_mesh": line}, {"device_mesh": unnamed}):
        try:
            TreeReduction(**options)
        except ValueError as error:
            said.append(str(error))
    one, two = TreeReduction(device_mesh=line), TreeReduction(device_mesh=plane)
    for options in ({"rule": "paper", "spread": RandomDirections()}, {"spread": PairedProbes()}):
        try:
            ReplicaNewton([nn.Parameter(torch.ones(4))], topology=two, **options)
        except ValueError as error:
            said.append(str(error))
    try:  # not sharded at all
        optimizer = ReplicaNewton([nn.Parameter(torch.ones(4))], topology=two)
        optimizer.step(lambda: optimizer.param_groups[0]["params"][0].sum())
    except ValueError as error:
        said.append(str(error))
    number = torch.tensor([float(rank + 1)], dtype=torch.float64)
    return {
        "said": said,
        "line": (one.replicas, one.shards, one.replica, float(one.total(number))),
        "plane": (two.replicas, two.shards, two.replica, float(two.total(number))),
    }


M_MMAP_THRESHOLD = -3
"""Option of glibc's `mallopt`: blocks above this size are mapped, and unmapped when freed."""


def released(rank: int, count: int, *, at: int | None, steps: int = 6) -> dict[str, Any]:
    """Train, and free at some step what is kept to be written to again; what a curvature says when its step is over."""
    module = network(torch.float64)
    topology = TreeReduction(bucket_bytes=400)
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
    said, kept = "", None
    for step in range(steps):
        if step == at:
            optimizer.release()
        inputs, targets = (one.chunk(count)[rank] for one in batch(step, torch.float64))
        optimizer.step(topology.closure(module, cross_entropy, inputs, targets))
        if kept is not None:
            assert len(kept.eigenvalues)
            try:
                said = str(kept.eigenvectors)
            except RuntimeError as error:
                said = str(error)
        kept = optimizer.curvature
    return {"parameters": flat(module), "said": said}


def memory(rank: int, count: int, *, elements: int) -> dict[str, float]:
    """Resident memory that training takes, in floats a parameter; see `test_memory`."""
    # What is freed goes back at once, or the peak would depend on what the allocator keeps.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    module = nn.ParameterList([nn.Parameter(torch.ones(elements // 8)) for _ in range(8)])
    data = torch.randn(elements // 8, generator=torch.Generator().manual_seed(rank))
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=TreeReduction())

    def closure() -> Tensor:
        loss = sum(parameter @ data for parameter in module) / elements
        loss.backward()
        return loss

    closure()
    train(rank, count, steps=2)  # what is imported and mapped by the first step of all would count as well
    before = resident()
    start_peak()
    for _ in range(3):
        optimizer.step(closure)
    peak = resident("VmHWM")
    between = resident()
    optimizer.release()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is nobody's
    after = resident()
    kept = {"state": after, "between steps": between, "peak": peak}
    return {name: (memory - before) / elements for name, memory in kept.items()}


def start_peak() -> None:
    """Have the peak start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(kind: str = "VmRSS") -> float:
    """Resident memory, or its peak, in floats."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024 / 4


class Sharded(nn.Module):
    """Odd sizes, so that shards differ; a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, CLASSES)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.second(torch.tanh(self.first(x)))


def train_sharded(
    rank: int | None, count: int, *, steps: int = 6, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Any]:
    """Two replicas, each sharded over half of the processes, or (rank None) whole and both in this process."""
    torch.manual_seed(0)
    module = Sharded().to(dtype)
    topology: Any = Simulated(2)
    if rank is not None:
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(module, mesh=mesh["shard"])
        topology = TreeReduction(device_mesh=mesh, bucket_bytes=200)
    groups = [
        {"params": [*module.first.parameters(), module.unused]},
        {"params": module.second.parameters(), "lr": 0.02},
    ]
    optimizer = ReplicaNewton(groups, **({"lr": 0.05, "rule": "paper"} | options), topology=topology)
    losses = []
    for step in range(steps):
        inputs, targets = batch(step, dtype)
        if rank is None and optimizer.rule == "metric":
            losses.append(gradient_of_shards(module, inputs.chunk(count), targets.chunk(count)))
            optimizer.step()
            continue
        if rank is not None:
            inputs, targets = inputs.chunk(count)[rank], targets.chunk(count)[rank]
        losses.append(float(optimizer.step(topology.closure(module, cross_entropy, inputs, targets))))
    optimizer.synchronise()
    with optimizer.averaged():
        averaged = whole(module)
    return {
        "losses": losses,
        "parameters": whole(module),
        "averaged": averaged,
        "eigenvalues": None if optimizer.curvature is None else optimizer.curvature.eigenvalues,
        "local": sum(local(one).numel() for one in module.parameters()),
        "state": {one.dtype for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)},
    }


def gradient_of_shards(module: nn.Module, inputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> float:
    """Leave the mean gradient in `.grad`, rounded as replicas of two shards each round it; the mean loss."""
    losses, gradients = [], []
    for x, y in zip(inputs, targets, strict=True):
        losses.append(cross_entropy(module(x), y))
        gradients.append(torch.autograd.grad(losses[-1], list(module.parameters()), materialize_grads=True))
    for parameter, *of in zip(module.parameters(), *gradients, strict=True):
        replicas = [(first + second) / 2 for first, second in zip(of[::2], of[1::2], strict=True)]
        parameter.grad = torch.stack(replicas).mean(dim=0)
    return float(torch.stack(losses).detach().mean())


def whole(module: nn.Module) -> Tensor:
    """All parameters, sharded or not."""
    gather = [getattr(one, "full_tensor", one.detach) for one in module.parameters()]
    return torch.cat([values().detach().flatten().clone() for values in gather])
