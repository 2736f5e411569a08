"""Products of a matrix that is written down, in place of a network's Hessian."""

from collections.abc import Callable

from torch import Tensor


class MatrixProducts:
    """Products of a matrix, each called a gradient."""

    def __init__(self, H: Tensor) -> None:
        self.H, self.size, self.device, self.gradients = H, len(H), H.device, 0

    def __call__(self, vectors: Tensor, advance: Callable[[float], None] | None = None) -> Tensor:  # noqa: D102
        self.gradients += len(vectors)
        if advance is not None:
            advance(1.0)
        return vectors @ self.H
