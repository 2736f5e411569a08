"""`ReplicaNewton` in the checkpoints of `torch.distributed.checkpoint` (DCP)."""

import json
import logging
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim import ReplicaNewton
from replica_newton.optim.calls import flat

logger = logging.getLogger(__name__)


class ReplicaState:
    """State of `ReplicaNewton` that `dcp.save` keeps, and `dcp.load` finds again.

        optimizer.synchronise()
        state = {"model": model.state_dict(), "optimizer": ReplicaState(optimizer)}
        dcp.save(state, checkpoint_id=folder)       # by all processes; dcp.load(state, checkpoint_id=folder) as well

    With the rule "metric" every parameter's state is saved under its number by whoever has it in hand. Any other number
    of processes, with servers or shards or without, finds there what it has in hand, and training goes on, by the same
    processes at the same bits. What probes have learnt is not saved: they begin anew.

    With the other rules processes hold columns. DCP takes plain tensors of one name for copies of each other and saves
    one of them; the columns differ. So their names hold the topology, its size and the rank. What all have in common
    (rates, the count of steps) is saved once. By the same processes, training goes on at the same bits. By another
    number of them or of replicas, `dcp.load` raises, for it misses the names; with
    `planner=DefaultLoadPlanner(allow_partial_load=True)` the model, rates and the count of steps go on, and the
    replicas part anew.

    With a `ParameterServer`, let the workers call `dcp.save` in `optimizer.checkpoint(step,
    save)` after `synchronise`, and the servers in `optimizer.serve(save)`.

    It has the methods of DCP's `Stateful` and does not import it, which would take all users of the package a second.

    Args:
        optimizer: whose state it is.

    Source:
        https://docs.pytorch.org/docs/2.13/distributed.checkpoint.html
    """

    def __init__(self, optimizer: ReplicaNewton) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state to save, or, of an optimizer that has taken no step, tensors of the right shapes to load into.

        Returns:
            What all processes share, and what this one holds, under its name.

        Raises:
            RuntimeError: if the replicas stand apart.
        """
        optimizer = self.optimizer
        first = _parameters(optimizer)[0]
        state = optimizer.state.get(first, {})
        if "shared" in state and not optimizer.together:
            raise RuntimeError("optimizer.synchronise() must be called before its state and the model are saved")
        groups = [
            {name: float(value) if isinstance(value, Tensor) else value for name, value in group.items()}
            for group in optimizer.state_dict()["param_groups"]
        ]
        if optimizer.metric_step is not None:
            return {
                "groups": json.dumps(groups),
                "rate": json.dumps(optimizer.metric_step.rate.state_dict()),
                "counts": torch.tensor([optimizer.fallbacks, optimizer.skipped]),
                "parameters": {str(index): _packed(optimizer.state.get(p, {})) for index, p in optimizer.in_hand()},
            }
        buckets = optimizer.topology.lay_out(_parameters(optimizer))
        tensors, parted = self._tensors()
        return {
            "groups": json.dumps(groups),
            "step": torch.tensor(state.get("step", 0)),
            "counts": torch.tensor([optimizer.fallbacks, optimizer.skipped]),
            # Shards of different sizes are cut into different buckets.
            self._name(): {**tensors, "parted": torch.tensor(parted), "buckets": json.dumps(buckets)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `dcp.load` has read.

        Args:
            state_dict: of the form that `state_dict` returns.
        """
        optimizer = self.optimizer
        groups = json.loads(state_dict["groups"])
        for saved, group in zip(groups, optimizer.param_groups, strict=True):
            # A rate that is a tensor stays one: schedulers may hold on to it.
            if isinstance(group["lr"], Tensor):
                saved["lr"] = group["lr"].fill_(saved["lr"])
        counts = dict(zip(("fallbacks", "skipped"), state_dict["counts"].tolist(), strict=True))
        if optimizer.metric_step is not None:
            states = {int(index): _unpacked(one) for index, one in state_dict["parameters"].items()}
            rate = json.loads(state_dict["rate"])
            optimizer.load_state_dict({"state": states, "param_groups": groups, "counts": counts, "rate": rate})
            return
        own, step = state_dict[self._name()], int(state_dict["step"])
        parted = bool(own["parted"])
        if step and not parted:
            logger.info("the checkpoint is of another topology: replicas part anew")
        indices = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        state: dict[int, dict[str, Any]] = {indices[id(p)]: {"step": step} for p in _parameters(optimizer) if step}
        for name, tensor in own.items() if parted else ():
            kind, _, number = name.partition("-")
            if number:
                one = state.setdefault(indices[id(_parameters(optimizer)[int(number)])], {})
                one |= {kind: tensor, "buckets": json.loads(own["buckets"])}
        optimizer.load_state_dict({"state": state, "param_groups": groups, "counts": counts})

    def _name(self) -> str:
        topology = self.optimizer.topology
        shard = getattr(topology, "shard", None)
        return f"{topology.layout}, process {topology.position}" + (f", shard {shard}" if shard is not None else "")

    def _tensors(self) -> tuple[dict[str, Tensor], bool]:
        """What this process holds, by kind and number of the parameter, and whether the replicas have parted at all."""
        parameters, topology = _parameters(self.optimizer), self.optimizer.topology
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        names = [
            (name, number)
            for number, state in enumerate(states)
            for name in ("displacements", "shared")
            if name in state
        ]
        if names:
            return {f"{name}-{number}": states[number][name] for name, number in names}, True
        M, dtype = topology.replicas, working_dtype(*parameters)
        if not topology.distributed:
            return {
                f"displacements-{i}": p.new_zeros(M, *p.shape, dtype=dtype) for i, p in enumerate(parameters)
            }, False
        shared = topology.part(flat(parameters).to(dtype))
        return {"displacements-0": shared.new_zeros(M, len(shared)), "shared-0": shared}, False


def _packed(state: dict[str, Any]) -> bytes:
    """State of a parameter, of which somebody who loads it does not know the shapes."""
    content = BytesIO()
    torch.save(state, content)
    return content.getvalue()


def _unpacked(packed: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(BytesIO(packed), weights_only=True)
    return state


def _parameters(optimizer: ReplicaNewton) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
