"""Metric: the coordinates in which a step is taken, and the unit of length along each."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.bases import eigenvectors, orthonormal_bases
from replica_newton.optim.grouping import grouped, in_parts

MetricName = Literal["identity", "diagonal", "kronecker"]

_FLOOR = 16.0
"""A coordinate's root mean square beside that of its whole tensor, in units of rounding: what is below is no more."""
_LIMIT = 3.0
_TOGETHER, _TOGETHER_ON_DEVICE = 1 << 16, 1 << 25
"""Elements whose steps are taken by the same operations: what these need beside them must stay in the cache of a CPU,
and in the memory of a GPU."""


class Metric:
    """Turns gradients into steps of unit size, whatever the scale of loss and parameters.

    For a parameter of shape `(a, b)` with gradients G_t the step is

        U_t = Q_L (Q_Lᵀ Ḡ_t Q_R / √V_t) Q_Rᵀ,

    where Ḡ is the moving average of gradients (β₁) and V that of the squares of `Q_Lᵀ G Q_R` (β₂), both without bias,
    and the division is element by element. The metric says what Q and V are:

    - `identity`: no rotation, and the mean of V over the tensor in place of V: the averaged gradient, of unit scale.
    - `diagonal`: no rotation. This is Adam.
    - `kronecker`: `Q_L` and `Q_R` are the eigenbases of the moving averages of `G Gᵀ` and `Gᵀ G`. It is SOAP but for V.

    A parameter of more dimensions is taken as a matrix of its first and all others; one of fewer than two, and a side
    longer than `max_dimension`, are not rotated. The basis used at a step has not seen that step's gradient. It
    is an eigendecomposition at first, later one step of orthogonal iteration every `refresh_every` steps.

    When a basis turns, V is still that of the old coordinates. What is known in the new ones are the sums of its rows
    and of its columns, the diagonals of `Q_Lᵀ L Q_L` and `Q_Rᵀ R Q_R` of the averaged factors L and R: its rows are
    scaled to the ones, then its columns to the others. SOAP leaves V as it is, and so divides by variances of other
    directions until they are forgotten.

    The first step, of which there is no second moment yet, is the gradient in units of its own length. Moments are kept
    in units of the first gradient that is not zero, so that no scale of the loss over- or underflows. Without rotation
    and with β₁ = β₂ no element exceeds 1; where a basis has just turned one can, and is cut at 3.

    The state of a parameter is a dictionary of tensors that the caller keeps. It belongs to a whole parameter.

    Args:
        name: which metric.
        momentum: β₁, in [0, 1).
        decay: β₂ of second moments and factors, in [0, 1).
        refresh_every: steps from one basis to the next, >= 1.
        max_dimension: longest side that is rotated.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Kingma and Ba (2015), arXiv 1412.6980; Vyas et al. (2025), arXiv 2409.11321, algorithm 3; Deming and Stephan
        (1940), Ann. Math. Statist. 11, for the scaling to known sums.
    """

    STATE = ("unit", "momentum", "second_moment", "left", "right", "left_basis", "right_basis")
    """What the state of a parameter may hold, beside the number of its steps."""

    def __init__(
        self,
        name: MetricName = "kronecker",
        *,
        momentum: float = 0.9,
        decay: float = 0.95,
        refresh_every: int = 5,
        max_dimension: int = 1024,
    ) -> None:
        if name not in get_args(MetricName):
            raise ValueError(f"metric={name!r} must be one of {', '.join(get_args(MetricName))}")
        for option, value in (("momentum", momentum), ("decay", decay)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{option}={value} must be in [0, 1)")
        for option, value in (("refresh_every", refresh_every), ("max_dimension", max_dimension)):
            if not value >= 1:
                raise ValueError(f"{option}={value} must be >= 1")
        self.name = name
        self.momentum = momentum
        self.decay = decay
        self.refresh_every = refresh_every
        self.max_dimension = max_dimension

    def work(self, shape: Sequence[int]) -> float:
        """About how many multiply-adds a step of one parameter takes.

        Args:
            shape: of the parameter.

        Returns:
            Three rotations, of which the last goes back, the factors, the bases in every `refresh_every`-th step, and
            ten for every element.
        """
        sides = _sides(shape)
        elements = sides[0] * sides[1]
        rotated = [side for side in sides if 1 < side <= self.max_dimension] if self._rotates(shape) else []
        return sum(4 * elements * side + 3 * side**3 / self.refresh_every for side in rotated) + 10.0 * elements

    def unit_steps(self, states: Sequence[dict[str, Any]], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The steps of some parameters, and their states after them.

        Args:
            states: of the parameters, changed; empty before the first step.
            gradients: of the parameters, finite.

        Returns:
            U of each, of the gradient's shape, in fp32 (fp64 for an fp64 gradient). Elements are of the order of one
            and shrink as gradients disagree.
        """
        units: dict[int, Tensor] = {}
        for places in _taken_together(states, gradients):
            some = [states[place] for place in places]
            units |= zip(places, self._unit_steps(some, [gradients[place] for place in places]), strict=True)
        return [units[place] for place in range(len(gradients))]

    def _unit_steps(self, states: Sequence[dict[str, Any]], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Those of parameters of one dtype and device at the same step."""
        G = [one.to(working_dtype(one)).reshape(_sides(one.shape)) for one in gradients]
        step = states[0].get("step", 0) + 1
        for state in states:
            state["step"] = step
        G = list(torch._foreach_div(G, _units(states, G)))
        if step == 1:
            units = _per_root(G, [one.square().mean() for one in G])
        else:
            Z = [_rotated(state, one) for state, one in zip(states, G, strict=True)]
            V = _kept(states, "second_moment", Z)
            torch._foreach_mul_(V, self.decay)
            torch._foreach_addcmul_(V, Z, Z, value=1.0 - self.decay)
            averaged = _averaged(states, "momentum", G, self.momentum)
            means = [_rotated(state, one) for state, one in zip(states, averaged, strict=True)]
            unbiased = (1.0 - self.decay ** (step - 1)) ** 0.5 / (1.0 - self.momentum ** (step - 1))
            units = _per_root(means, [one.mean() for one in V] if self.name == "identity" else V, unbiased)
            units = [_rotated(state, one, back=True) for state, one in zip(states, units, strict=True)]
        turning = [place for place, one in enumerate(gradients) if self._rotates(one.shape)]
        self._turn([states[place] for place in turning], [G[place] for place in turning])
        return [unit.reshape(one.shape) for unit, one in zip(units, gradients, strict=True)]

    def divisor(self, state: dict[str, Any]) -> Tensor:
        """D, the root mean square of gradients, in their own unit, that `unit_steps` divides by.

        Args:
            state: of the parameter, after two steps at least.

        Returns:
            As a matrix, in the eigenbases.
        """
        V = state["second_moment"] / (1.0 - self.decay ** (state["step"] - 1))
        root = (V.mean().expand_as(V) if self.name == "identity" else V).sqrt() * state["unit"]
        return _floored([root])[0]

    def scaled(self, state: dict[str, Any], vector: Tensor, power: float, least: float) -> Tensor:
        """`D^power x`, with D of `divisor`.

        Args:
            state: of the parameter, after two steps at least.
            vector: x, of as many elements as the parameter, flat.
            power: any.
            least: elements of D are taken for no less.

        Returns:
            The product, flat.
        """
        D = self.divisor(state).clamp_min(least)
        return _rotated(state, _rotated(state, vector.view(D.shape)) * D**power, back=True).flatten()

    def _rotates(self, shape: Sequence[int]) -> bool:
        return self.name == "kronecker" and len(shape) > 1 and math.prod(shape) > 0

    def _turn(self, states: Sequence[dict[str, Any]], G: Sequence[Tensor]) -> None:
        """Take gradients into the factors; turn the bases if it is time, and scale V to what it is in them."""
        for side, matrices in (("left", G), ("right", [one.T for one in G])):
            with_side = [
                (state, matrix)
                for state, matrix in zip(states, matrices, strict=True)
                if 1 < len(matrix) <= self.max_dimension
            ]
            if not with_side:
                continue
            some = [state for state, _ in with_side]
            factors = _averaged(some, side, [matrix @ matrix.T for _, matrix in with_side], self.decay)
            self._turn_bases(some, side, factors)

    def _turn_bases(self, states: Sequence[dict[str, Any]], side: str, factors: Sequence[Tensor]) -> None:
        name, step = f"{side}_basis", states[0]["step"]
        first = [(state, factor) for state, factor in zip(states, factors, strict=True) if name not in state]
        later = [(state, factor) for state, factor in zip(states, factors, strict=True) if name in state]
        if step % self.refresh_every:
            later = []
        bases = [eigenvectors(factor) for _, factor in first]
        bases += orthonormal_bases([factor @ state[name] for state, factor in later])
        for (state, factor), basis in zip((*first, *later), bases, strict=True):
            state[name] = basis
            if step > 1:
                self._fit(state, side, (factor @ basis * basis).sum(dim=0))

    def _fit(self, state: dict[str, Any], side: str, sums: Tensor) -> None:
        """Scale V along a side whose basis has turned to the sums of squares that its factor has there."""
        # V has not seen the first gradient, the factors have: neither is corrected for it yet.
        step = state["step"]
        sums = sums * (1.0 - self.decay ** (step - 1)) / (1.0 - self.decay**step)
        V = state["second_moment"] if side == "left" else state["second_moment"].T
        ratios = sums / V.sum(dim=1)
        # What is less than the rounding of the largest tells nothing.
        known = (sums > torch.finfo(sums.dtype).eps * sums.max()) & ratios.isfinite()
        V.mul_(torch.where(known, ratios, 1.0)[:, None])


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Of a parameter as a matrix."""
    rows = shape[0] if len(shape) > 1 and shape[0] else 1
    return rows, math.prod(shape) // rows


def _taken_together(states: Sequence[dict[str, Any]], gradients: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of parameters whose steps are taken by the same operations, so that each is called once for all."""
    sizes = [gradient.numel() for gradient in gradients]
    keys = [(one.dtype, one.device, state.get("step", 0)) for state, one in zip(states, gradients, strict=True)]
    for places in grouped(keys).values():
        on_cpu = gradients[places[0]].device.type == "cpu"
        yield from in_parts(places, sizes, _TOGETHER if on_cpu else _TOGETHER_ON_DEVICE)


def _kept(states: Sequence[dict[str, Any]], name: str, like: Sequence[Tensor]) -> list[Tensor]:
    """An average in every state, zero before there is one."""
    for state, one in zip(states, like, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(one)
    return [state[name] for state in states]


def _averaged(states: Sequence[dict[str, Any]], name: str, values: list[Tensor], decay: float) -> list[Tensor]:
    """The moving averages after one more value each."""
    averages = _kept(states, name, values)
    torch._foreach_lerp_(averages, values, 1.0 - decay)
    return averages


def _rotated(state: dict[str, Any], matrix: Tensor, *, back: bool = False) -> Tensor:
    """`Q_Lᵀ X Q_R`, or `Q_L X Q_Rᵀ` back."""
    left, right = state.get("left_basis"), state.get("right_basis")
    if left is not None:
        matrix = (left if back else left.T) @ matrix
    if right is not None:
        matrix = matrix @ (right.T if back else right)
    return matrix


def _units(states: Sequence[dict[str, Any]], G: Sequence[Tensor]) -> list[Tensor]:
    """Of each the largest element of the first gradient that is not zero; one until there is one."""
    largest = torch.stack(_norms(G, math.inf))
    unknown = torch.zeros_like(largest[0])
    before = torch.stack([state.get("unit", unknown) for state in states]).to(largest)
    found = torch.where(before > 0, before, largest)
    for state, unit in zip(states, found.unbind(), strict=True):
        state["unit"] = unit
    return list(torch.where(found > 0, found, 1.0).unbind())


def _norms(matrices: Sequence[Tensor], order: float) -> list[Tensor]:
    """Norms of the elements; one for a matrix without any."""
    some = [one for one in matrices if one.numel()]
    norms = iter(torch._foreach_norm(some, order) if some else ())
    return [next(norms) if one.numel() else one.new_ones(()) for one in matrices]


def _per_root(matrices: list[Tensor], squares: list[Tensor], factor: float = 1.0) -> list[Tensor]:
    """`factor · X / √V` of each, cut; next to nothing where V is so small that it is zero everywhere."""
    roots = _floored(list(torch._foreach_sqrt(squares)))
    ratios: list[Tensor] = list(torch._foreach_div(matrices, roots))
    torch._foreach_mul_(ratios, factor)
    return [ratio.clamp_(-_LIMIT, _LIMIT) for ratio in ratios]


def _floored(roots: list[Tensor]) -> list[Tensor]:
    """Roots above their own rounding, in place; ones where all are zero."""
    lengths = torch.stack(_norms(roots, 2.0))
    floors = torch.where(lengths > 0, _FLOOR * torch.finfo(lengths.dtype).eps * lengths, 1.0)
    torch._foreach_add_(roots, list(floors.unbind()))
    return roots
