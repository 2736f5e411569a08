"""One replica a process, the work on every vector shared between them."""

from typing import TYPE_CHECKING

import torch.distributed as dist

from replica_newton.topology.buckets import BUCKET_BYTES
from replica_newton.topology.collectives import world_size
from replica_newton.topology.processes import DEFAULT_TIMEOUT, Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE = "replicate"
"""Name of the dimension of a two-dimensional mesh along which replicas follow each other."""


class TreeReduction(Processes):
    """M replicas in M processes, one each, that share the work on every vector by columns.

    Process j holds the j-th M-th of the columns of everything: of the shared parameters, and of the rows of all
    replicas. Rows travel to columns and back by all-to-all, so that a step sends what data-parallel SGD sends:

        gradients    row m, N elements       → columns, M × n       N (M−1)/M elements sent
        inner products of rows               all-reduced            some M²
        new points   columns, M × n          → row m, N elements    N (M−1)/M elements sent

    together `2 N (M−1)/M`, a ring all-reduce of the gradient. Gradients travel in buckets while the backward pass still
    runs. See `Processes` for what all topologies of several processes have in common.

    A replica may be sharded over several processes by `torch.distributed.fsdp.fully_shard(model, mesh=mesh["shard"])`;
    with the mesh of both dimensions, every process does for its shards what is described above for all parameters, and
    inner products are summed over all shards.

    Args:
        process_group: of `torch.distributed`, initialised by the caller (`torchrun` and
            `torch.distributed.init_process_group`); None for all processes.
        device_mesh: in place of a group: one dimension, or two of which one is named "replicate"; along the other a
            replica's parameters are sharded.
        timeout: seconds that a collective may take.
        bucket_bytes: size of a bucket of gradients, >= 1.

    Attributes:
        replicas: M, the number of processes in the group.
        rank: of this process in the group.
        elements_sent: elements that this process has sent to others, by phase.

    Raises:
        RuntimeError: if `torch.distributed` is not initialised.
        ValueError: if both a group and a mesh are given, if the mesh has other dimensions, or if `timeout` or
            `bucket_bytes` is not positive.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069: "trivially implemented in both the Parameter-Server and
        Tree-Reduction frameworks".
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        device_mesh: "DeviceMesh | None" = None,
        timeout: float = DEFAULT_TIMEOUT,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        shard_groups = None
        if device_mesh is not None:
            if process_group is not None:
                raise ValueError("give process_group or device_mesh, not both")
            process_group, shard_groups = _groups(device_mesh)
        everyone = range(world_size(process_group))
        super().__init__(process_group, everyone, everyone, timeout, bucket_bytes, shard_groups)


def _groups(
    mesh: "DeviceMesh",
) -> tuple[dist.ProcessGroup, tuple[dist.ProcessGroup, dist.ProcessGroup] | None]:
    """Of this process: the group of the replicas' same shards, that of its replica's shards, and that of all."""
    if mesh.ndim == 1:
        return mesh.get_group(), None
    names = mesh.mesh_dim_names or ()
    if mesh.ndim != 2 or REPLICATE not in names:
        raise ValueError(f'device_mesh must have one dimension, or two of which one is named "replicate", got {mesh}')
    replicate, ranks = names.index(REPLICATE), sorted(mesh.mesh.flatten().tolist())
    everyone = dist.distributed_c10d._get_default_group()
    if len(ranks) < dist.get_world_size():
        everyone = dist.new_group(ranks, use_local_synchronization=True)
    return mesh.get_group(replicate), (mesh.get_group(1 - replicate), everyone)
