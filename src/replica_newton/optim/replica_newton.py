"""ReplicaNewton: a `torch.optim` optimizer whose curvature comes from replicas at different parameters."""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from replica_newton.curvature import SecantCurvature, saddle_free_inverse_hvp
from replica_newton.curvature.gram import working_dtype
from replica_newton.curvature.secant import DEFAULT_RTOL
from replica_newton.optim.advance import Advance
from replica_newton.optim.calls import Nonfinite, flat
from replica_newton.optim.closures import given_gradients
from replica_newton.optim.evaluation import NO_MEMORY, Evaluation, StepMemory
from replica_newton.optim.metric import Metric, MetricName
from replica_newton.optim.metric_calls import MetricCalls
from replica_newton.optim.metric_step import MetricStep, check_options
from replica_newton.optim.paired_probes import PairedProbes
from replica_newton.spread import LocalStep, RandomDirections, Spread
from replica_newton.spread.spread import Held
from replica_newton.topology import Simulated, Topology
from replica_newton.topology.buckets import local
from replica_newton.topology.processes import Processes
from replica_newton.topology.simulated import Data
from replica_newton.topology.standing import Standing

logger = logging.getLogger(__name__)

Rule = Literal["paper", "saddle-free", "metric"]


class ReplicaNewton(MetricCalls):
    """Training steps that need no learning rate; or Newton steps on the curvature that M data-parallel replicas see.

    With the rule "metric", the default, nothing is to be tuned, and no schedule is needed:

        w ← w − lr · η_t U_t,

    a step U of unit size in a metric (see `Metric`), times a rate η from the weights' own size and the number of steps
    (see `DistanceRate`), times lr = 1. It needs the gradient alone, so it takes any closure, or none, and it takes no
    curvature from replicas unless `spread=PairedProbes()` asks for some. Evaluate and save the module inside
    `averaged`. What it was measured against, and what it does not do, is in docs/step_rules.md.

    With the other rules the replicas stand at `w + d_m`. Replica m evaluates its gradient g_m there, on its own shard
    of the batch; `ḡ` is the mean. Displacements and gradients form the secants `G ≈ H W` (see `SecantCurvature`), and
    all replicas take the common step

        w ← w − lr · Ĥ⁻¹ ḡ        (rule "paper"),
        w ← w − lr · |Ĥ|⁻¹ ḡ      (rule "saddle-free": |θ| of the Rayleigh-Ritz pairs in place of σ).

    The spread then says where they part to: with `LocalStep` each adds its own local step to the common one, at no
    extra gradient evaluation. Along directions that the replicas do not span, the step is that of SGD at rate lr.

    A step that does not descend (`dᵀḡ ≤ 0`, every group weighted by its rate; it happens when the secants see negative
    curvature or mere noise) is replaced by the SGD step and counted in `fallbacks`. So is the first step, before the
    replicas have parted, and every step of a single replica, neither of which is counted.

    With secants on own shards, gradients differ by data as well as by parameters; with the small displacements of
    local steps the data win, and G is mostly sampling noise. `secant_data="common"` has every replica evaluate a
    second gradient, on one common shard, for the secants alone: two gradients a sample in place of one.

    Args:
        params: parameters, or groups of them.
        lr: α >= 0, the rate of the step; a float or a tensor of one element; may differ by group. None is 1, relative
            to the rate that is found, for the rule "metric", and 0.1 for the others.
        rule: the metric's step, or the inverse that the step uses.
        metric: coordinates of the rule "metric".
        topology: where the replicas live: `Simulated(M)` in this process, `TreeReduction()` or `ParameterServer()` in a
            process each.
            `Simulated(1)`, the default, has no curvature: plain SGD but for the rule "metric". Over processes, with
            that rule each of them, or each server, moves the parameters that are dealt to it (see `Dealing`).
        spread: where the replicas stand for the next step; for the rule "metric" None or `PairedProbes`.
        secant_data: gradients that the secants compare: those of own shards, or of one common shard.
        damping: λ ≥ 0, in units of the Hessian: the inverse is that of `Ĥ + λ I` (of `|Ĥ| + λ I`).
        rtol: relative cut-off of the secants' directions, in [0, 1).
        max_norm: c > 0; the step of a mean gradient that is longer is taken as if `ḡ · c/‖ḡ‖` were the gradient, as
            `torch.nn.utils.clip_grad_norm_` does it, over all parameters. The local steps by which replicas part are
            shortened alike. The secants are not: they compare the gradients as they are, or their curvature would be
            that of no function. None clips nothing.
        weight_decay: λ >= 0; may differ by group. Every step also multiplies the shared parameters by `1 − lr λ`, for
            the rule "metric" by `1 − lr η λ` with the η of `DistanceRate`. Neither gradients nor secants know of it.
        maximize: ascend instead of descend; everything is then that of the negated loss.
        nonfinite: what a step does whose loss or gradient is not finite in any replica. "stop" raises
            `FloatingPointError`, "skip" goes on to the next step, and raises it only when more than 20 in a row come to
            nothing. With a closure from `topology.closure` batch-norm statistics are then as before the step, too.

    Attributes:
        curvature: `SecantCurvature` of the last step, None where there was none; over processes also after a step
            that was given up, and what is N-sized in it is good until the next step.
        fallbacks: steps that were replaced by the SGD step because they did not descend.
        skipped: steps that were skipped because a loss or gradient was not finite.

    Raises:
        ValueError: if an option is out of range.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069; Dauphin et al. (2014), arXiv 1406.2572, for "saddle-free"; Loshchilov
        and Hutter (2019), arXiv 1711.05101, for the weight decay.
    """

    _memory = NO_MEMORY

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        rule: Rule = "metric",
        metric: MetricName = "kronecker",
        topology: Topology | None = None,
        spread: Spread | PairedProbes | None = None,
        secant_data: Data = "own",
        damping: float = 0.0,
        rtol: float = DEFAULT_RTOL,
        max_norm: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        nonfinite: Nonfinite = "stop",
    ) -> None:
        lr = (1.0 if rule == "metric" else 0.1) if lr is None else lr
        if not 0.0 <= float(lr) < float("inf"):
            raise ValueError(f"{lr=} must be finite and >= 0")
        if rule not in get_args(Rule):
            raise ValueError(f"{rule=} must be one of {', '.join(get_args(Rule))}")
        if secant_data not in get_args(Data):
            raise ValueError(f"{secant_data=} must be one of {', '.join(get_args(Data))}")
        if not 0.0 <= damping < float("inf"):
            raise ValueError(f"{damping=} must be finite and >= 0")
        if not 0.0 <= rtol < 1.0:
            raise ValueError(f"{rtol=} must be in [0, 1)")
        if max_norm is not None and not 0.0 < max_norm < float("inf"):
            raise ValueError(f"{max_norm=} must be positive and finite")
        self.rule = rule
        topology = Simulated(1) if topology is None else topology
        self.metric_step: MetricStep | None = None
        probes = spread if isinstance(spread, PairedProbes) else None
        if rule == "metric":
            check_options(topology, spread=spread, secant_data=secant_data, damping=damping, max_norm=max_norm)
            self.metric_step = MetricStep(Metric(metric), probes=probes)
        elif probes is not None:
            raise ValueError(f"spread=PairedProbes() is for rule='metric', got {rule=}")
        self.spread: Spread = LocalStep() if spread is None or isinstance(spread, PairedProbes) else spread
        if getattr(topology, "shards", 1) > 1 and not isinstance(self.spread, LocalStep):
            raise ValueError(f"spread must be LocalStep() for sharded replicas, got {self.spread!r}")
        if topology.distributed and not isinstance(self.spread, LocalStep | RandomDirections):
            kinds = "LocalStep() or RandomDirections()"
            raise ValueError(f"spread must be {kinds} over several processes, got {self.spread!r}")
        self.secant_data = secant_data
        self.damping = damping
        self.rtol = rtol
        self.max_norm = max_norm
        self.curvature: SecantCurvature | None = None
        self.fallbacks = 0
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, topology, nonfinite)
        if self.topology.replicas == 1 and self.metric_step is None:
            logger.warning("one replica has no curvature: ReplicaNewton steps as SGD at rate lr")

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "metric_step", "spread", "secant_data", "damping", "rtol", "max_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own} | {"curvature": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("weight_decay", 0.0)  # states of before there was one

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: `{"params": ..., "lr": ..., "maximize": ...}`; what is missing has its default.

        Raises:
            ValueError: if a parameter is complex or sparse or a rate is negative.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step.

        Args:
            closure: made by `topology.closure(module, criterion, inputs, targets)`: it evaluates the replicas. Over
                several processes any closure does that calls `backward` on the loss of this process's batch, as long
                as secants come from own data; so it does for the rule "metric". None takes the SGD step with the
                gradients at hand, and the replicas keep their displacements; for the rule "metric" it is a step as any.

        Returns:
            The loss, mean over replicas; nan for a step that is skipped, None without a closure.

        Raises:
            TypeError: if the closure cannot evaluate replicas.
            ValueError: if a gradient is sparse, no parameter requires one, or the closure's topology has another
                number of replicas.
            RuntimeError: if a gradient has changed after it was sent to other processes; see `Processes.no_sync`; or
                inside `averaged`.
            FloatingPointError: if a loss or gradient is not finite; the parameters are then as before the step. Raised
                by all processes.
        """
        if self._averaging:
            raise RuntimeError("steps must not be taken inside `with optimizer.averaged()`")
        if closure is None and not self.topology.distributed and self.metric_step is None:
            self._step_on_given_gradients()
            self.topology.prepared(stepped=True)
            return None
        return self._call_step(closure)

    def _take_step(self, closure: Callable[[], Tensor] | None) -> None:
        parameters = self._trained()
        if not parameters:
            raise ValueError("no parameter of the optimizer requires a gradient")
        if self.metric_step is not None:
            self._take_metric_step(self.metric_step, closure, parameters)
            return
        shared, W = self._stand(parameters)
        memory = self._memory_of_last_step(W)
        rates = self._by_element(parameters, [float(group["lr"]) for group in self.param_groups])
        kept = self._by_element(
            parameters, [1.0 - float(group["lr"]) * group["weight_decay"] for group in self.param_groups]
        )
        evaluation = self._evaluate(closure or given_gradients(parameters), parameters, W, "own", memory)
        if closure is not None:
            self.curvature = self._observe(closure, parameters, W, evaluation)
        evaluation.report.settle()
        self._outcome = evaluation.report.losses.mean().to(shared)
        mean = evaluation.mean
        if self.max_norm is not None:
            # Shorter rates are shorter gradients for all but the secants.
            rates = rates * _clipping(evaluation.report.norm, self.max_norm)
        step = None if closure is None else self.state[parameters[0]].get("step", 0)
        direction = mean.__getitem__ if step is None else self._direction(mean, rates)
        parted = _stay if step is None else self._parted(parameters, evaluation, rates, step)
        if step is not None and self.topology.distributed:
            self._memory = StepMemory(W, evaluation.gradients, mean, shared)
        advance = Advance(
            Standing(shared, W),
            direction,
            parted,
            rates=rates,
            kept=kept,
            shared=memory.shared,
            displacements=W if step is None else memory.displacements,
        )
        self._settle(parameters, advance, None if step is None else step + 1)

    def state_dict(self) -> dict[str, Any]:
        """State of `torch.optim.Optimizer.state_dict`, with how often steps fell back or were skipped."""
        own: dict[str, Any] = {"counts": {"fallbacks": self.fallbacks, "skipped": self.skipped}}
        if self.metric_step is not None:
            own["rate"] = self.metric_step.rate.state_dict()
            if self.probes is not None:
                own["probes"] = self.probes.state_dict()
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; displacements keep their precision where parameters have less.

        A state of another number of replicas is accepted: they part anew, after one SGD step.

        Args:
            state_dict: what `state_dict()` of this class returned.
        """
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            saved = state_dict["state"].get(index, {})
            for name in {"displacements", "shared", *MetricStep.STATE} & saved.keys():
                self.state[parameter][name] = saved[name].to(parameter.device, copy=True)
        # States of before version 0.1 have none.
        counts = state_dict.get("counts", {})
        self.fallbacks, self.skipped = counts.get("fallbacks", 0), counts.get("skipped", 0)
        self._together = True
        if self.metric_step is not None and "rate" in state_dict:
            self.metric_step.rate.load_state_dict(state_dict["rate"])
        if self.probes is not None and "probes" in state_dict:
            self.probes.load_state_dict(state_dict["probes"])

    @property
    def probes(self) -> PairedProbes | None:
        """What was given as `spread=PairedProbes()`."""
        return None if self.metric_step is None else self.metric_step.probes

    def _stand(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Columns of the shared parameters, `(n,)`, and of the displacements, `(M, n)`; the module where it belongs."""
        topology, dtype = self.topology, working_dtype(*parameters)
        buckets = topology.lay_out(parameters)
        if not topology.distributed:
            return flat(parameters).to(dtype), self._displacements(parameters)
        state = self.state[parameters[0]]
        parted = "displacements" in state and len(state["displacements"]) == topology.replicas
        if not parted or state.get("buckets", buckets) != buckets:
            topology.spread_from_first([local(parameter) for parameter in parameters], "first parameters")
            shared = topology.part(flat(parameters).to(dtype))
            return shared, shared.new_zeros(topology.replicas, len(shared))
        shared, W = state["shared"], state["displacements"]
        if self._together:
            topology.place(parameters, Standing(shared, W))
            self._together = False
        return shared, W

    def _memory_of_last_step(self, W: Tensor) -> StepMemory:
        """Over processes, what the last step was made of, which its curvature need not keep any longer."""
        memory, self._memory = self._memory, NO_MEMORY
        if self.topology.distributed and self.curvature is not None:
            self.curvature.release()
            self.curvature = None
        # Not after a step that was undone: it has led from these displacements.
        return memory if memory.fits(W) else NO_MEMORY

    def release(self) -> None:
        """Free what is kept over processes from step to step to be written to again, and the last curvature.

        It is up to 2 + 2/M elements a parameter in the optimizer and 2 in the topology, beside the state's (M + 1)/M;
        the next step allocates it anew.
        """
        self.curvature, self._memory = None, NO_MEMORY
        if isinstance(self.topology, Processes):
            self.topology.release()

    def _parted(
        self, parameters: list[Tensor], evaluation: Evaluation, rates: Tensor | float, step: int
    ) -> Callable[[slice, Tensor], Tensor]:
        """Some columns of the displacements that the spread makes of the gradients, all at once if it needs them so."""
        gradients, mean = evaluation.gradients, evaluation.mean
        elements = sum(local(parameter).numel() for parameter in parameters)

        def columns(some: slice, memory: Tensor) -> Tensor:
            own = rates[some] if isinstance(rates, Tensor) else rates
            held = Held(elements, self.topology, mean[some], memory)
            return self.spread.displacements(gradients[:, some], own, step, held)

        if type(self.spread) is LocalStep:
            return columns
        # A spread of a user need not know of columns: it is never asked for some.
        held = {"held": Held(elements, self.topology, mean)} if self.topology.distributed else {}
        everything = self.spread.displacements(gradients, rates, step, **held)
        return lambda some, _: everything[:, some]

    def _settle(self, parameters: list[Tensor], advance: Advance, step: int | None) -> None:
        """Move all to where the step leads, and keep that."""
        self.topology.prepared(self._undo(parameters), stepped=True)
        if self.topology.distributed:
            own = {"displacements": advance.displacements, "shared": advance.shared}
            self.state[parameters[0]] |= own | {"buckets": self.topology.lay_out(parameters)}
        else:
            advance.finish()
            self._part(parameters, advance.displacements)
        if step is not None:
            for parameter in parameters:
                self.state[parameter]["step"] = step
        self._settled()
        try:
            self.topology.place(parameters, advance)
        finally:
            advance.finish()  # also if somebody is lost meanwhile: the others go on from it

    def _observe(
        self, closure: Callable[[], Tensor], parameters: list[Tensor], W: Tensor, evaluation: Evaluation
    ) -> SecantCurvature | None:
        """Secants of this step; None before the replicas have parted, and where there is only one."""
        if self.topology.replicas == 1:
            return None
        secants = evaluation
        if self.secant_data == "common":
            parted = torch.tensor([bool((W[:1] != W).any())], dtype=torch.float64)
            if not bool(evaluation.report.total(parted)):
                return None
            secants = self._evaluate(closure, parameters, W, "common")
        if self.topology.distributed:
            options: dict[str, Any] = {"total": secants.report.total, "vector": evaluation.mean, "copy": False}
        else:
            secants.report.settle()
            options = {}
        curvature = SecantCurvature(W, secants.gradients, rtol=self.rtol, damping=self.damping, **options)
        return curvature if curvature.parted else None

    def _direction(self, mean_gradient: Tensor, rates: Tensor | float) -> Callable[[slice], Tensor]:
        """Columns of what the rule makes of the mean gradient, or of the gradient where that would not descend."""
        curvature = self.curvature
        if curvature is None:
            return mean_gradient.__getitem__
        if self.topology.distributed and self.rule == "paper" and not isinstance(rates, Tensor):
            direction = curvature.inverse_hvp_by_columns(mean_gradient)
            descent = curvature.squared_decrement(mean_gradient)
        else:
            whole = self._whole_direction(curvature, mean_gradient)
            weighted = whole * rates if isinstance(rates, Tensor) else whole
            direction = whole.__getitem__
            descent = float(self.topology.total((weighted @ mean_gradient).double().cpu()))
        if descent > 0.0:
            return direction
        self.fallbacks += 1
        return mean_gradient.__getitem__

    def _whole_direction(self, curvature: SecantCurvature, mean_gradient: Tensor) -> Tensor:
        if self.rule == "paper":
            return curvature.inverse_hvp(mean_gradient)
        return saddle_free_inverse_hvp(
            curvature.eigenvalues,
            curvature.eigenvectors,
            mean_gradient,
            damping=self.damping,
            rtol=self.rtol,
            total=self.topology.total,
        )

    def _part(self, parameters: list[Tensor], displacements: Tensor) -> None:
        """Keep the displacements by parameter, so that checkpoints follow the parameters."""
        pieces = torch.split(displacements, [p.numel() for p in parameters], dim=1)
        for parameter, piece in zip(parameters, pieces, strict=True):
            self.state[parameter]["displacements"] = piece.reshape(len(displacements), *parameter.shape)

    def _step_on_given_gradients(self) -> None:
        """SGD step on what is in `.grad`; parameters without gradient stay."""
        given = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.layout != torch.strided for _, gradient, _ in given):
            raise ValueError("sparse gradients are not supported")
        clipping = 1.0
        if self.max_norm is not None:
            norm = torch.nn.utils.get_total_norm([gradient for _, gradient, _ in given])
            clipping = _clipping(float(norm), self.max_norm)
        for parameter, gradient, group in given:
            sign = 1 if group["maximize"] else -1
            parameter.mul_(1.0 - float(group["lr"]) * group["weight_decay"])
            parameter.add_(gradient, alpha=sign * clipping * float(group["lr"]))


def _check_group(group: dict[str, Any]) -> None:
    if not 0.0 <= float(group["lr"]) < float("inf"):
        raise ValueError(f"lr={group['lr']} must be finite and >= 0")
    if not 0.0 <= group["weight_decay"] < float("inf"):
        raise ValueError(f"weight_decay={group['weight_decay']} must be finite and >= 0")
    for parameter in group["params"]:
        if parameter.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(f"parameters must be dense and real, got {parameter.layout}, {parameter.dtype}")


def _clipping(norm: float, max_norm: float) -> float:
    """What a gradient of this length is multiplied by, as in `torch.nn.utils.clip_grad_norm_`."""
    return min(1.0, max_norm / (norm + 1e-6))


def _stay(columns: slice, displacements: Tensor) -> Tensor:  # noqa: ARG001
    """What stays of displacements that no step parts anew: all."""
    return displacements
