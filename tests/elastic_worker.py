"""A training script for torchrun that fails on purpose: killed, out of memory, or waiting to be told to leave."""

import argparse
import os
import signal
import time
from pathlib import Path

import cases
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import (
    GracefulExit,
    ReplicaNewton,
    TreeReduction,
    init_processes,
    load_checkpoint,
    save_checkpoint,
)

RATE, EVERY = 0.05, 2


def out_of_memory() -> Tensor:
    """Closure of a batch that is too large."""
    raise MemoryError("no room for the batch")


def main() -> None:
    """Train to the last step from the last checkpoint, unless something happens, each thing once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--killed-at", type=int)
    parser.add_argument("--out-of-memory-at", type=int)
    parser.add_argument("--wait-at", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_processes(timeout=120.0)
    topology = TreeReduction(timeout=60.0)
    module = cases.network(torch.float64, seed=topology.position)
    optimizer = ReplicaNewton(module.parameters(), RATE, rule="paper", topology=topology)
    found = load_checkpoint(options.folder / "checkpoints", module, optimizer)
    start = found.step if found else 0
    with (options.folder / f"starts-{topology.position}").open("a") as starts:
        starts.write(f"{start}\n")

    def happens(at: int | None, what: str) -> bool:
        marker = options.folder / what
        if step != at or marker.exists() or topology.position != 1:
            return False
        marker.touch()
        return True

    with GracefulExit() as graceful:
        for step in range(start, options.steps):
            M, m = topology.replicas, topology.position
            inputs, targets = (one.chunk(M)[m] for one in cases.batch(step, torch.float64))
            if happens(options.killed_at, "killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            closure = topology.closure(module, cross_entropy, inputs, targets)
            optimizer.step(out_of_memory if happens(options.out_of_memory_at, "out of memory") else closure)
            if step == options.wait_at:
                (options.folder / f"waiting-{topology.position}").touch()
                while not graceful.received:
                    time.sleep(0.02)
            leaves = graceful.agreed(optimizer)
            if leaves or (step + 1) % EVERY == 0:
                save_checkpoint(options.folder / "checkpoints", step + 1, module, optimizer)
            if leaves:
                break
        else:
            optimizer.synchronise()
            end = nn.utils.parameters_to_vector(module.parameters()).detach()
            torch.save(end, options.folder / f"end-{topology.position}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
