"""Metric: the coordinates in which a step is taken, and the unit of length along each."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype

MetricName = Literal["identity", "diagonal", "kronecker"]

_FLOOR = 16.0
"""A coordinate's root mean square beside that of its whole tensor, in units of rounding: what is below is no more."""
_LIMIT = 3.0


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

    def unit_step(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """The step, and the state after it.

        Args:
            state: of the parameter, changed; empty before the first step.
            gradient: of the parameter, finite.

        Returns:
            U, of the gradient's shape, in fp32 (fp64 for an fp64 gradient). Elements are of the order of one and
            shrink as gradients disagree.
        """
        shape = gradient.shape
        G = gradient.to(working_dtype(gradient)).reshape(_sides(shape))
        step = state["step"] = state.get("step", 0) + 1
        G = G / _unit(state, G)
        if step == 1:
            unit = _per_root(G, G.square().mean())
        else:
            Z = _rotated(state, G)
            V = _kept(state, "second_moment", Z).mul_(self.decay).addcmul_(Z, Z, value=1.0 - self.decay)
            mean = _rotated(state, _averaged(state, "momentum", G, self.momentum))
            unbiased = (1.0 - self.decay ** (step - 1)) ** 0.5 / (1.0 - self.momentum ** (step - 1))
            unit = _rotated(state, _per_root(mean, V.mean() if self.name == "identity" else V, unbiased), back=True)
        if self._rotates(shape):
            self._turn(state, G)
        return unit.reshape(shape)

    def divisor(self, state: dict[str, Any]) -> Tensor:
        """D, the root mean square of gradients, in their own unit, that `unit_step` divides by.

        Args:
            state: of the parameter, after two steps at least.

        Returns:
            As a matrix, in the eigenbases.
        """
        V = state["second_moment"] / (1.0 - self.decay ** (state["step"] - 1))
        return _floored((V.mean().expand_as(V) if self.name == "identity" else V).sqrt() * state["unit"])

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

    def _turn(self, state: dict[str, Any], G: Tensor) -> None:
        """Take a gradient into the factors; turn the bases if it is time, and scale V to what it is in them."""
        step = state["step"]
        for side, matrix in (("left", G), ("right", G.T)):
            if not 1 < len(matrix) <= self.max_dimension:
                continue
            factor = _averaged(state, side, matrix @ matrix.T, self.decay)
            basis = state.get(f"{side}_basis")
            if basis is None:
                basis = _eigenvectors(factor).flip(1).contiguous()
            elif step % self.refresh_every == 0:
                basis = torch.linalg.qr(factor @ basis).Q
            else:
                continue
            state[f"{side}_basis"] = basis
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


def _eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, by ascending eigenvalue."""
    # In fp32 LAPACK's divide and conquer as built by MKL fails, or returns nan and says nothing, on a sixth of all
    # matrices of low rank with many zeros, which is what units that do not fire make of a factor. In fp64 it has not
    # been seen to.
    vectors: Tensor
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(factor).eigenvectors
        if bool(vectors.isfinite().all()):
            return vectors
    vectors = torch.linalg.eigh(factor.double()).eigenvectors
    return vectors.to(factor.dtype)


def _kept(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """An average in the state, zero before there is one."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    average: Tensor = state[name]
    return average


def _averaged(state: dict[str, Any], name: str, value: Tensor, decay: float) -> Tensor:
    """The moving average after one more value."""
    return _kept(state, name, value).lerp_(value, 1.0 - decay)


def _rotated(state: dict[str, Any], matrix: Tensor, *, back: bool = False) -> Tensor:
    """`Q_Lᵀ X Q_R`, or `Q_L X Q_Rᵀ` back."""
    left, right = state.get("left_basis"), state.get("right_basis")
    if left is not None:
        matrix = (left if back else left.T) @ matrix
    if right is not None:
        matrix = matrix @ (right.T if back else right)
    return matrix


def _unit(state: dict[str, Any], G: Tensor) -> Tensor:
    """Largest element of the first gradient that is not zero; one until there is one."""
    largest = torch.linalg.vector_norm(G, math.inf) if G.numel() else G.new_ones(())
    before = state.get("unit", torch.zeros_like(largest)).to(largest)
    state["unit"] = torch.where(before > 0, before, largest)
    return torch.where(state["unit"] > 0, state["unit"], 1.0)


def _per_root(matrix: Tensor, squares: Tensor, factor: float = 1.0) -> Tensor:
    """`factor · X / √V`, cut; next to nothing where V is so small that it is zero everywhere."""
    return (matrix / _floored(squares.sqrt())).mul_(factor).clamp_(-_LIMIT, _LIMIT)


def _floored(roots: Tensor) -> Tensor:
    """Roots above their own rounding, in place; ones where all are zero."""
    length = torch.linalg.vector_norm(roots)
    return roots.add_(torch.where(length > 0, _FLOOR * torch.finfo(roots.dtype).eps * length, 1.0))
