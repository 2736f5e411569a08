"""Who still runs: every process answers in the background, and one verdict holds for all."""

import json
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from torch._C._distributed_c10d import Store

Result = TypeVar("Result")

_POLL = 0.1
"""Seconds between two looks of the background thread into the store."""
_PAUSE = 0.05
"""Seconds between two looks of one who waits for an answer."""


class TopologyError(RuntimeError):
    """A collective failed or timed out; the message names the phase and the ranks that are missing."""


class MembersLost(TopologyError):  # noqa: N818
    """A `TopologyError` after which those that are left can go on."""


@dataclass(frozen=True)
class Verdict:
    """Who belongs no more to a generation of processes, and who comes in with the next one.

    Attributes:
        missing: ranks that do not answer, or that all others wait for in vain.
        reasons: the last words of some of them, by rank.
        joined: ranks of newcomers.
        phase: of the collective in which the loss was noticed.
        steps: of training so far, for newcomers.
    """

    missing: list[int] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    joined: list[int] = field(default_factory=list)
    phase: str = ""
    steps: int = 0

    @property
    def names(self) -> str:
        """Those that are missing, with the reasons that are known."""
        return ", ".join(self.name(rank) for rank in self.missing)

    def name(self, rank: int) -> str:
        """One rank, with its reason where it is known.

        Args:
            rank: of a process.

        Returns:
            Such as "2 (MemoryError: no room)".
        """
        reason = self.reasons.get(str(rank))
        return f"{rank} ({reason})" if reason else str(rank)


