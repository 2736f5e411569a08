"""Checkpoints of a module and its optimizer."""

import logging
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from replica_newton.checkpoints.folder import Saved, newest_checkpoint, write_checkpoint
from replica_newton.optim import ReplicaNewton
from replica_newton.topology import Simulated, Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found.

    Attributes:
        step: steps of training that it was saved after.
        extra: what this process gave to `save_checkpoint`; that of the first replica, if other processes saved it.
        parted: whether the replicas stand where they stood. If not (other topology, other number of replicas or
            processes), they part anew by one SGD step.
    """

    step: int
    extra: Any
    parted: bool


def save_checkpoint(
    folder: str | Path, step: int, module: nn.Module, optimizer: Optimizer, *, extra: Any = None, keep: int = 2
) -> None:
    """Save module, optimizer and torch's random state on the CPU, from all processes, whole or not at all.

    Over a `TreeReduction` all processes call it, after the same step; with a `ParameterServer` all workers do, and the
    servers join in by

        optimizer.serve(save=partial(save_checkpoint, folder, module=module, optimizer=optimizer))

    The module is put at the shared parameters (`ReplicaNewton.synchronise`) and its parameters are saved once; each
    process saves its columns of the optimizer's state and its own buffers. `folder` must be the same for all: on
    several machines, on a file system that they share.

    Args:
        folder: of the checkpoints; each gets a folder of its own in it, `checkpoint-000001` and so on, with a file a
            process and `manifest.json`, written last, which has their sizes and SHA-256.
        step: steps of training so far.
        module: the model.
        optimizer: `ReplicaNewton` over any topology, or any other optimizer in one process.
        extra: of this process, saved with it; tensors, numbers, strings, lists and dicts.
        keep: how many of the newest checkpoints stay.

    Raises:
        TypeError: if `extra` could not be loaded again.
        ValueError: if replicas are sharded; these are for `ReplicaState`.
        CheckpointError: if another process could not write its file; then none has a checkpoint.
        OSError: if this process could not.
    """
    if extra is not None:
        _require_loadable(extra)
    topology = _topology(optimizer)
    is_worker = getattr(topology, "is_worker", True)

    def save(step: int) -> None:
        state = module.state_dict() if is_worker else {}
        if topology.position != topology.layout.first_worker:
            parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            state = {name: value for name, value in state.items() if name not in parameters}
        content = {
            "module": dict(state),
            "optimizer": optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
            "extra": extra,
        }
        write_checkpoint(Path(folder), step, content, topology, keep=keep)

    if isinstance(optimizer, ReplicaNewton) and is_worker:
        optimizer.synchronise()
        optimizer.checkpoint(step, save)
    else:
        save(step)


def load_checkpoint(folder: str | Path, module: nn.Module, optimizer: Optimizer) -> Checkpoint | None:
    """Load the newest whole checkpoint in a folder into module and optimizer; called by all processes, servers too.

    Newer ones that are incomplete, truncated or changed are named in a warning of the log and passed over. By the same
    processes as before, training goes on at the same bits. By others, parameters, rates, the count of steps
    and all that the rule "metric" keeps go on, and the replicas part anew: their displacements are the trace of one
    step, and one SGD step makes new ones.

    Args:
        folder: given to `save_checkpoint`.
        module: of the same architecture.
        optimizer: of the same kind and over the same parameters; the number of replicas may differ.

    Returns:
        What was found; None if the folder has no checkpoint that was ever complete, and nothing was changed.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
        ValueError: if replicas are sharded; these are for `ReplicaState`.
    """
    topology = _topology(optimizer)
    saved = newest_checkpoint(Path(folder), topology)
    if saved is None:
        return None
    first_worker, same = saved.layout.first_worker, saved.layout == topology.layout
    first = saved.content(first_worker)
    own = first if not same or topology.position == first_worker else saved.content(topology.position)
    module.load_state_dict(first["module"] | own["module"])
    optimizer.load_state_dict(own["optimizer"] if same else _of_any_topology(saved))
    if same:
        torch.set_rng_state(own["random_state"])
    else:
        logger.info("%s is of %s: the replicas of %s part anew", saved.path, saved.layout, topology.layout)
    return Checkpoint(saved.step, own["extra"], same)


def _topology(optimizer: Optimizer) -> Topology:
    topology = optimizer.topology if isinstance(optimizer, ReplicaNewton) else Simulated(1)
    if getattr(topology, "shards", 1) > 1:
        raise ValueError("sharded replicas are saved by torch.distributed.checkpoint, with ReplicaState(optimizer)")
    return topology


def _of_any_topology(saved: Saved) -> dict[str, Any]:
    """State of an optimizer without what belongs to one topology alone, and with that of all dealt parameters."""
    kept: dict[int, dict[str, Any]] = {}
    first_worker, *others = sorted(range(saved.layout.processes), key=lambda rank: rank != saved.layout.first_worker)
    state = dict(saved.content(first_worker)["optimizer"])
    for process_state in (state, *(saved.content(rank)["optimizer"] for rank in others)):
        for index, one in process_state["state"].items():
            rest = {name: value for name, value in one.items() if name not in {"displacements", "shared", "buckets"}}
            kept.setdefault(index, {}).update(rest)
    # What probes have learnt is in pieces by process; it is soon learnt again.
    return {name: one for name, one in state.items() if name != "probes"} | {"state": kept}


def _require_loadable(extra: Any) -> None:
    """Better now than when the checkpoint is needed."""
    content = BytesIO()
    try:
        torch.save(extra, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except Exception as error:
        raise TypeError(f"extra must hold tensors, numbers, strings, lists and dicts alone, got {extra!r}") from error
