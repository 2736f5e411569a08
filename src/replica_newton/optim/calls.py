"""Calls that all processes make together: announced, tried, given up, undone and made again."""

import logging
import math
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.closures import no_data
from replica_newton.spread import regrouped
from replica_newton.topology import Topology, TopologyError
from replica_newton.topology.buckets import local, write

logger = logging.getLogger(__name__)

Nonfinite = Literal["stop", "skip"]
MAX_SKIPPED_IN_A_ROW = 20


class Call(IntEnum):
    """What all processes do together; a server does what the first worker says."""

    CLOSE = 0
    STEP = 1
    STEP_ON_GIVEN = 2
    SYNCHRONISE = 3
    SUM = 4
    SAVE = 5
    SERVE = 6
    AVERAGE = 7


class Calls(Optimizer):
    """What an optimizer over a topology calls in all processes, whatever the step is.

    A step whose loss or gradient is not finite in one replica is given up by all. A call in which a worker was lost is
    ended by all that are left, or undone and made again: who settles it is `topology.together`.

    Args:
        params: parameters, or groups of them.
        defaults: of the groups.
        topology: where the replicas live.
        nonfinite: what a step does whose loss or gradient is not finite in any replica; see `ReplicaNewton`.

    Attributes:
        topology: as given.
        nonfinite: as given.
        fallbacks: steps that were replaced by the SGD step because they did not descend.
        skipped: steps that were skipped because a loss or gradient was not finite.

    Raises:
        ValueError: if `nonfinite` is neither.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], topology: Topology, nonfinite: Nonfinite) -> None:
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f"{nonfinite=} must be one of {', '.join(get_args(Nonfinite))}")
        self.topology = topology
        self.nonfinite = nonfinite
        self.fallbacks = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._counted = (0, 0, 0)
        self._evaluated = False
        self._outcome: Tensor | FloatingPointError | None = None
        self._rows: list[int] | None = None
        self._together = False
        self._averaging = False
        self._unfinished: Callable[[], None] | None = None
        self._sum = torch.empty(0)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = ("topology", "nonfinite", "fallbacks", "skipped", "_skipped_in_a_row", "_counted", "_rows", "_together")
        unset = {
            "_averaging": False,
            "_outcome": None,
            "_evaluated": False,
            "_unfinished": None,
            "_sum": torch.empty(0),
        }
        return super().__getstate__() | {name: getattr(self, name) for name in own} | unset

    @torch.no_grad()
    def serve(self, save: Callable[[int], object] | None = None) -> None:
        """Take part in all that the workers do, until they call `close`: what a server of `ParameterServer` does.

        Rates come from the first worker. A step that the workers give up for a loss that is not finite is no error
        here.

        Args:
            save: takes part in a checkpoint, given the number of steps; see `save_checkpoint`. None where there are
                none.

        Raises:
            RuntimeError: if the workers save a checkpoint and `save` is None.
        """
        while self._call(Call.SERVE, save=save) != Call.CLOSE:
            if isinstance(self._outcome, FloatingPointError):
                logger.warning("step given up: %s", self._outcome)

    @torch.no_grad()
    def checkpoint(self, step: int, save: Callable[[int], object]) -> None:
        """Save a checkpoint together with the servers, if there are any; what `save_checkpoint` calls.

        Args:
            step: steps of training so far.
            save: this process's part, given the number of steps; made again if workers are lost meanwhile.

        Raises:
            RuntimeError: inside `averaged`, where training would go on from the average.
        """
        if self._averaging:
            raise RuntimeError("checkpoints must not be saved inside `with optimizer.averaged()`")
        self._call(Call.SAVE, number=step, save=save)

    @torch.no_grad()
    def total(self, numbers: Callable[[], Tensor]) -> Tensor:
        """Sum over the replicas of a few numbers; called by all workers.

        Args:
            numbers: `(k,)` fp64 on the CPU, of the replica in this process; asked for again if workers are lost.

        Returns:
            The sum, `(k,)`, the same bits in all processes. In one process, what `numbers` returns.
        """
        if not self.topology.distributed:
            return numbers()
        self._call(Call.SUM, numbers=numbers)
        return self._sum

    def close(self) -> None:
        """Tell the servers that there are no more steps; nothing to do where there are none."""
        try:
            self._call(Call.CLOSE)
        except TopologyError as error:
            logger.warning("others have left before this process: %s", error)

    @property
    def together(self) -> bool:
        """Whether the module stands at the shared parameters: after `synchronise`, until the next step."""
        return self._together or not self.topology.distributed

    def _call_step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        """Take a step together; the loss."""
        self._call(Call.STEP if closure is not None else Call.STEP_ON_GIVEN, closure)
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, FloatingPointError):
            raise outcome
        return outcome if closure is not None else None

    def _call(
        self,
        call: Call,
        closure: Callable[[], Tensor] | None = None,
        *,
        number: int = 0,
        numbers: Callable[[], Tensor] | None = None,
        save: Callable[[int], object] | None = None,
    ) -> Call:
        """Make a call that all processes make, servers by what the first worker says; returns which it was."""
        agreed, self._evaluated = call, False

        def attempt() -> bool:
            nonlocal agreed
            if self._evaluated:
                _restore(closure)
            self._outcome, self._counted, self._evaluated = None, self._counts(), False
            own = None if numbers is None else numbers()
            agreed, said = self._announce(call, number if own is None else len(own))
            if call not in {Call.SERVE, agreed}:
                raise TopologyError("the first worker makes another call here: all workers must make the same")
            match agreed:
                case Call.SYNCHRONISE:
                    self._synchronise()
                case Call.AVERAGE:
                    self.topology.prepared()
                    self._average()
                case Call.SUM:
                    self._sum = self.topology.total(torch.zeros(said, dtype=torch.float64) if own is None else own)
                    self.topology.end_together(_nothing)
                case Call.SAVE:
                    (save or _no_save)(said)
                    self.topology.end_together(_nothing)
                case Call.STEP | Call.STEP_ON_GIVEN:
                    self._try_step((closure or no_data) if agreed == Call.STEP else None)
            return agreed in {Call.STEP, Call.STEP_ON_GIVEN}

        self.topology.together(attempt, self._meet)
        return agreed

    def _try_step(self, closure: Callable[[], Tensor] | None) -> None:
        """Take a step, or none where a loss or gradient is not finite; `_outcome` is the loss or the error."""
        try:
            self._take_step(closure)
        except FloatingPointError as error:
            _restore(closure)
            stops = self.nonfinite == "stop" or self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
            self._outcome = error if stops else torch.tensor(math.nan)
            self.topology.end_together(partial(self._skip, error), self._undo([]), stepped=True)

    def _skip(self, error: FloatingPointError) -> None:
        self._skipped_in_a_row += 1
        if self._outcome is not error:
            self.skipped += 1
            logger.warning("step skipped: %s", error)

    def _counts(self) -> tuple[int, int, int]:
        return self.fallbacks, self.skipped, self._skipped_in_a_row

    def _undo(self, parameters: list[Tensor]) -> Callable[[], None]:
        """What undoes a step, made before it changes anything: by reference, not by copies."""
        return partial(self._go_back, parameters, [dict(self.state[p]) for p in parameters], self._counted)

    def _settled(self) -> None:
        """A step has been taken."""
        self._skipped_in_a_row = 0
        self._rows = self.topology.workers

    def _go_back(self, parameters: list[Tensor], states: list[dict[str, Any]], counts: tuple[int, int, int]) -> None:
        """Undo a step that other processes cannot end."""
        self._unfinished = None
        for parameter, state in zip(parameters, states, strict=True):
            self.state[parameter] = state
        self.fallbacks, self.skipped, self._skipped_in_a_row = counts

    def _finish(self) -> None:
        """End a step that can be neither undone nor stopped any more, unless it has ended."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished()

    def _meet(self) -> None:
        """After a change of members: all at the parameters that all share, and as many displacements as replicas."""
        topology, parameters = self.topology, self._trained()
        state = self.state[parameters[0]]
        mine = ["shared" in state, state.get("step", -1), topology.steps, *self._counts()]
        said = topology.said_by_server(torch.tensor(mine, dtype=torch.float64)).long().tolist()
        settled, step, topology.steps, self.fallbacks, self.skipped, self._skipped_in_a_row = said
        if not settled:
            return
        buckets = topology.lay_out(parameters)
        if "shared" not in state:
            nothing = topology.part(flat(parameters).to(working_dtype(*parameters)))
            displacements = nothing.new_zeros(topology.replicas, len(nothing))
            state |= {"shared": nothing, "displacements": displacements, "buckets": buckets}
        elif self._rows is not None:
            state["displacements"] = regrouped(state["displacements"], self._rows, topology.workers)
            self._rows = topology.workers
        if step >= 0:
            for parameter in parameters:
                self.state[parameter]["step"] = step
        write(parameters, topology.whole(state["shared"]))
        self._together = True

    def _announce(self, call: Call, number: int) -> tuple[Call, int]:
        """Tell processes without a replica what comes next and with which rates; returns what the first worker says."""
        rates = [float(group["lr"]) for group in self.param_groups]
        message: list[float] = self.topology.agree(torch.tensor([call, number, *rates], dtype=torch.float64)).tolist()
        if message[2:] != rates:
            for group, rate in zip(self.param_groups, message[2:], strict=True):
                group["lr"] = rate
        return Call(int(message[0])), int(message[1])

    def _take_step(self, closure: Callable[[], Tensor] | None) -> None:
        """The step itself; `_outcome` is the loss, as soon as it is known."""
        raise NotImplementedError

    def _average(self) -> None:
        """Put the module at the average of its parameters, where the step keeps one."""

    @torch.no_grad()
    def synchronise(self) -> None:
        """Put the module at the parameters that all replicas share, the same bits in every process.

        Where replicas live in one process it stands there anyway. The next step moves them apart again.
        """
        if self.topology.distributed:
            self._call(Call.SYNCHRONISE)

    def _synchronise(self) -> None:
        parameters = self._trained()
        self.topology.prepared()
        if "shared" in self.state[parameters[0]]:
            write(parameters, self.topology.whole(self.state[parameters[0]]["shared"]))
            self._together = True

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]


def flat(parameters: list[Tensor]) -> Tensor:
    """`(N,)`, one parameter after the other; of sharded ones, the local shards."""
    return torch.cat([local(parameter).flatten() for parameter in parameters])


def _no_save(step: int) -> None:
    raise RuntimeError(f"the workers save a checkpoint after {step} steps: servers need optimizer.serve(save=...)")


def _nothing() -> None:
    """Nothing is left to be done."""


def _restore(closure: Callable[[], Tensor] | None) -> None:
    """Put batch-norm statistics back to where they were before the closure was evaluated, if it knows how."""
    restore = getattr(closure, "restore", None)
    if restore is not None:
        restore()