class Watch:
    """One process's part in finding out who is missing.

    A thread looks into the store a few times a second and answers when somebody asks, whatever the process is at: one
    that computes, or waits in the same collective, is heard; one that is killed or stopped is not. A process that
    answers and is in no collective while all others wait in vain (it sleeps, or loops for ever) is missing too, but
    only once a collective has run out of time: until then it is merely late. Nobody asks before a collective has
    failed, and collectives themselves never look into the store. A process that has raised an error falls silent.

        asked/q          the generation in whose name somebody asks for the q-th time, −1 for a mere roll call
        answer/q/rank    the collective that the process is in; "" where it is in none
        why/rank         the error for which this process has fallen silent
        verdict/g        who is missing from generation g: the first that is said holds for all
        candidate/rank   somebody wants to come in under this rank

    Args:
        store: where the processes of the run, and nobody else, meet.
        rank: of this process.
        members: ranks of all processes.
        timeout: seconds that a collective may take.
        next_newcomer: the rank that the next newcomer will have; None where none are looked for.

    Attributes:
        generation: how often the members have changed.
        members: ranks of the present generation, ascending.
        phase: of the collective that this process is in; "" where it is in none.
        alarmed: the latest generation in which somebody has noticed a loss.
        next_newcomer: all that want to come in have lower ranks.
        grace: seconds in which a process must answer.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[int],
        timeout: float,
        *,
        next_newcomer: int | None = None,
    ) -> None:
        self.store = connection(store)
        self.rank = rank
        self.members = list(members)
        self.timeout = timeout
        self.generation = 0
        self.phase = ""
        self.alarmed = -1
        self.next_newcomer = next_newcomer
        self.grace = min(max(2.0, timeout / 10.0), 5.0)
        self._asked = 0
        self._silent = False
        # Its own connection: a thread that waits for an answer must not hold up the other.
        background = connection(store)
        stop = threading.Event()
        arguments = (weakref.ref(self), background, stop)
        thread = threading.Thread(target=_answer_until, args=arguments, name="replica-newton-watch", daemon=True)
        thread.start()
        # At the end of the interpreter, too: it would end the process by an abort if the thread were in the store then.
        self._stop = weakref.finalize(self, _end, thread, stop, self.grace)

    def look(self, store: Store) -> None:
        """Answer whoever asks, and see who wants to come in: what the thread does.

        Args:
            store: the thread's own connection.
        """
        while store.check([f"asked/{self._asked + 1}"]):
            self._asked += 1
            generation = int(store.get(f"asked/{self._asked}").decode().partition(" ")[0])
            if not self._silent:
                store.set(f"answer/{self._asked}/{self.rank}", self.phase)
            self.alarmed = max(self.alarmed, generation)
        if self.next_newcomer is not None:
            while store.check([f"candidate/{self.next_newcomer}"]):
                self.next_newcomer += 1

    def enter(self, phase: str) -> None:
        """This process is in a collective.

        Args:
            phase: of it.
        """
        self.phase = phase
        if self._silent:
            self.store.delete_key(f"why/{self.rank}")
            self._silent = False

    def leave(self, error: Exception) -> None:
        """Fall silent, so that others take this process for missing, until it enters a collective again.

        Args:
            error: the reason.
        """
        self._silent = True
        self.store.set(f"why/{self.rank}", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:160])

    def verdict(self, phase: str, *, timed_out: bool) -> Verdict:
        """What holds about the present generation, found out now if nobody has.

        Args:
            phase: of the collective that failed.
            timed_out: whether it ran out of time, so that those that do not take part in any are missing too.

        Returns:
            The verdict, the same in all processes.
        """
        key = f"verdict/{self.generation}"
        until = time.monotonic() + 3.0 * self.grace
        # Whoever has noticed first is finding out.
        while self.alarmed >= self.generation and time.monotonic() < until and not self.store.check([key]):
            time.sleep(_PAUSE)
        if not self.store.check([key]):
            answers = self.roll_call(self.generation)
            missing = [rank for rank in self.members if rank not in answers]
            if timed_out and not missing:
                missing = [rank for rank, where in answers.items() if not where]
            reasons = {str(r): self.store.get(f"why/{r}").decode() for r in missing if self.store.check([f"why/{r}"])}
            self.propose(Verdict(missing=sorted(missing), reasons=reasons, phase=phase))
        return self.proposed()

    def propose(self, verdict: Verdict) -> None:
        """Say what holds about the present generation, unless somebody has said it already.

        Args:
            verdict: the proposal.
        """
        self.store.compare_set(f"verdict/{self.generation}", "", json.dumps(asdict(verdict)))

    def proposed(self) -> Verdict:
        """What holds about the present generation, waited for."""
        return Verdict(**json.loads(self.store.get(f"verdict/{self.generation}")))

    def roll_call(self, generation: int = -1) -> dict[int, str]:
        """Ask all members where they are.

        Args:
            generation: whose loss is noticed by this; -1 for none.

        Returns:
            By rank, the collective that it is in, "" where in none; without those that do not answer in time.
        """
        # Unlike any other question, so that no old answer is taken for one to this.
        number, mine = self._asked, f"{generation} {self.rank} {time.monotonic_ns()}"
        said = ""
        while said != mine:
            number += 1
            said = self.store.compare_set(f"asked/{number}", "", mine).decode()
        answers = {self.rank: self.phase}
        until = time.monotonic() + self.grace
        while True:
            for rank in self.members:
                if rank not in answers and self.store.check([f"answer/{number}/{rank}"]):
                    answers[rank] = self.store.get(f"answer/{number}/{rank}").decode()
            if len(answers) == len(self.members) or time.monotonic() > until:
                return answers
            time.sleep(_PAUSE)

    def in_time(self, action: Callable[[], Result]) -> Result:
        """What an action on the store returns, or an error where the store is gone or does not answer.

        Args:
            action: to be run in a thread of its own, which is given up when it takes too long.

        Returns:
            Its result.

        Raises:
            TopologyError: if the store fails or does not answer; those of the action reach the caller.
        """
        results: list[Result] = []
        errors: list[TopologyError] = []

        def act() -> None:
            try:
                results.append(action())
            except TopologyError as error:
                errors.append(error)
            except RuntimeError:
                return

        thread = threading.Thread(target=act, name="replica-newton-store", daemon=True)
        thread.start()
        thread.join(self.timeout + 5.0 * self.grace)
        if errors:
            raise errors[0]
        if not results:
            raise TopologyError("the process that keeps the store is gone")
        return results[0]


def connection(store: Store) -> Store:
    """Another connection to a store, for another thread.

    Args:
        store: the store.

    Returns:
        The same store.
    """
    made: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs do not have it
    return made


def _end(thread: threading.Thread, stop: threading.Event, grace: float) -> None:
    """Stop a thread, and wait until it has left the store; it may itself be what lets go of the watch last."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(grace)


def _answer_until(reference: "weakref.ref[Watch]", store: Store, stop: threading.Event) -> None:
    while not stop.wait(_POLL):
        watch = reference()
        if watch is None:
            return
        try:
            watch.look(store)
        except RuntimeError:
            # The store has gone with its process; those that need it will be told.
            return
        del watch
