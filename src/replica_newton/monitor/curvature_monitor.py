"""CurvatureMonitor: live Hessian eigenpairs, sharpness and noise scale beside any optimizer."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton.monitor.observation import CurvatureObservation
from replica_newton.monitor.stability import added_weight_decay, has_metric, is_known, metric_of, stable_sharpness
from replica_newton.monitor.untouched import untouched
from replica_newton.spread import TrackedSubspace
from replica_newton.topology import ReplicaClosure

logger = logging.getLogger(__name__)

_STABLE_AGAIN = 0.9
"""Stability ratio below which the next crossing of 1 is worth a warning: at the edge it hovers around 1."""


class CurvatureMonitor:
    """Top Hessian eigenpairs of a network while any optimizer trains it, for a gradient or two now and then.

        monitor = CurvatureMonitor(model, every=10)
        ...
        loss.backward()
        monitor.observe(lambda: criterion(model(x), y))      # before optimizer.step()

    At every `every`-th call the gradient is evaluated twice on the same batch, with the same random numbers, at w and
    at `w + h q`: the difference over h is `H q` on that batch, without sampling noise in the difference. The direction
    q comes from a `TrackedSubspace`. A `ReplicaClosure` over M replicas probes M directions at once, each on its own
    shard. Training is not touched: parameters, gradients, buffers (batch-norm statistics) and random state are as
    before, bit for bit.

    With `optimizer`, the monitor also says how close to instability it trains, and logs a warning when it passes the
    limit. The metric of Adam and AdamW calls for eigenvalues of another matrix, `P^-½ H P^-½`: a second space follows
    them, and the two take turns, a probe each. So the price is the same, and each space sees half of the probes.

    Args:
        model: the network; parameters that require no gradient are left out.
        optimizer: what trains the model, all parameters that require a gradient; only read. Of SGD, Adam and AdamW the
            limit of stability is known.
        rank: number of eigenpairs to follow.
        every: calls of `observe` from one probe to the next.
        smoothing: see `TrackedSubspace`.
        relative_step: h over `max(‖w‖, 1)`; q has unit length. The default weighs the rounding of fp32 gradients
            against the change of the Hessian along the way. Where a kink (ReLU, max-pooling) is crossed, the jump of
            the gradient over h counts as curvature.
        reuse_gradient: take the gradient at w from `.grad` instead of evaluating it: one gradient a probe. Right only
            if `.grad` is that of the very same loss, not clipped, scaled or accumulated, and the network draws no
            random numbers. Replicas need a gradient each, and always evaluate it.
        seed: of the first directions.

    Attributes:
        optimizer: the one that is attached, None without.
        subspace: what follows H.
        preconditioned: what follows `P^-½ H P^-½` beside Adam and AdamW, else None.
        last: newest `CurvatureObservation`, None before the first.
        samples_evaluated: samples whose gradient the probes computed; counted for a `ReplicaClosure` only.

    Raises:
        TypeError: if a parameter is neither fp32 nor fp64: differences of gradients in half precision are rounding.
        ValueError: if an option is out of range, the model has nothing to train, or the optimizer lacks a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        rank: int = 8,
        every: int = 10,
        smoothing: float = 0.5,
        relative_step: float = 1e-3,
        reuse_gradient: bool = False,
        seed: int = 0,
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        for parameter in self._parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"parameters must be fp32 or fp64 to be probed, got {parameter.dtype}")
        if every < 1:
            raise ValueError(f"{every=} must be >= 1")
        if not 0.0 < relative_step < 1.0:
            raise ValueError(f"{relative_step=} must be in (0, 1)")
        if optimizer is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if any(id(parameter) not in held for parameter in self._parameters):
                raise ValueError("optimizer must hold every parameter of the model that requires a gradient")
        self._model = model
        self.optimizer = optimizer
        size = sum(parameter.numel() for parameter in self._parameters)
        self.subspace = TrackedSubspace(rank, size, smoothing=smoothing, seed=seed, device=self._parameters[0].device)
        self.preconditioned: TrackedSubspace | None = None
        if optimizer is not None and is_known(optimizer) and has_metric(optimizer):
            self.preconditioned = TrackedSubspace(
                rank, size, smoothing=smoothing, seed=seed + 1, device=self._parameters[0].device
            )
        self._preconditioned_is_next = False
        self._unstable = False
        self.every = every
        self.relative_step = relative_step
        self.reuse_gradient = reuse_gradient
        self.steps = 0
        self.last: CurvatureObservation | None = None
        self.samples_evaluated = 0

    def observe(self, evaluate: Callable[[], Tensor] | ReplicaClosure) -> CurvatureObservation | None:
        """Probe, if one is due.

        To be called after `backward`: the probe writes to the parameters and back, which autograd sees, so that it
        refuses a graph made before. An autocast around the call is suspended.

        Args:
            evaluate: returns the loss of the current batch, with its graph and in full precision; or the closure of M
                replicas.

        Returns:
            What was seen, None where no probe was due.

        Raises:
            FloatingPointError: if a gradient is not finite; the tracked space is then as before.
            ValueError: if there are more replicas than `rank`, or no `.grad` to reuse.
        """
        step, self.steps = self.steps, self.steps + 1
        if step % self.every:
            return None
        with torch.autocast(self._parameters[0].device.type, enabled=False):
            self.last = self._probe(step, evaluate)
        return self.last

    @property
    def eigenvectors(self) -> Tensor:
        """Ritz vectors of the newest eigenvalues, `(rank, N)` fp32, orthonormal rows; empty in the first sweep."""
        return self.subspace.eigenvectors

    def hvp(self, z: Tensor, *, bulk: float = 0.0) -> Tensor:
        """Hessian-vector product on the tracked pairs; see `TrackedSubspace.hvp`."""
        return self.subspace.hvp(z, bulk=bulk)

    def inverse_hvp(self, z: Tensor, damping: float, *, bulk: float = 0.0, absolute: bool = False) -> Tensor:
        """Product with the damped inverse on the tracked pairs; see `TrackedSubspace.inverse_hvp`."""
        return self.subspace.inverse_hvp(z, damping, bulk=bulk, absolute=absolute)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the tracked spaces and the count of steps."""
        return {
            "steps": self.steps,
            "subspace": self.subspace.state_dict(),
            "preconditioned": None if self.preconditioned is None else self.preconditioned.state_dict(),
            "preconditioned_is_next": self._preconditioned_is_next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a monitor of the same rank over the same parameters, beside the same optimizer.

        Args:
            state: what `state_dict()` returned.

        Raises:
            ValueError: if rank or number of parameters differ, or one has a preconditioned space and the other not.
        """
        if (state["preconditioned"] is None) != (self.preconditioned is None):
            raise ValueError("the state must be that of a monitor beside an optimizer of the same kind")
        if self.preconditioned is not None:
            self.preconditioned.load_state_dict(state["preconditioned"])
        self._preconditioned_is_next = state["preconditioned_is_next"]
        self.subspace.load_state_dict(state["subspace"])
        self.steps = state["steps"]

    def _probe(self, step: int, evaluate: Callable[[], Tensor] | ReplicaClosure) -> CurvatureObservation:
        closure = evaluate if isinstance(evaluate, ReplicaClosure) else None
        evaluated = 0 if closure is None else closure.samples_evaluated
        space, contraction, decay = self._next_space()
        directions = space.directions(1 if closure is None else closure.replicas)
        # In w̃ = P^½ w, a step q̃ is one of P^-½ q̃ in w.
        displacements = directions if contraction is None else contraction * directions
        lengths = torch.linalg.vector_norm(displacements, dim=1, keepdim=True)
        step_length = self.relative_step * max(float(torch.linalg.vector_norm(self._point())), 1.0)
        if self.reuse_gradient and closure is None:
            base = self._given_gradient()[None]
        else:
            base = self._gradients(evaluate, torch.zeros_like(directions))
        displaced = self._gradients(evaluate, displacements * (step_length / lengths))
        if closure is not None:
            self.samples_evaluated += closure.samples_evaluated - evaluated
        responses = (displaced - base) * (lengths / step_length)
        if contraction is not None:
            responses = contraction * (responses + decay * displacements)
        if not bool(torch.isfinite(responses).all()):
            raise FloatingPointError(f"gradient at step {step} is not finite: there is no curvature to see")
        space.observe(responses)
        self._preconditioned_is_next = space is self.subspace
        return self._summarise(step, base, None if closure is None else closure.samples)

    def _next_space(self) -> tuple[TrackedSubspace, Tensor | None, float]:
        """The space that is to be probed, the diagonal of P^-½ for the preconditioned one, and the decay within it."""
        if self.optimizer is not None and self.preconditioned is not None and self._preconditioned_is_next:
            metric, decay = metric_of(self.optimizer, self._parameters), added_weight_decay(self.optimizer)
            if metric is not None and decay is not None:
                return self.preconditioned, metric.rsqrt(), decay
        return self.subspace, None, 0.0

    def _summarise(self, step: int, gradients: Tensor, batch: int | None) -> CurvatureObservation:
        eigenvalues, vectors = self.subspace.eigenvalues, self.subspace.eigenvectors
        sharpness = _largest(eigenvalues)
        preconditioned_sharpness, stability_ratio = self._stability(sharpness)
        self._warn(step, stability_ratio)
        mean = gradients.mean(dim=0)
        squared = float(mean @ mean)
        captured = float((vectors @ mean.to(vectors.dtype)).square().sum()) / squared if squared > 0.0 else 0.0
        return CurvatureObservation(
            step=step,
            eigenvalues=eigenvalues,
            residuals=self.subspace.residuals,
            uncertainties=self.subspace.uncertainties,
            sharpness=sharpness,
            preconditioned_sharpness=preconditioned_sharpness,
            stability_ratio=stability_ratio,
            learning_rate=1.0 / sharpness if sharpness > 0.0 else math.nan,
            captured_gradient_fraction=captured,
            gradient_noise_scale=None if batch is None else _noise_scale(gradients, batch),
        )

    def _stability(self, sharpness: float) -> tuple[float | None, float | None]:
        """Preconditioned sharpness and stability ratio."""
        if self.optimizer is None or not is_known(self.optimizer):
            return None, None
        decay, stable = added_weight_decay(self.optimizer), stable_sharpness(self.optimizer)
        if decay is None:
            return None, None
        preconditioned = sharpness + decay
        if self.preconditioned is not None:
            preconditioned = _largest(self.preconditioned.eigenvalues)
        return preconditioned, None if stable is None else preconditioned / stable

    def _warn(self, step: int, ratio: float | None) -> None:
        """Say that the limit of stability is passed, once each time."""
        if ratio is None:
            return
        if ratio > 1.0 and not self._unstable:
            self._unstable = True
            logger.warning(
                "step %d: rate × sharpness is %.2f of the limit of %s: oscillation or divergence may follow",
                step,
                ratio,
                type(self.optimizer).__name__,
            )
        elif ratio < _STABLE_AGAIN:
            self._unstable = False

    def _gradients(self, evaluate: Callable[[], Tensor] | ReplicaClosure, displacements: Tensor) -> Tensor:
        """Gradients, `(count, N)`, at displaced parameters; leaves no trace in the model."""
        with untouched(self._model):
            if isinstance(evaluate, ReplicaClosure):
                return evaluate.gradients(self._parameters, self._point() + displacements).gradients
            self._displace(displacements[0])
            with torch.enable_grad():
                gradients = torch.autograd.grad(evaluate(), self._parameters, materialize_grads=True)
            return torch.cat([gradient.detach().flatten() for gradient in gradients])[None]

    @torch.no_grad()
    def _displace(self, displacement: Tensor) -> None:
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, piece in zip(self._parameters, torch.split(displacement, sizes), strict=True):
            parameter.add_(piece.reshape(parameter.shape))

    def _point(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters])

    def _given_gradient(self) -> Tensor:
        if all(parameter.grad is None for parameter in self._parameters):
            raise ValueError("reuse_gradient=True needs the .grad that backward leaves, got none")
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.detach().flatten() for p in self._parameters]
        )


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else math.nan


def _noise_scale(gradients: Tensor, batch: int) -> float | None:
    """`b S² / |g|²` with M gradients of b samples each: S² their variance, `|g|² = ‖ḡ‖² − S²/M` the signal."""
    M = len(gradients)
    if M < 2:
        return None
    mean = gradients.mean(dim=0)
    variance = float((gradients - mean).square().sum()) / (M - 1)
    signal = float(mean @ mean) - variance / M
    return batch / M * variance / signal if signal > 0.0 else float("inf")
