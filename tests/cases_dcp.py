"""What processes do in the tests of torch.distributed.checkpoint; a module of its own, for DCP is slow to import."""

from pathlib import Path
from typing import Any, NamedTuple

import cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases_buckets import whole
from cases_checkpoints import RATE, processes, vector
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from replica_newton import ReplicaNewton, TreeReduction, save_checkpoint
from replica_newton.checkpoints import ReplicaState


class Stage(NamedTuple):
    """What one process has to say of a part of a run."""

    loaded: Tensor
    end: Tensor | None = None
    refused: str = ""
    rate: float = 0.0
    step: int = 0


def stage(
    topology: Any,
    folder: Path,
    steps: range,
    *,
    load: bool,
    partial: bool = False,
    scaled: bool = True,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> Stage:
    """Train, from a checkpoint of DCP or not, and save one at the end."""
    module: Any = cases.network(torch.float64, seed=int(load))
    if not scaled:
        del module.scale  # parameters of no dimension cannot be sharded
        module.scale = 1.3
    if mesh is not None:
        fully_shard(module, mesh=mesh["shard"])
    options = {"rule": "paper"} | options
    optimizer = ReplicaNewton(module.parameters(), 0.5 if load else RATE, topology=topology, **options)
    if load:
        state = {"model": module.state_dict(), "optimizer": ReplicaState(optimizer)}
        dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True) if partial else None)
        module.load_state_dict(state["model"])
    elif topology.replicas == topology.layout.processes and optimizer.rule == "paper":
        # On a fresh optimizer this takes a step without gradients at a rate of 0, which must not count.
        before = vector(module)
        get_optimizer_state_dict(module, optimizer)
        assert torch.equal(vector(module), before)
        assert optimizer.param_groups[0]["lr"] == RATE
    loaded = whole(module)

    def save(step: int) -> None:
        del step
        dcp.save({"model": module.state_dict(), "optimizer": ReplicaState(optimizer)}, checkpoint_id=folder)

    if not topology.is_worker:
        optimizer.serve(save)
        return Stage(loaded)
    parts, part = (topology.replicas, topology.replica) if mesh is None else (dist.get_world_size(), dist.get_rank())
    for step in steps:
        inputs, targets = (one.chunk(parts)[part] for one in cases.batch(step, torch.float64))
        optimizer.step(topology.closure(module, cross_entropy, inputs, targets))
    refused = ""
    try:
        if mesh is not None:
            save_checkpoint(folder, steps.stop, module, optimizer)
        ReplicaState(optimizer).state_dict()
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    optimizer.synchronise()
    optimizer.checkpoint(steps.stop, save)
    optimizer.close()
    step = topology.steps + steps.start if optimizer.rule == "metric" else optimizer.state[module.first.weight]["step"]
    return Stage(loaded, whole(module), refused, optimizer.param_groups[0]["lr"], step)


def saved_and_resumed(
    rank: int, count: int, *, folder: Path, servers: int = 0, shards: int = 1, **options: Any
) -> list[Stage]:
    """Eight steps without a stop; five; and three from the checkpoint after these."""
    parts = ((range(8), False), (range(5), False), (range(5, 8), True))
    return [
        one_stage(rank, count, servers=servers, shards=shards, folder=folder, steps=steps, load=load, **options)
        for steps, load in parts
    ]


def one_stage(rank: int, count: int, *, servers: int = 0, shards: int = 1, **options: Any) -> Stage:
    if shards == 1:
        return stage(processes(rank, count, servers=servers), **options)
    mesh = init_device_mesh("cpu", (count // shards, shards), mesh_dim_names=("replicate", "shard"))
    return stage(TreeReduction(device_mesh=mesh), mesh=mesh, **(options | {"scaled": False}))


def of_another_number(rank: int, count: int, *, folder: Path, steps: range) -> tuple[str, Stage]:
    """What DCP says to a checkpoint of another number of replicas, and what follows if it may take a part of it."""
    said = ""
    try:
        one_stage(rank, count, folder=folder, steps=steps, load=True)
    except dcp.api.CheckpointException as error:
        said = str(error)
    return said, one_stage(rank, count, folder=folder, steps=steps, load=True, partial=True)
