"""Several real processes for a test: each runs one function of `cases`, joined by gloo."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


class Leave(Exception):  # noqa: N818
    """Ends a process whose group is broken, with its result: there is nobody left to say goodbye to."""


def run_processes(
    folder: Path,
    count: int,
    case: Callable[..., Any],
    /,
    *,
    lost: tuple[int, ...] = (),
    limit: float = 150.0,
    **options: Any,
) -> list[Any]:
    """What `case(rank, count, **options)` returns in each process; None where it was killed.

    Args:
        folder: empty; holds the meeting point and the results.
        count: number of processes.
        case: importable function.
        lost: ranks that fail on purpose; what is left of them is killed when all others have ended.
        limit: seconds after which what still runs is killed, and the test fails.
        options: of the case.

    Returns:
        One result a process.

    Raises:
        AssertionError: if a process fails or hangs.
    """
    # One server imports torch once; the processes are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.distributed", "replica_newton"])
    processes = [context.Process(target=_main, args=(folder, rank, count, case, options)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + limit
    sound = [rank for rank in range(count) if rank not in lost]
    for rank in sound:
        processes[rank].join(max(until - time.monotonic(), 0.1))
    hung = [rank for rank in sound if processes[rank].is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"ranks {hung} were still running after {limit} s"
    failed = {rank: processes[rank].exitcode for rank in sound if processes[rank].exitcode}
    assert not failed, f"exit codes by rank: {failed}"
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _main(folder: Path, rank: int, count: int, case: Callable[..., Any], options: dict[str, Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        result = case(rank, count, **options)
    except Leave as leave:
        torch.save(leave.args[0], folder / f"{rank}.pt")
        os._exit(0)
    torch.save(result, folder / f"{rank}.pt")
    # A process that leaves while others still talk to it would be their error.
    dist.barrier()
    dist.destroy_process_group()
