"""What the processes of the tests of checkpoints do."""

from functools import partial
from pathlib import Path
from typing import Any

import cases
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import (
    PairedProbes,
    ParameterServer,
    ReplicaNewton,
    Simulated,
    TreeReduction,
    load_checkpoint,
    save_checkpoint,
)
from replica_newton.checkpoints import CheckpointError

RATE = 0.05


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def run(
    topology: Any,
    folder: Path | None,
    steps: range,
    *,
    save_at: int | None = None,
    load: bool = False,
    seed: int = 0,
    normalised: bool = False,
    dropout: bool = False,
    probes: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train through some steps, from a checkpoint or not, and save one after a step or not."""
    module = cases.network(torch.float64, normalised=normalised, seed=seed)
    options = {"lr": RATE, "rule": "paper"} | options | ({} if probes is None else {"spread": PairedProbes(**probes)})
    optimizer = ReplicaNewton(module.parameters(), **options, topology=topology)
    torch.manual_seed(100 + topology.position)  # dropout differs by process
    found = load_checkpoint(folder, module, optimizer) if load else None
    loaded = vector(module)
    if not getattr(topology, "is_worker", True):
        optimizer.serve(save=partial(save_checkpoint, folder, module=module, optimizer=optimizer, extra="server"))
        return {"found": found, "loaded": loaded}
    losses, saved = [], None
    M, m = (1, 0) if isinstance(topology, Simulated) else (topology.replicas, topology.replica)
    for step in steps:
        inputs, targets = (one.chunk(M)[m] for one in cases.batch(step, torch.float64))
        inputs = nn.functional.dropout(inputs, 0.2) if dropout else inputs
        losses.append(float(optimizer.step(topology.closure(module, cross_entropy, inputs, targets))))
        if step + 1 == save_at:
            save_checkpoint(folder, save_at, module, optimizer, extra={"replica": m, "next": save_at})
            saved = vector(module)
    optimizer.synchronise()
    optimizer.close()
    buffers = [buffer.clone() for buffer in module.buffers()]
    return {
        "found": found,
        "loaded": loaded,
        "losses": losses,
        "saved": saved,
        "parameters": vector(module),
        "buffers": buffers,
    }


def processes(rank: int, count: int, *, servers: int = 0) -> Any:
    del rank, count
    return ParameterServer(servers) if servers else TreeReduction()


def saved_and_resumed(
    rank: int, count: int, *, folder: Path, servers: int, half: int, **options: Any
) -> list[dict[str, Any]]:
    """Steps without a stop, with a checkpoint after half of them, and from that checkpoint."""
    topology = processes(rank, count, servers=servers)
    whole, ends = range(2 * half), []
    for kind in ({"steps": whole}, {"steps": whole, "save_at": half}, {"steps": whole[half:], "load": True}):
        ends.append(run(topology, folder, normalised=True, dropout=True, seed=len(ends) // 2, **kind, **options))
    return ends


def part_of_a_run(rank: int, count: int, *, servers: int = 0, **options: Any) -> dict[str, Any]:
    return run(processes(rank, count, servers=servers), **options)


def damaged(rank: int, count: int, *, folder: Path) -> tuple[int, int, str]:
    """Steps found with the newest whole, with it truncated, and what is said when all are damaged."""
    topology = TreeReduction()
    steps = []
    for number in (1, 2):
        run(topology, folder, range(number), save_at=number)
    for process in (2, 0):
        steps.append(run(topology, folder, range(0), load=True)["found"].step)
        torch.distributed.barrier()
        if rank == count - 1:
            file = folder / f"checkpoint-00000{len(steps) % 2 + 1}" / f"process-{process}.pt"
            file.write_bytes(file.read_bytes()[:-1])
        torch.distributed.barrier()
    try:
        run(topology, folder, range(0), load=True)
    except CheckpointError as error:
        return *steps, str(error)
    return *steps, ""


def disk_full(rank: int, count: int, *, folder: Path) -> tuple[str, int, list[str]]:
    """What is said when one process cannot write, what is then found, and what is left in the folder."""
    del count
    topology = TreeReduction()
    run(topology, folder, range(2), save_at=2)
    genuine = Path.write_bytes

    def fail(self: Path, content: bytes) -> int:
        if rank == 1 and "process-1" in self.name:
            raise OSError(28, "No space left on device")
        return genuine(self, content)

    Path.write_bytes = fail
    said = ""
    try:
        run(topology, folder, range(3), save_at=3)
    except (CheckpointError, OSError) as error:
        said = str(error)
    Path.write_bytes = genuine
    torch.distributed.barrier()
    found = run(topology, folder, range(0), load=True)["found"]
    return said, found.step, sorted(path.name for path in folder.iterdir())
