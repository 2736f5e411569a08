"""One replica a process, the work on every vector shared between them."""

import torch.distributed as dist

from replica_newton.topology.collectives import world_size
from replica_newton.topology.processes import DEFAULT_TIMEOUT, Processes


class TreeReduction(Processes):
    """M replicas in M processes, one each, that share the work on every vector by columns.

    Process j holds columns `j·n … (j+1)·n − 1` of everything, n = ⌈N/M⌉: of the shared parameters, and of the rows of
    all replicas. Rows travel to columns and back by all-to-all, so that a step sends what data-parallel SGD sends:

        gradients    row m, N elements       → columns, M × n       N (M−1)/M elements sent
        inner products of rows               all-reduced            some M²
        new points   columns, M × n          → row m, N elements    N (M−1)/M elements sent

    together `2 N (M−1)/M`, a ring all-reduce of the gradient. See `Processes` for what all topologies of several
    processes have in common.

    Args:
        process_group: of `torch.distributed`, initialised by the caller (`torchrun` and
            `torch.distributed.init_process_group`); None for all processes.
        timeout: seconds that a collective may take.

    Attributes:
        replicas: M, the number of processes in the group.
        rank: of this process in the group.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
        ValueError: if `timeout` is not positive.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069: "trivially implemented in both the Parameter-Server and
        Tree-Reduction frameworks".
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        everyone = range(world_size(process_group))
        super().__init__(process_group, everyone, everyone, timeout)
