"""What a step sends and what a process keeps, before anything is run."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["simulated", "tree", "server"]

_SUMS_BYTES = 8  # inner products are summed in fp64


@dataclass(frozen=True)
class Load:
    """What one process of a kind does in a step of `ReplicaNewton` with secants on own data.

    Attributes:
        role: "process", "worker" or "server".
        processes: how many of them there are.
        sent: bytes sent to other processes in a step, vectors alone.
        sums_sent: bytes sent for the sums of M-sized products, which do not grow with N.
        state: bytes of optimizer state between steps.
    """

    role: str
    processes: int
    sent: int
    sums_sent: int
    state: int


def estimate(kind: Kind, parameters: int, replicas: int, *, servers: int = 1, element: int = 4) -> list[Load]:
    """Load of every kind of process; the tests hold it to what is counted at the collectives.

    It is that of one bucket; every further one fills up by less than an element a holder. Groups with different rates,
    the rule "saddle-free" and gradients in half precision change the sums or the vectors, secants on common data add a
    second gradient.

    Args:
        kind: of topology.
        parameters: N >= 1.
        replicas: M >= 1.
        servers: S >= 1, of a parameter server.
        element: bytes of an element of a parameter: 4 for fp32, 8 for fp64; 2 for bf16 and fp16, which travel as they
            are while the state is fp32.

    Returns:
        One entry a role.

    Raises:
        ValueError: if a number is out of range or the topology unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"the topology must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    for name, value in (("parameters", parameters), ("replicas", replicas), ("servers", servers)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    M = replicas
    kept = max(element, 4)
    if kind == "simulated":
        return [Load("process", 1, 0, 0, M * parameters * kept)]
    # One sum: losses and flags of all replicas and a norm; three Gram matrices of differences, their products with the
    # mean gradient, and whether the replicas have parted.
    sums = (2 * M + 1) + 3 * (M - 1) ** 2 + (2 * M - 1) + 1
    processes = M if kind == "tree" else M + servers
    sums_sent = 2 * sums * (processes - 1) // processes * _SUMS_BYTES
    if kind == "tree":
        width = -(-parameters // M)
        return [Load("process", M, 2 * (M - 1) * width * element, sums_sent, (M + 1) * width * kept)]
    width = -(-parameters // servers)
    return [
        Load("server", servers, M * width * element, sums_sent, (M + 1) * width * kept),
        Load("worker", M, servers * width * element, sums_sent, 0),
    ]


def all_reduce(parameters: int, replicas: int, *, element: int = 4) -> float:
    """Bytes that data-parallel SGD sends in a step: a ring all-reduce, `2 N (M−1)/M` elements.

    Args:
        parameters: N.
        replicas: M.
        element: bytes of an element.

    Returns:
        The number of bytes.
    """
    return 2.0 * parameters * (replicas - 1) / replicas * element
