"""What the processes of `processes.run_processes` do when workers go and come."""

import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import batch, network
from processes import Leave, meeting
from torch import nn
from torch.nn.functional import cross_entropy

from replica_newton import ParameterServer, ReplicaNewton, TreeReduction, save_checkpoint
from replica_newton.topology import TopologyError

RATES = {"paper": 0.05, "metric": 1.0}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("replica_newton")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


def fail(how: str) -> None:
    """End, stop or hang this process, or hold it up."""
    if how == "late":
        time.sleep(3.0)
    elif how == "hung":
        time.sleep(3600.0)
    elif how == "error":
        raise Leave("an error of its own")
    else:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)


def fail_at(topology: Any, phase: str, at: int, how: str) -> None:
    """Have this process fail when it comes to, or has ended, a method of the topology in a step."""
    when, _, name = phase.partition(" ")
    original: Callable[..., Any] = getattr(topology, name)

    def method(*arguments: Any, **options: Any) -> Any:
        failing = topology.steps - (name == "place") == at
        if failing and when == "before":
            fail(how)
        result = original(*arguments, **options)
        if failing and when == "after":
            fail(how)
        return result

    setattr(topology, name, method)


def glitch(topology: Any, phase: str, at: int) -> None:
    """Have a collective seem to fail in this process, once, before or after a method in a call of the optimizer."""
    when, _, name = phase.partition(" ")
    original: Callable[..., Any] = getattr(topology, name)
    pending = [True]

    def fail() -> None:
        pending.clear()
        raise topology._all._failure(f"glitch {phase}", 0.1, RuntimeError("on purpose"))

    def method(*arguments: Any, **options: Any) -> Any:
        now = bool(pending) and topology._begun == at
        if now and when == "before":
            fail()
        result = original(*arguments, **options)
        if now and when == "after":
            fail()
        return result

    setattr(topology, name, method)


def interrupted(
    rank: int,
    count: int,
    *,
    folder: Path,
    servers: int,
    glitches: list[tuple[int, str, int]],
    nonfinite: str = "skip",
    rule: str = "paper",
) -> dict[str, Any] | None:
    """Train while collectives fail though nobody is lost; one loss in between is not finite."""
    log = Lines()
    topology = ParameterServer(servers, timeout=60.0)
    module = network(torch.float64, normalised=True, seed=rank)
    optimizer = ReplicaNewton(module.parameters(), RATES[rule], rule=rule, topology=topology, nonfinite=nonfinite)
    for failing, phase, at in glitches:
        if failing == rank:
            glitch(topology, phase, at)
    losses, together = [], []
    if topology.is_server:
        optimizer.serve(partial(save_checkpoint, folder, module=module, optimizer=optimizer))
    else:
        for step in range(14):
            inputs, targets = (
                one.chunk(count - servers)[topology.replica].clone() for one in batch(step, torch.float64)
            )
            if step == 8 and topology.replica == 1:
                inputs[0, 0] = torch.nan
            losses.append(float(optimizer.step(topology.closure(module, cross_entropy, inputs, targets))))
            if step % 5 == 4:
                with optimizer.averaged():
                    together.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())
                    together.append(optimizer.total(lambda: module.second.weight.detach().double().flatten()))
        optimizer.synchronise()
        together.append(optimizer.total(lambda: torch.tensor([1.0, topology.replica], dtype=torch.float64)))
        save_checkpoint(folder, 14, module, optimizer)
        optimizer.close()
    raise Leave(
        {
            "losses": losses,
            "together": together,
            "parameters": nn.utils.parameters_to_vector(module.parameters()).detach(),
            "buffers": [buffer.clone() for buffer in module.buffers()],
            "counts": (optimizer.skipped, optimizer.fallbacks, topology.steps),
            "log": log.lines,
        }
    )


def lossy(
    rank: int,
    count: int,
    *,
    folder: Path,
    servers: int = 1,
    steps: int = 12,
    failing: dict[int, str] | None = None,
    phase: str = "before _start_columns",
    at: int = 4,
    timeout: float = 20.0,
    newcomer: bool = False,
    expected: bool = False,
    wakes: int | None = None,
    cut_off: bool = False,
    tree: bool = False,
    rule: str = "paper",
    **options: Any,
) -> dict[str, Any]:
    """Train while one process is lost, and perhaps another comes; everything that a test may want to know."""
    begun, log = time.monotonic(), Lines()
    if failing and rank in failing:
        (folder / failing[rank]).write_text(str(os.getpid()))
    topology: Any
    if rank >= count:
        while not (folder / "go").exists():
            time.sleep(0.01)
        if failing and rank in failing:
            ParameterServer._enter = lambda *_: fail(failing[rank])
        topology = ParameterServer.join(meeting(folder, count), timeout=timeout)
    elif tree:
        topology = TreeReduction(timeout=timeout)
    else:
        topology = ParameterServer(servers, timeout=timeout, **options)
    module = network(torch.float64, normalised=True, seed=rank)
    optimizer = ReplicaNewton(module.parameters(), RATES[rule], rule=rule, topology=topology)
    if failing and rank in failing:
        fail_at(topology, phase, at, failing[rank])
    if cut_off:
        # Whatever the main thread asks of a store from here on is an error.
        topology._all._watch.store = None
        if not tree:
            topology._generations._store = None
    losses, replicas = [], []
    try:
        if not tree and topology.is_server:
            optimizer.serve()
        else:
            until = steps if not newcomer else topology.steps + 6 if rank >= count else 10_000
            while topology.steps < until:
                if topology.steps == at + 2 and topology.replica == 0:
                    (folder / "go").touch()
                    # Or all would be over before somebody comes.
                    while expected and topology._generations.watch.next_newcomer == count:
                        time.sleep(0.01)
                M, step = topology.replicas, topology.steps
                inputs, targets = (one.chunk(M)[topology.replica] for one in batch(step, torch.float64))
                losses.append(float(optimizer.step(topology.closure(module, cross_entropy, inputs, targets))))
                replicas.append(topology.replicas)
                if rank == wakes and topology.steps == at + 3:
                    os.kill(int((folder / "stopped").read_text()), signal.SIGCONT)
                    time.sleep(0.5)
                if until == 10_000 and replicas[-2:-1] < replicas[-1:] and step > at:
                    until = topology.steps + 6
            optimizer.synchronise()
            optimizer.close()
    except TopologyError as error:
        raise Leave({"said": str(error), "seconds": time.monotonic() - begun, "log": log.lines}) from error
    raise Leave(
        {
            "losses": losses,
            "replicas": replicas,
            "log": log.lines,
            "steps": topology.steps,
            "rank": topology.rank,
            "parameters": nn.utils.parameters_to_vector(module.parameters()).detach(),
            "buffers": [buffer.clone() for buffer in module.buffers()],
        }
    )
