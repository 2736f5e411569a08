"""Who is who among the processes of a topology."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What must agree for a process to find again what it held.

    Attributes:
        topology: name of its class.
        processes: P.
        replicas: M.
        first_worker: rank of the first process with a replica.
    """

    topology: str
    processes: int
    replicas: int
    first_worker: int = 0

    def __str__(self) -> str:
        return f"{self.topology} with {self.replicas} replicas in {self.processes} processes"
