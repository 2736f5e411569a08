"""Several real processes for a test: each runs one function of `cases`, joined by gloo or NCCL."""

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
    newcomers: int = 0,
    tcp: bool = False,
    backend: str = "gloo",
    limit: float = 150.0,
    **options: Any,
) -> list[Any]:
    """What `case(rank, count, **options)` returns in each process; None where it was killed.

    Args:
        folder: empty; holds the meeting point and the results.
        count: number of processes.
        case: importable function.
        lost: ranks that fail on purpose; what is left of them is killed when all others have ended.
        newcomers: processes beyond these, of higher ranks, which are not in their group.
        tcp: whether they meet at a TCP store, kept by rank 0, rather than in a file.
        backend: of their group.
        limit: seconds after which what still runs is killed, and the test fails.
        options: of the case.

    Returns:
        One result a process.

    Raises:
        AssertionError: if a process fails or hangs.
    """
    # One server imports torch once; the processes are its forks.
    context = multiprocessing.get_context("forkserver")
    # The first optimizer of a process imports torch._dynamo, for a second.
    context.set_forkserver_preload(["pytest", "torch.distributed", "torch._dynamo", "replica_newton"])
    ranks = range(count + newcomers)
    arguments = (count, tcp, backend, case, options)
    processes = [context.Process(target=_main, args=(folder, rank, *arguments)) for rank in ranks]
    for process in processes:
        process.start()
    until = time.monotonic() + limit
    sound = [rank for rank in ranks if rank not in lost]
    for rank in sound:
        processes[rank].join(max(until - time.monotonic(), 0.1))
    hung = [rank for rank in sound if processes[rank].is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"ranks {hung} were still running after {limit} s"
    failed = {rank: processes[rank].exitcode for rank in sound if processes[rank].exitcode}
    assert not failed, f"exit codes by rank: {failed}"
    files = [folder / f"{rank}.pt" for rank in ranks]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _main(
    folder: Path, rank: int, count: int, tcp: bool, backend: str, case: Callable[..., Any], options: dict[str, Any]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if rank < count:
        store = meeting(folder, count, keeps=rank == 0) if tcp else dist.FileStore(str(folder / "meeting"), count)
        limit = timedelta(seconds=60)
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    try:
        result = case(rank, count, **options)
    except Leave as leave:
        torch.save(leave.args[0], folder / f"{rank}.pt")
        os._exit(0)
    torch.save(result, folder / f"{rank}.pt")
    # A process that leaves while others still talk to it would be their error.
    dist.barrier()
    dist.destroy_process_group()


def meeting(folder: Path, count: int, *, keeps: bool = False) -> dist.TCPStore:
    """The TCP store of `run_processes`; one process keeps it."""
    file = folder / "port"
    if keeps:
        store = dist.TCPStore("localhost", 0, count, is_master=True, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").rename(file)
        return store
    while not file.exists():
        time.sleep(0.01)
    return dist.TCPStore("localhost", int(file.read_text()), count, is_master=False, wait_for_workers=False)
