"""The command `train`: over several processes, who takes part, how they start and how they join; and on what device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from replica_newton.launch import Place, init_processes
from replica_newton.topology import ParameterServer, Simulated, TreeReduction
from replica_newton.topology.estimate import Kind
from replica_newton.training.run import RunConfig, RunError


@dataclass(frozen=True)
class Cast:
    """Who takes part in a run.

    Attributes:
        replicas: M.
        servers: S.
        place: of this process, if a launcher has started it as one of several.
        launches: whether this process has to start the others, and trains nothing itself.
    """

    replicas: int
    servers: int
    place: Place | None
    launches: bool


def cast(topology: Kind, default: int, *, replicas: int | None, processes: int | None, servers: int | None) -> Cast:
    """Who takes part, from what was asked for and from the environment.

    Args:
        topology: where the replicas live.
        default: M where nothing says how many, in one process.
        replicas: M asked for.
        processes: number of processes asked for, servers included.
        servers: S asked for.

    Returns:
        The cast.

    Raises:
        RunError: if these contradict each other, or the number of processes that a launcher has started.
    """
    try:
        place = Place.from_environment()
    except RuntimeError as error:
        raise RunError(str(error)) from error
    if topology == "simulated":
        _require(processes is None, f"processes must go with --topology tree or server, got {processes}")
        several = place is not None and place.processes > 1
        _require(not several, "topology must be tree or server under torchrun, got simulated")
        return Cast(default if replicas is None else replicas, servers or 0, None, launches=False)
    if servers is None:
        servers = 1 if topology == "server" else 0
    if place is not None:
        _require(
            processes in {None, place.processes}, f"processes must be the {place.processes} started, got {processes}"
        )
        processes = place.processes
    elif processes is None:
        _require(
            replicas is not None, f"topology {topology} needs --processes, --replicas or torchrun, got none of them"
        )
        processes = (replicas or 0) + servers
    M = processes - servers
    _require(M >= 1, f"processes must be more than the servers, got {processes} processes and {servers} servers")
    _require(
        replicas in {None, M}, f"replicas must be {M} with {processes} processes and {servers} servers, got {replicas}"
    )
    return Cast(M, servers, place, launches=place is None)


@contextmanager
def joined(config: RunConfig, place: Place | None) -> Iterator[Simulated | TreeReduction | ParameterServer]:
    """Topology of a run, of which this process is a part while the block lasts.

    Args:
        config: of the run.
        place: of this process among several, None where it is alone.

    Yields:
        The topology.

    Raises:
        RunError: if the processes do not come together.
    """
    if place is None:
        yield Simulated(config.replicas)
        return
    try:
        init_processes()
    except (RuntimeError, TimeoutError) as error:
        raise RunError("the processes do not come together: " + str(error).partition("\n")[0]) from error
    try:
        if config.topology == "tree":
            yield TreeReduction()
            # A process that leaves while others still talk to it would be their error.
            dist.barrier()
        else:
            yield ParameterServer(config.servers)
    finally:
        # Threads of the group that outlive the interpreter would end the process by an abort.
        dist.destroy_process_group()


def device_named(name: str, place: Place | None = None) -> torch.device:
    """The device that this process works on.

    Args:
        name: "cpu", "cuda", or "cuda:1" for one of several.
        place: of this process among several, which take the devices of their machine in turn; None where it is alone.

    Returns:
        The device; where `name` says no number, with that of this process.

    Raises:
        RunError: if there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    _require(device.type in {"cpu", "cuda"}, f"device must be cpu, cuda or cuda:0 and so on, got {name!r}")
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _require((device.index or 0) < there, f"device must be cpu or one of the {there} GPUs of CUDA here, got {name!r}")
    local_rank = 0 if place is None else place.local_rank
    return torch.device("cuda", local_rank % there if device.index is None else device.index)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise RunError(rule)
