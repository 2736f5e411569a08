"""What a step sends and what a process keeps, before anything is run."""

from dataclasses import dataclass
from typing import Literal, get_args

from replica_newton.topology.collectives import numbers_at_once, sent_for_a_sum

Kind = Literal["simulated", "tree", "server"]
Rule = Literal["metric", "paper"]

_SUMS_BYTES = 8  # inner products are summed in fp64
_METRIC_STATE = 5
"""Numbers a parameter: two moments, two steps, and the average."""


@dataclass(frozen=True)
class Load:
    """What one process of a kind does in a step of `ReplicaNewton`, in the mean over those of the kind.

    Attributes:
        role: "process", "worker" or "server".
        processes: how many of them there are.
        sent: bytes sent to other processes in a step, vectors alone.
        sums_sent: bytes sent for the sums of M-sized products, which do not grow with N.
        state: bytes of optimizer state between steps; of the rule "metric" without factors and bases, which are
            2 a² + 2 b² numbers for a matrix of a × b (but for sides above 1,024, which are not rotated).
    """

    role: str
    processes: int
    sent: int
    sums_sent: int
    state: int


def estimate(
    kind: Kind, parameters: int, replicas: int, *, servers: int = 1, element: int = 4, rule: Rule = "paper"
) -> list[Load]:
    """Load of every kind of process; the tests hold it to what is counted at the collectives.

    For the rule "paper" it is that of one bucket; every further one fills up by less than an element a holder. Groups
    with different rates, the rule "saddle-free" and gradients in half precision change the sums or the vectors, secants
    on common data add a second gradient. The rule "metric" deals whole parameters: processes have as much as others in
    the mean alone, and where one has more than twice its share, N/M more are sent at most.

    Args:
        kind: of topology.
        parameters: N >= 1.
        replicas: M >= 1.
        servers: S >= 1, of a parameter server.
        element: bytes of an element of a parameter: 4 for fp32, 8 for fp64; 2 for bf16 and fp16, which travel as they
            are while the state is fp32.
        rule: of the optimizer; "paper" with secants on own data.

    Returns:
        One entry a role.

    Raises:
        ValueError: if a number is out of range or the topology unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"the topology must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if rule not in get_args(Rule):
        raise ValueError(f"the rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    for name, value in (("parameters", parameters), ("replicas", replicas), ("servers", servers)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    M = replicas
    kept = max(element, 4)
    if rule == "metric":
        return _estimate_metric(kind, parameters, M, servers, element, kept)
    if kind == "simulated":
        return [Load("process", 1, 0, 0, M * parameters * kept)]
    processes = M if kind == "tree" else M + servers
    sums_sent = sent_for_a_sum(numbers_summed(M), processes, numbers_at_once(parameters, element)) * _SUMS_BYTES
    if kind == "tree":
        width = -(-parameters // M)
        return [Load("process", M, 2 * (M - 1) * width * element, sums_sent, (M + 1) * width * kept)]
    width = -(-parameters // servers)
    return [
        Load("server", servers, M * width * element, sums_sent, (M + 1) * width * kept),
        Load("worker", M, servers * width * element, sums_sent, 0),
    ]


def numbers_summed(replicas: int) -> int:
    """Numbers that a step of the rule "paper" sums over the processes, at once.

    Args:
        replicas: M.

    Returns:
        Those that are reported, the inner products of all differences and the mean gradient with each other, and
        whether the replicas have parted.
    """
    rows = 2 * replicas - 1
    return _reported(replicas) + rows * (rows + 1) // 2 + 1


def _reported(replicas: int) -> int:
    """Losses of all replicas, and a sum and the length of the mean gradient; see `Report`."""
    return replicas + 2


def _estimate_metric(kind: Kind, N: int, M: int, servers: int, element: int, kept: int) -> list[Load]:
    if kind == "simulated":
        return [Load("process", 1, 0, 0, _METRIC_STATE * N * kept)]
    processes, holders = (M, M) if kind == "tree" else (M + servers, servers)
    # Seven are about the parameters.
    sums_sent = sent_for_a_sum(_reported(M) + 7, processes, numbers_at_once(N, element)) * _SUMS_BYTES
    state = _METRIC_STATE * -(-N // holders) * kept
    if kind == "tree":
        return [Load("process", M, round(2 * N * (M - 1) / M * element), sums_sent, state)]
    # Once more, whether all servers are prepared.
    sums_sent += sent_for_a_sum(1, processes) * _SUMS_BYTES
    return [
        Load("server", servers, round(M * N / servers * element), sums_sent, state),
        Load("worker", M, N * element, sums_sent, 0),
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
