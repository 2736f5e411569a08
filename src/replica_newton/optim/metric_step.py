"""MetricStep: steps of unit size in a metric, at a rate from the distance to go."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.grouping import grouped
from replica_newton.optim.metric import Metric
from replica_newton.optim.paired_probes import PairedProbes
from replica_newton.optim.rate import DistanceRate
from replica_newton.topology import Topology, TreeReduction

_AVERAGED = 8.0


def average_weight(step: int) -> float:
    """Weight of the newest point in the average that a `MetricStep` keeps.

    Args:
        step: how many steps have been taken, >= 1.

    Returns:
        `(1 + η)/(t + η)` with η = 8: polynomial-decay averaging, over about the last ninth of all steps.

    Source:
        Shamir and Zhang (2013), arXiv 1212.1824, section 4.
    """
    return (1.0 + _AVERAGED) / (step + _AVERAGED)


class Moved(NamedTuple):
    """A parameter, its gradient of what is minimised, its group's rate and decay, and what is kept of its past."""

    parameter: Tensor
    gradient: Tensor
    relative: float
    decay: float
    state: dict[str, Any]


class MetricStep:
    """The rule "metric": `w ← (1 − lr η_t λ) w − lr η_t U_t`, with U of `Metric` and η of `DistanceRate`.

    Beside w it keeps a running average over about the last ninth of all steps, whatever their number:

        w̄ ← w̄ + 9/(t + 8) · (w − w̄).

    Args:
        metric: which coordinates, and the averages in them.
        rate: how far a step of unit size goes.
        probes: bend U by curvature; see `PairedProbes`. None leaves it the metric's.
    """

    STATE = (*Metric.STATE, "last", "before_last", "average", "whole")
    """What the state of a parameter may hold, beside the number of its steps."""

    def __init__(
        self, metric: Metric | None = None, rate: DistanceRate | None = None, probes: PairedProbes | None = None
    ) -> None:
        self.metric = Metric() if metric is None else metric
        self.rate = DistanceRate() if rate is None else rate
        self.probes = probes

    def prepare(self, moved: Sequence[Moved], largest: float, total: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Find out what must be known of all parameters; nothing is changed yet, nor if the step cannot be taken.

        Args:
            moved: what is this process's to move.
            largest: relative rate of all parameters.
            total: sums over the processes that move parameters.

        Returns:
            What takes the step: it moves parameters and their states, and asks nobody but for probes.

        Raises:
            FloatingPointError: if a gradient is not finite; by all processes.
        """
        elements, wrong, squared_size, *slopes = total(self._sums(moved)).tolist()
        if wrong:
            raise FloatingPointError("a gradient is not finite")

        def take() -> None:
            if not elements:
                return
            if largest:
                pairs = zip(slopes[::2], slopes[1::2], strict=True)
                last, before_last = (slope / square**0.5 if square else 0.0 for slope, square in pairs)
                self.rate.observe(last, before_last, largest)
            self._move(moved, self.rate((squared_size / elements) ** 0.5))

        return take

    def _move(self, moved: Sequence[Moved], rate: float) -> None:
        """A step at this rate."""
        states = [one.state for one in moved]
        units: Sequence[Tensor] = self.metric.unit_steps(states, [one.gradient for one in moved])
        if self.probes is not None:
            units = self.probes.bent(self.metric, states, units, rate)
        for places in _alike(moved, lambda one: (one.relative, one.decay, one.state["step"])):
            self._add([moved[place] for place in places], [units[place] for place in places], rate)

    def _add(self, moved: Sequence[Moved], units: Sequence[Tensor], rate: float) -> None:
        """Steps of parameters of one dtype, device and step, whose groups have the same rate and decay."""
        _, _, relative, decay, state = moved[0]
        parameters = [one.parameter for one in moved]
        if decay:
            torch._foreach_mul_(parameters, 1.0 - relative * rate * decay)
        torch._foreach_add_(parameters, [unit.to(parameters[0].dtype) for unit in units], alpha=-relative * rate)
        for one, unit in zip(moved, units, strict=True):
            one.state["before_last"], one.state["last"] = one.state.get("last", unit), unit
            if "average" not in one.state:
                one.state["average"] = one.parameter.detach().to(unit.dtype, copy=True)
        averages = [one.state["average"] for one in moved]
        torch._foreach_lerp_(averages, [one.to(units[0].dtype) for one in parameters], average_weight(state["step"]))

    def _sums(self, moved: Sequence[Moved]) -> Tensor:
        """What must be known of all parameters.

        Returns:
            `(7,)`, fp64 on the CPU: N, how many gradients are not finite, ‖w‖²; then of the last step and of the one
            before the slope down it and its squared length, every parameter weighted by its relative rate.
        """
        if not moved:
            return torch.zeros(7, dtype=torch.float64)
        table = torch.empty(len(moved), 6, dtype=torch.float64)
        for places in _alike(moved):
            table[places] = _numbers([moved[place] for place in places]).cpu()
        sound, size, slope, length, slope_before, length_before = table.unbind(dim=1)
        relative = sound.new_tensor([one.relative for one in moved])
        # A sum can overflow where no element does.
        wrong = 0 if bool(sound.isfinite().all()) else sum(not one.gradient.isfinite().all() for one in moved)
        elements = sum(one.parameter.numel() for one in moved)
        sums = [size @ size, slope @ relative, (length * relative).square().sum()]
        sums += [slope_before @ relative, (length_before * relative).square().sum()]
        return torch.cat((sound.new_tensor([elements, wrong]), torch.stack(sums)))


def _alike(moved: Sequence[Moved], key: Callable[[Moved], object] = lambda _: None) -> Iterable[list[int]]:
    """Places of parameters of one dtype and device, and of one key, in their order."""
    return grouped((one.parameter.dtype, one.parameter.device, one.gradient.dtype, key(one)) for one in moved).values()


def _numbers(moved: Sequence[Moved]) -> Tensor:
    """`(k, 6)`: ‖g‖, ‖w‖, and the slopes down the last two steps, each with its length; all of one dtype and device."""
    gradients = [one.gradient.flatten().to(working_dtype(one.gradient)) for one in moved]
    sizes = torch._foreach_norm([one.parameter for one in moved], dtype=gradients[0].dtype)
    columns = [torch._foreach_norm(gradients), sizes]
    nothing = gradients[0].new_zeros(())
    for name in ("last", "before_last"):
        known = [place for place, one in enumerate(moved) if name in one.state]
        steps = [moved[place].state[name].flatten() for place in known]
        slopes, lengths = [nothing] * len(moved), [nothing] * len(moved)
        for place, step, length in zip(known, steps, torch._foreach_norm(steps) if steps else (), strict=True):
            slopes[place], lengths[place] = gradients[place] @ step, length
        columns += [tuple(slopes), tuple(lengths)]
    return torch.stack([torch.stack(column) for column in columns], dim=1).double()


def check_options(topology: Topology, **options: Any) -> None:
    """Check that no option is given that has no meaning for the rule: it takes no secants.

    Args:
        topology: of the optimizer.
        options: of the other rules.

    Raises:
        ValueError: if there is one.
    """
    whole = not topology.distributed or (isinstance(topology, TreeReduction) and topology.shards == 1)
    if isinstance(options["spread"], PairedProbes) and not whole:
        needed = "one process or a TreeReduction of whole replicas"
        raise ValueError(f"spread=PairedProbes() needs {needed}, got {topology!r}")
    if isinstance(options["spread"], PairedProbes):
        options["spread"] = None
    for name, unset in {"spread": None, "secant_data": "own", "damping": 0.0, "max_norm": None}.items():
        if options[name] != unset:
            raise ValueError(f"{name}={options[name]!r} has no meaning for rule='metric'")


def evaluated(closure: Callable[[], Tensor]) -> Tensor:
    """Loss of a closure that leaves gradients in `.grad`.

    Args:
        closure: any.

    Returns:
        The loss.

    Raises:
        FloatingPointError: if it is not finite.
    """
    with torch.enable_grad():
        loss = closure().detach()
    if not bool(loss.isfinite().all()):
        raise FloatingPointError(f"loss is not finite ({float(loss)})")
    return loss
