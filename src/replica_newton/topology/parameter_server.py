"""Servers hold parameters and state, workers have replicas and data."""

import torch.distributed as dist
from torch import Tensor

from replica_newton.topology.collectives import world_size
from replica_newton.topology.processes import DEFAULT_TIMEOUT, Processes


class ParameterServer(Processes):
    """S servers, the first ranks, which hold all columns and no data, and M workers, the others, one replica each.

        worker    its gradient, N elements                    → servers, N/S elements each
        servers   inner products of rows, all-reduced
        servers   new point of replica m, N/S elements each   → worker m

    A worker sends N elements a step and receives N, and keeps no state; a server sends and receives M N/S, and keeps
    (M + 1) N/S. The script is the same for all, up to

        if topology.is_server:
            optimizer.serve()       # until the workers call optimizer.close()
        else:
            ...                     # train as with any topology
            optimizer.close()

    Args:
        servers: S >= 1, the first ranks of the group.
        process_group: of `torch.distributed`, initialised by the caller; None for all processes.
        timeout: seconds that a collective may take.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
        ValueError: if there are too few processes for so many servers and a worker, or `timeout` is not positive.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069; Li et al. (2014), Scaling distributed machine learning with the
        parameter server.
    """

    def __init__(
        self, servers: int = 1, process_group: dist.ProcessGroup | None = None, *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        processes = world_size(process_group)
        if not 1 <= servers < processes:
            raise ValueError(f"{servers=} must be in 1 … {processes - 1}, to leave a worker of {processes} processes")
        super().__init__(process_group, range(servers, processes), range(servers), timeout)

    @property
    def is_server(self) -> bool:
        """Whether this process holds columns and has no replica."""
        return not self.is_worker

    def agree(self, message: Tensor) -> Tensor:
        """What the first worker says: servers have no loop of their own to know it from.

        Args:
            message: fp64, of the same length in all processes.

        Returns:
            The message of the first worker.
        """
        agreed = message.clone()
        self.spread_from_first([agreed], "what comes next")
        return agreed
