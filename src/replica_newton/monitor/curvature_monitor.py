"""CurvatureMonitor: live Hessian eigenpairs, sharpness and noise scale beside any optimizer."""

import logging
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from replica_newton.curvature.gram import column_chunks, inner_products
from replica_newton.curvature.low_rank import damped_inverse_hvp, low_rank_hvp
from replica_newton.monitor.observation import CurvatureObservation
from replica_newton.monitor.probes import Loss, differences, exact_products, gradient_of, require_precision
from replica_newton.monitor.stability import added_weight_decay, has_metric, is_known, metric_of, stable_sharpness
from replica_newton.spread import TrackedSubspace
from replica_newton.topology import LocalClosure, ReplicaClosure, Simulated, TreeReduction

logger = logging.getLogger(__name__)

_SAME = 1e-3
"""Relative difference of two gradients of the same loss at the same point, at most: rounding is far below."""
_STABLE_AGAIN = 0.9
"""Stability ratio below which the next crossing of 1 is worth a warning: at the edge it hovers around 1."""


class CurvatureMonitor:
    """Top Hessian eigenpairs of a network while any optimizer trains it, for a gradient or two now and then.

        monitor = CurvatureMonitor(model, every=10)
        ...
        loss.backward()
        monitor.observe(lambda: criterion(model(x), y))      # before optimizer.step()

    At every `every`-th call the gradient is differentiated once more, along a direction q from a `TrackedSubspace`:
    that is `H q` on the batch. The closure of M replicas probes M directions at once, each on its own shard. With a
    topology of several processes, each probes one direction on its own batch, and holds its columns of the tracked
    space. Training is not touched: parameters, gradients, buffers (batch-norm statistics) and random state are as
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
        dtype: in which the pairs are kept, fp32 or bfloat16; see `TrackedSubspace`. Over P processes a space takes
            2 · rank · N/P numbers of it in each: with bfloat16 no more than rank · N/P floats.
        topology: where the replicas live. With processes, `observe` is called by all of them, at the same parameters,
            each with the loss of its own batch.
        relative_step: None differentiates twice, which is exact. Otherwise `H q ≈ (g(w + h q) − g(w))/h` on the same
            data with the same random numbers, h over `max(‖w‖, 1)`, for models that can be differentiated once, or to
            reuse gradients. 1e-3 weighs the rounding of fp32 gradients against the change of the Hessian along the way.
            Where a kink (ReLU, max-pooling) is crossed, the jump of the gradient over h counts as curvature: there 3e-3
            does better.
        reuse_gradient: with `relative_step`, take the gradient at w from `.grad` instead of evaluating it: one gradient
            a probe. `.grad` must be that of the very same loss, not clipped, scaled or accumulated, and the network
            draw no random numbers; of several processes each needs that of its own batch, before an all-reduce. The
            first probe evaluates it anyway, and compares. Simulated replicas have one `.grad`, and always evaluate.
        seed: of the first directions.

    Attributes:
        optimizer: the one that is attached, None without.
        subspace: what follows H.
        preconditioned: what follows `P^-½ H P^-½` beside Adam and AdamW, else None.
        last: newest `CurvatureObservation`, None before the first.
        samples_evaluated: samples whose gradient the probes computed, a product counting as another gradient; counted
            for closures of a topology only.

    Raises:
        TypeError: if a parameter is neither fp32 nor fp64: curvature from gradients in half precision is rounding; or
            the topology is of another kind.
        ValueError: if an option is out of range, the model has nothing to train, or the optimizer lacks a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        rank: int = 8,
        every: int = 10,
        smoothing: float = 0.25,
        dtype: torch.dtype = torch.float32,
        topology: Simulated | TreeReduction | None = None,
        relative_step: float | None = None,
        reuse_gradient: bool = False,
        seed: int = 0,
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        require_precision(self._parameters)
        if every < 1:
            raise ValueError(f"{every=} must be >= 1")
        if relative_step is not None and not 0.0 < relative_step < 1.0:
            raise ValueError(f"{relative_step=} must be in (0, 1), or None")
        if reuse_gradient and relative_step is None:
            raise ValueError("reuse_gradient=True needs a relative_step: exact products evaluate the gradient anyway")
        if topology is not None and not isinstance(topology, Simulated | TreeReduction):
            raise TypeError(f"topology must be Simulated or TreeReduction, got {type(topology).__name__}")
        if optimizer is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if any(id(parameter) not in held for parameter in self._parameters):
                raise ValueError("optimizer must hold every parameter of the model that requires a gradient")
        self._model = model
        self.optimizer = optimizer
        self.topology = topology
        self._processes = topology if isinstance(topology, TreeReduction) else None
        self._size = sum(parameter.numel() for parameter in self._parameters)
        if self._processes is not None:
            self._processes.lay_out(self._parameters)
        self._shared = None if self._processes is None else _Shared(self._processes, every)
        new_space = partial(
            TrackedSubspace,
            rank,
            self._size,
            smoothing=smoothing,
            device=self._parameters[0].device,
            dtype=dtype,
            columns=self._shared,
        )
        self.subspace = new_space(seed=seed)
        self.preconditioned: TrackedSubspace | None = None
        if optimizer is not None and is_known(optimizer) and has_metric(optimizer):
            self.preconditioned = new_space(seed=seed + 1)
        self._preconditioned_is_next = False
        self._unstable = False
        self.every = every
        self.relative_step = relative_step
        self.reuse_gradient = reuse_gradient
        self._reuse_is_right = False
        self.steps = 0
        self.last: CurvatureObservation | None = None
        self.samples_evaluated = 0

    def observe(self, evaluate: Loss | ReplicaClosure | LocalClosure) -> CurvatureObservation | None:
        """Probe, if one is due.

        To be called after `backward`: the probe writes to the parameters and back, which autograd sees, so that it
        refuses a graph made before. An autocast around the call is suspended.

        Args:
            evaluate: returns the loss of the current batch, with its graph and in full precision; or a closure made by
                a topology.

        Returns:
            What was seen, None where no probe was due.

        Raises:
            FloatingPointError: if a gradient is not finite; the tracked space is then as before.
            RuntimeError: if the model cannot be differentiated twice; see `relative_step`.
            TypeError: if the closure is not of the monitor's topology.
            ValueError: if the closure has another number of replicas than the topology, or `.grad` is not there or not
                the gradient of the loss, where it is to be reused.
        """
        step, self.steps = self.steps, self.steps + 1
        if step % self.every:
            return None
        with torch.autocast(self._parameters[0].device.type, enabled=False):
            self.last = self._probe(step, evaluate)
        return self.last

    @property
    def eigenvectors(self) -> Tensor:
        """Ritz vectors of the newest eigenvalues, `(rank, N)` fp32, orthonormal rows; empty in the first sweep.

        All processes of a topology must ask for them together.
        """
        vectors = self.subspace.eigenvectors
        if self._processes is None or not len(vectors):
            return vectors
        self._processes.lay_out(self._parameters)
        return torch.stack([self._processes.whole(row) for row in vectors])

    def hvp(self, z: Tensor, *, bulk: float = 0.0) -> Tensor:
        """Hessian-vector product on the tracked pairs; see `TrackedSubspace.hvp`; by all processes together."""
        return low_rank_hvp(self.subspace.eigenvalues, self.eigenvectors, z, bulk=bulk)

    def inverse_hvp(self, z: Tensor, damping: float, *, bulk: float = 0.0, absolute: bool = False) -> Tensor:
        """Product with the damped inverse on the tracked pairs; see `TrackedSubspace.inverse_hvp`; by all together."""
        pairs = self.subspace.eigenvalues, self.eigenvectors
        return damped_inverse_hvp(*pairs, z, damping, bulk=bulk, absolute=absolute)

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

    def _probe(self, step: int, evaluate: Loss | ReplicaClosure | LocalClosure) -> CurvatureObservation:
        if self._processes is not None:
            self._processes.lay_out(self._parameters)
        losses, replicas, samples = self._losses(evaluate)
        space, contraction, decay = self._next_space()
        directions = space.directions(replicas)
        # In w̃ = P^½ w, a step q̃ is one of P^-½ q̃ in w.
        displacements = directions if contraction is None else contraction * directions
        base, responses = self._columns(*self._measure(losses, self._rows(displacements)))
        if samples is not None:
            self.samples_evaluated += 2 * samples
        if contraction is not None:
            responses = contraction * (responses + decay * displacements)
        try:
            space.observe(responses)
        except FloatingPointError as error:
            raise FloatingPointError(f"gradient at step {step} is not finite: there is no curvature to see") from error
        self._preconditioned_is_next = space is self.subspace
        return self._summarise(step, base, samples)

    def _losses(self, evaluate: Loss | ReplicaClosure | LocalClosure) -> tuple[list[Loss], int, int | None]:
        """The losses to be evaluated here, the number of replicas everywhere, and the samples of all, if known."""
        if isinstance(evaluate, LocalClosure if self._processes is None else ReplicaClosure):
            raise TypeError(f"closure must be of the monitor's topology={self.topology}, got {type(evaluate).__name__}")
        if self._processes is not None:
            losses = evaluate.losses() if isinstance(evaluate, LocalClosure) else [evaluate]
            samples = evaluate.samples if isinstance(evaluate, LocalClosure) else None
            return losses, self._processes.replicas, samples
        if isinstance(evaluate, ReplicaClosure):
            if self.topology is not None and self.topology.replicas != evaluate.replicas:
                raise ValueError(f"closure evaluates {evaluate.replicas} replicas, the monitor's is {self.topology}")
            return evaluate.losses(), evaluate.replicas, evaluate.samples
        if self.topology is not None:
            raise TypeError(f"{self.topology} needs a closure of topology.closure(module, criterion, inputs, targets)")
        return [evaluate], 1, None

    def _measure(self, losses: list[Loss], directions: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients and Hessian products, `(k, N)`."""
        if self.relative_step is None:
            return exact_products(self._model, self._parameters, losses, directions)
        given = self._given_gradient(losses[0])[None] if self.reuse_gradient and len(losses) == 1 else None
        return differences(
            self._model, self._parameters, losses, directions, relative_step=self.relative_step, gradients=given
        )

    def _rows(self, columns: Tensor) -> Tensor:
        """Rows of the replicas here, from the columns of all rows that are here."""
        if self._processes is None:
            return columns
        return self._processes.row(columns)[None]

    def _columns(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Columns of all rows that are to be here, from the rows of the replicas here."""
        return rows if self._processes is None else self._processes.columns(*(own[0] for own in rows))

    def _total(self, sums: Tensor) -> Tensor:
        return sums if self._shared is None else self._shared.total(sums)

    def _next_space(self) -> tuple[TrackedSubspace, Tensor | None, float]:
        """The space that is to be probed, the diagonal of P^-½ for the preconditioned one, and the decay within it."""
        if self.optimizer is not None and self.preconditioned is not None and self._preconditioned_is_next:
            metric, decay = metric_of(self.optimizer, self._parameters), added_weight_decay(self.optimizer)
            if metric is not None and decay is not None:
                contraction = metric.rsqrt()
                part = contraction if self._processes is None else self._processes.part(contraction)
                return self.preconditioned, part, decay
        return self.subspace, None, 0.0

    def _summarise(self, step: int, gradients: Tensor, batch: int | None) -> CurvatureObservation:
        eigenvalues = self.subspace.eigenvalues
        sharpness = _largest(eigenvalues)
        preconditioned_sharpness, stability_ratio = self._stability(sharpness)
        self._warn(step, stability_ratio)
        mean = gradients.mean(dim=0, keepdim=True)
        numbers = torch.cat((inner_products(mean, mean)[0], _squared_deviations(gradients, mean)[None]))
        residuals, within, numbers = self.subspace.look(mean, numbers)
        squared, scattered = numbers.tolist()
        captured = float(within.square().sum()) / squared if squared > 0.0 else 0.0
        return CurvatureObservation(
            step=step,
            eigenvalues=eigenvalues,
            residuals=residuals,
            uncertainties=self.subspace.uncertainties,
            sharpness=sharpness,
            preconditioned_sharpness=preconditioned_sharpness,
            stability_ratio=stability_ratio,
            learning_rate=1.0 / sharpness if sharpness > 0.0 else math.nan,
            captured_gradient_fraction=captured,
            gradient_noise_scale=None if batch is None else _noise_scale(scattered, squared, len(gradients), batch),
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

    def _given_gradient(self, loss: Loss) -> Tensor:
        """What is in `.grad`, `(N,)`; the first time it is compared with the gradient of the loss."""
        given = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.detach().flatten() for p in self._parameters]
        )
        if self._reuse_is_right:
            return given
        missing = all(parameter.grad is None for parameter in self._parameters)
        own = given if missing else gradient_of(self._model, self._parameters, loss)
        off = float(torch.linalg.vector_norm(given - own)) > _SAME * float(torch.linalg.vector_norm(own))
        # All processes go on, or none does.
        any_missing, any_off = self._total(torch.tensor([missing, off], dtype=torch.float64)).tolist()
        if any_missing:
            raise ValueError("reuse_gradient=True needs the .grad that backward leaves, got none")
        if any_off:
            raise ValueError(
                "reuse_gradient=True needs a .grad that is the gradient of this loss, got another: averaged over "
                "processes, clipped, scaled, accumulated, from an autocast, or of other random numbers"
            )
        self._reuse_is_right = True
        return given


class _Shared(NamedTuple):
    """How processes share the rows of a space that is probed once in so many steps."""

    processes: TreeReduction
    every: int

    def part(self, vector: Tensor) -> Tensor:
        return self.processes.part(vector)

    def total(self, sums: Tensor) -> Tensor:
        return self.processes.total(sums, steps=self.every)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else math.nan


def _squared_deviations(rows: Tensor, mean: Tensor) -> Tensor:
    """Sum over all rows of the squared distance from their mean, `(1, N)`, fp64 on the CPU."""
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for some, centre in column_chunks(rows, mean):
        total += (some - centre).double().square().sum()
    return total.cpu()


def _noise_scale(scattered: float, squared: float, M: int, batch: int) -> float | None:
    """`b S² / |g|²` with M gradients of b samples each: S² their variance, `|g|² = ‖ḡ‖² − S²/M` the signal."""
    if M < 2:
        return None
    variance = scattered / (M - 1)
    signal = squared - variance / M
    return batch / M * variance / signal if signal > 0.0 else float("inf")
