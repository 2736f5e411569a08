"""CurvatureMonitor: live Hessian eigenpairs, sharpness and noise scale beside any optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replica_newton.spread import TrackedSubspace
from replica_newton.topology import ReplicaClosure


@dataclass(frozen=True, eq=False)
class CurvatureObservation:
    """What a monitor saw at one step.

    Attributes:
        step: calls of `observe` before this one.
        eigenvalues: `(rank,)` fp64, Hessian eigenvalues, signed, by magnitude descending; empty until every direction
            has been probed once.
        residuals: `(rank,)` fp64, `‖H x − θ x‖` of each pair; a value below its residual is not to be trusted.
        sharpness: largest eigenvalue, nan until there is one.
        learning_rate: `1/sharpness`, LeCun's optimal rate for plain gradient descent; nan where sharpness is not
            positive.
        captured_gradient_fraction: `‖X ḡ‖²/‖ḡ‖²`, share of the squared gradient inside the tracked space.
        gradient_noise_scale: batch size, in samples, at which noise and signal of the mean gradient are equal
            (McCandlish et al. 2018, the simple noise scale); None with fewer than two replicas, inf where the
            replicas' gradients show no signal.
    """

    step: int
    eigenvalues: Tensor
    residuals: Tensor
    sharpness: float
    learning_rate: float
    captured_gradient_fraction: float
    gradient_noise_scale: float | None


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

    Args:
        model: the network; parameters that require no gradient are left out.
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
        last: newest `CurvatureObservation`, None before the first.
        samples_evaluated: samples whose gradient the probes computed; counted for a `ReplicaClosure` only.

    Raises:
        TypeError: if a parameter is neither fp32 nor fp64: differences of gradients in half precision are rounding.
        ValueError: if an option is out of range or the model has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
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
        self._model = model
        size = sum(parameter.numel() for parameter in self._parameters)
        self.subspace = TrackedSubspace(rank, size, smoothing=smoothing, seed=seed, device=self._parameters[0].device)
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

    def hvp(self, z: Tensor, *, bulk: float = 0.0) -> Tensor:
        """Hessian-vector product on the tracked pairs; see `TrackedSubspace.hvp`."""
        return self.subspace.hvp(z, bulk=bulk)

    def inverse_hvp(self, z: Tensor, damping: float, *, bulk: float = 0.0, absolute: bool = False) -> Tensor:
        """Product with the damped inverse on the tracked pairs; see `TrackedSubspace.inverse_hvp`."""
        return self.subspace.inverse_hvp(z, damping, bulk=bulk, absolute=absolute)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the tracked space and the count of steps."""
        return {"steps": self.steps, "subspace": self.subspace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a monitor of the same rank over the same parameters.

        Args:
            state: what `state_dict()` returned.

        Raises:
            ValueError: if rank or number of parameters differ.
        """
        self.subspace.load_state_dict(state["subspace"])
        self.steps = state["steps"]

    def _probe(self, step: int, evaluate: Callable[[], Tensor] | ReplicaClosure) -> CurvatureObservation:
        closure = evaluate if isinstance(evaluate, ReplicaClosure) else None
        evaluated = 0 if closure is None else closure.samples_evaluated
        directions = self.subspace.directions(1 if closure is None else closure.replicas)
        length = self.relative_step * max(float(torch.linalg.vector_norm(self._point())), 1.0)
        if self.reuse_gradient and closure is None:
            base = self._given_gradient()[None]
        else:
            base = self._gradients(evaluate, torch.zeros_like(directions))
        displaced = self._gradients(evaluate, length * directions)
        if closure is not None:
            self.samples_evaluated += closure.samples_evaluated - evaluated
        responses = (displaced - base) / length
        if not bool(torch.isfinite(responses).all()):
            raise FloatingPointError(f"gradient at step {step} is not finite: there is no curvature to see")
        self.subspace.observe(responses)
        return self._summarise(step, base, None if closure is None else closure.samples)

    def _summarise(self, step: int, gradients: Tensor, batch: int | None) -> CurvatureObservation:
        eigenvalues, vectors = self.subspace.eigenvalues, self.subspace.eigenvectors
        sharpness = float(eigenvalues.max()) if eigenvalues.numel() else float("nan")
        mean = gradients.mean(dim=0)
        squared = float(mean @ mean)
        captured = float((vectors @ mean.to(vectors.dtype)).square().sum()) / squared if squared > 0.0 else 0.0
        return CurvatureObservation(
            step=step,
            eigenvalues=eigenvalues,
            residuals=self.subspace.residuals,
            sharpness=sharpness,
            learning_rate=1.0 / sharpness if sharpness > 0.0 else float("nan"),
            captured_gradient_fraction=captured,
            gradient_noise_scale=None if batch is None else _noise_scale(gradients, batch),
        )

    def _gradients(self, evaluate: Callable[[], Tensor] | ReplicaClosure, displacements: Tensor) -> Tensor:
        """Gradients, `(count, N)`, at displaced parameters; leaves no trace in the model."""
        with _untouched(self._model):
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


def _noise_scale(gradients: Tensor, batch: int) -> float | None:
    """`b S² / |g|²` with M gradients of b samples each: S² their variance, `|g|² = ‖ḡ‖² − S²/M` the signal."""
    M = len(gradients)
    if M < 2:
        return None
    mean = gradients.mean(dim=0)
    variance = float((gradients - mean).square().sum()) / (M - 1)
    signal = float(mean @ mean) - variance / M
    return batch / M * variance / signal if signal > 0.0 else float("inf")


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers and random state afterwards, bit for bit."""
    buffers = [(module, *item) for module in model.modules() for item in module.named_buffers(recurse=False)]
    # What `expand` made cannot be written to, neither by the model.
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if not _is_expanded(buffer))]
    with torch.no_grad():
        saved = [tensor.clone() for tensor in tensors]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    torch.clear_autocast_cache()  # casts of the parameters would not see their displacement, or outlive it
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        torch.clear_autocast_cache()
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)  # a forward pass may have put another tensor in its place


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
