"""ReplicaNewton: a `torch.optim` optimizer whose curvature comes from replicas at different parameters."""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from replica_newton.curvature import SecantCurvature, saddle_free_inverse_hvp
from replica_newton.curvature.gram import working_dtype
from replica_newton.curvature.secant import DEFAULT_RTOL
from replica_newton.spread import LocalStep, Spread
from replica_newton.topology import Simulated, Topology
from replica_newton.topology.simulated import Data

logger = logging.getLogger(__name__)

Rule = Literal["paper", "saddle-free"]
_CLOSE, _STEP, _STEP_ON_GIVEN, _SYNCHRONISE, _SAVE = range(5)


class ReplicaNewton(Optimizer):
    """Newton steps on the curvature that M data-parallel replicas see.

    The replicas stand at `w + d_m`. Replica m evaluates its gradient g_m there, on its own shard of the batch;
    `ḡ` is the mean. Displacements and gradients form the secants `G ≈ H W` (see `SecantCurvature`), and all
    replicas take the common step

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
        lr: α >= 0, the rate of the step; a float or a tensor of one element; may differ by group.
        rule: which inverse the step uses.
        topology: where the replicas live: `Simulated(M)` in this process, `TreeReduction()` in a process each.
            `Simulated(1)`, the default, has no curvature: plain SGD.
        spread: where the replicas stand for the next step.
        secant_data: gradients that the secants compare: those of own shards, or of one common shard.
        damping: λ ≥ 0, in units of the Hessian: the inverse is that of `Ĥ + λ I` (of `|Ĥ| + λ I`).
        rtol: relative cut-off of the secants' directions, in [0, 1).
        maximize: ascend instead of descend; everything is then that of the negated loss.

    Attributes:
        curvature: `SecantCurvature` of the last step, None where there was none.
        fallbacks: steps that were replaced by the SGD step because they did not descend.

    Raises:
        ValueError: if an option is out of range.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069; Dauphin et al. (2014), arXiv 1406.2572, for "saddle-free".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        rule: Rule = "paper",
        topology: Topology | None = None,
        spread: Spread | None = None,
        secant_data: Data = "own",
        damping: float = 0.0,
        rtol: float = DEFAULT_RTOL,
        maximize: bool = False,
    ) -> None:
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
        self.rule = rule
        self.topology: Topology = Simulated(1) if topology is None else topology
        self.spread = LocalStep() if spread is None else spread
        if self.topology.distributed and not isinstance(self.spread, LocalStep):
            raise ValueError(f"spread must be LocalStep() over several processes, got {self.spread!r}")
        self.secant_data = secant_data
        self.damping = damping
        self.rtol = rtol
        self.curvature: SecantCurvature | None = None
        self.fallbacks = 0
        self._together = False
        super().__init__(params, {"lr": lr, "maximize": maximize})
        if self.topology.replicas == 1:
            logger.warning("one replica has no curvature: ReplicaNewton steps as SGD at rate lr")

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "topology", "spread", "secant_data", "damping", "rtol", "fallbacks", "_together")
        return super().__getstate__() | {name: getattr(self, name) for name in own} | {"curvature": None}

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
                as secants come from own data. None takes the SGD step with the gradients at hand; the replicas keep
                their displacements.

        Returns:
            The loss, mean over replicas; None without a closure.

        Raises:
            TypeError: if the closure cannot evaluate replicas.
            ValueError: if a gradient is sparse, no parameter requires one, or the closure's topology has another
                number of replicas.
            FloatingPointError: if a loss or gradient is not finite; the parameters are then as before the step. Raised
                by all processes.
        """
        if closure is None and not self.topology.distributed:
            self._step_on_given_gradients()
            return None
        self._announce(_STEP if closure is not None else _STEP_ON_GIVEN)
        return self._take_step(closure)

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
        while True:
            call, steps = self._announce(_CLOSE)
            if call == _CLOSE:
                return
            try:
                if call == _SYNCHRONISE:
                    self._synchronise()
                elif call == _SAVE:
                    if save is None:
                        raise RuntimeError("the workers save a checkpoint: servers need optimizer.serve(save=...)")
                    save(steps)
                else:
                    self._take_step(_no_data if call == _STEP else None)
            except FloatingPointError as error:
                logger.warning("step given up: %s", error)

    def close(self) -> None:
        """Tell the servers that there are no more steps; nothing to do where there are none."""
        self._announce(_CLOSE)

    def announce_checkpoint(self, step: int) -> None:
        """Tell the servers to save a checkpoint; nothing to do where there are none. `save_checkpoint` calls it.

        Args:
            step: steps of training so far.
        """
        self._announce(_SAVE, step)

    def _announce(self, call: int, steps: int = 0) -> tuple[int, int]:
        """Tell processes without a replica what comes next and with which rates; returns what the first worker says."""
        rates = [float(group["lr"]) for group in self.param_groups]
        message: list[float] = self.topology.agree(torch.tensor([call, steps, *rates], dtype=torch.float64)).tolist()
        if message[2:] != rates:
            for group, rate in zip(self.param_groups, message[2:], strict=True):
                group["lr"] = rate
        return int(message[0]), int(message[1])

    def _take_step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        parameters = self._trained()
        if not parameters:
            raise ValueError("no parameter of the optimizer requires a gradient")
        shared, W = self._stand(parameters)
        points = self.topology.points(_flat(parameters), W)
        rates = self._by_element(parameters, [float(group["lr"]) for group in self.param_groups])
        losses, gradients = self._evaluate(closure or _given(parameters), parameters, points, "own")
        mean = gradients.mean(dim=0)
        if closure is None:
            self._settle(parameters, shared - rates * mean, W)
            return None
        self.curvature = self._observe(closure, parameters, points, W, gradients)
        direction = self._direction(mean, rates)
        step = self.state[parameters[0]].get("step", 0)
        self._settle(
            parameters, shared - rates * direction, self.spread.displacements(gradients, rates, step), step + 1
        )
        return losses.mean().to(points)

    @torch.no_grad()
    def synchronise(self) -> None:
        """Put the module at the parameters that all replicas share, the same bits in every process.

        Where replicas live in one process it stands there anyway. The next step moves them apart again.
        """
        if self.topology.distributed:
            self._announce(_SYNCHRONISE)
            self._synchronise()

    @property
    def together(self) -> bool:
        """Whether the module stands at the shared parameters: after `synchronise`, until the next step."""
        return self._together or not self.topology.distributed

    def _synchronise(self) -> None:
        parameters = self._trained()
        if "shared" in self.state[parameters[0]]:
            self._write(parameters, self.topology.whole(self.state[parameters[0]]["shared"], _size(parameters)))
            self._together = True

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
            for name in {"displacements", "shared"} & saved.keys():
                self.state[parameter][name] = saved[name].to(parameter.device, copy=True)
        self._together = True

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _stand(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Columns of the shared parameters, `(n,)`, and of the displacements, `(M, n)`; the module where it belongs."""
        topology, dtype = self.topology, working_dtype(*parameters)
        if not topology.distributed:
            return _flat(parameters).to(dtype), self._displacements(parameters)
        state = self.state[parameters[0]]
        width = topology.part(_flat(parameters)).numel()
        if tuple(state.get("displacements", torch.empty(0)).shape) != (topology.replicas, width):
            topology.spread_from_first(parameters, "first parameters")
            shared = topology.part(_flat(parameters).to(dtype))
            return shared, shared.new_zeros(topology.replicas, width)
        shared, W = state["shared"], state["displacements"]
        if self._together:
            self._write(parameters, topology.published(shared, W, _size(parameters)))
            self._together = False
        return shared, W

    def _settle(self, parameters: list[Tensor], shared: Tensor, W: Tensor, step: int | None = None) -> None:
        """Move all to new shared parameters and displacements, and keep them."""
        self._write(parameters, self.topology.published(shared, W, _size(parameters)))
        if self.topology.distributed:
            self.state[parameters[0]] |= {"displacements": W, "shared": shared}
        else:
            self._part(parameters, W)
        if step is not None:
            for parameter in parameters:
                self.state[parameter]["step"] = step

    def _evaluate(
        self, closure: Callable[[], Tensor], parameters: list[Tensor], points: Tensor, data: Data
    ) -> tuple[Tensor, Tensor]:
        """Losses `(M,)`, and columns `(M, n)` of the gradients of what is minimised: negated if a group maximizes."""
        losses, rows = self.topology.gradients(closure, parameters, points, data)
        rows = rows.to(points.dtype)
        finite = torch.isfinite(losses) & torch.isfinite(rows.sum(dim=1))
        table = self.topology.by_replica(torch.stack((finite.to(losses), losses), dim=1))
        if not bool(table[:, 0].all()):
            replica = int((table[:, 0] == 0.0).nonzero()[0])
            loss = float(table[replica, 1])
            raise FloatingPointError(f"loss or gradient of replica {replica} is not finite (loss {loss})")
        signs = [-1.0 if group["maximize"] else 1.0 for group in self.param_groups]
        return table[:, 1], self.topology.columns(rows).mul_(self._by_element(parameters, signs))

    def _observe(
        self, closure: Callable[[], Tensor], parameters: list[Tensor], points: Tensor, W: Tensor, gradients: Tensor
    ) -> SecantCurvature | None:
        """Secants of this step; None before the replicas have parted."""
        low, high = torch.aminmax(W) if W.numel() else (W, W)
        apart = bool((low != high).any())
        if not bool(self.topology.total(torch.tensor(apart, dtype=torch.float64))):
            return None
        if self.secant_data == "common":
            _, gradients = self._evaluate(closure, parameters, points, "common")
        total = self.topology.total if self.topology.distributed else None
        return SecantCurvature(W, gradients, rtol=self.rtol, damping=self.damping, total=total)

    def _direction(self, mean_gradient: Tensor, rates: Tensor | float) -> Tensor:
        """What the rule makes of the mean gradient, or the gradient itself where that would not descend."""
        curvature = self.curvature
        if curvature is None:
            return mean_gradient
        if self.rule == "paper":
            direction = curvature.inverse_hvp(mean_gradient)
        else:
            direction = saddle_free_inverse_hvp(
                curvature.eigenvalues,
                curvature.eigenvectors,
                mean_gradient,
                damping=self.damping,
                rtol=self.rtol,
                total=self.topology.total,
            )
        descent = direction * rates if isinstance(rates, Tensor) else direction
        if float(self.topology.total((descent @ mean_gradient).double().cpu())) > 0.0:
            return direction
        self.fallbacks += 1
        return mean_gradient

    def _displacements(self, parameters: list[Tensor]) -> Tensor:
        """Rows d_m, `(M, N)`; zero as long as the replicas have not parted."""
        M = self.topology.replicas
        dtype = working_dtype(*parameters)
        pieces = []
        for parameter in parameters:
            rows = self.state.get(parameter, {}).get("displacements")
            if rows is None or len(rows) != M:
                rows = torch.zeros(M, *parameter.shape, dtype=dtype, device=parameter.device)
            pieces.append(rows.flatten(start_dim=1) if parameter.dim() else rows[:, None])
        return torch.cat(pieces, dim=1).to(dtype)

    def _part(self, parameters: list[Tensor], displacements: Tensor) -> None:
        """Keep the displacements by parameter, so that checkpoints follow the parameters."""
        pieces = torch.split(displacements, [p.numel() for p in parameters], dim=1)
        for parameter, piece in zip(parameters, pieces, strict=True):
            self.state[parameter]["displacements"] = piece.reshape(len(displacements), *parameter.shape)

    def _by_element(self, parameters: list[Tensor], by_group: list[float]) -> Tensor | float:
        """A number of every group: one for all, or for every column held here, `(n,)`, where groups differ."""
        if len(set(by_group)) == 1:
            return by_group[0]
        elements = torch.cat(
            [
                torch.full((p.numel(),), value, dtype=working_dtype(*parameters), device=p.device)
                for value, group in zip(by_group, self.param_groups, strict=True)
                for p in group["params"]
                if p.requires_grad
            ]
        )
        return self.topology.part(elements)

    @staticmethod
    def _write(parameters: list[Tensor], values: Tensor) -> None:
        """`w ← values`, `(N,)`."""
        pieces = torch.split(values, [p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.reshape(parameter.shape))

    def _step_on_given_gradients(self) -> None:
        """SGD step on what is in `.grad`; parameters without gradient stay."""
        given = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.layout != torch.strided for _, gradient, _ in given):
            raise ValueError("sparse gradients are not supported")
        for parameter, gradient, group in given:
            sign = 1 if group["maximize"] else -1
            parameter.add_(gradient, alpha=sign * float(group["lr"]))


def _check_group(group: dict[str, Any]) -> None:
    if not 0.0 <= float(group["lr"]) < float("inf"):
        raise ValueError(f"lr={group['lr']} must be finite and >= 0")
    for parameter in group["params"]:
        if parameter.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(f"parameters must be dense and real, got {parameter.layout}, {parameter.dtype}")


def _flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in parameters])


def _size(parameters: list[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _no_data() -> Tensor:
    """Closure of a process without a replica, which is never called."""
    raise RuntimeError("a process without a replica has no data")


def _given(parameters: list[Tensor]) -> Callable[[], Tensor]:
    """Closure that finds the gradients as they are."""
    gradients = [parameter.grad for parameter in parameters]

    def closure() -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return parameters[0].new_zeros(())

    return closure
