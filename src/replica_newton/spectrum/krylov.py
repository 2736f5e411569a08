"""KrylovSubspace: the top eigenpairs of a fixed symmetric matrix, from its products with a block of vectors a sweep."""

import torch
from torch import Tensor

from replica_newton.curvature.gram import inner_products

# Extra pairs that a restart keeps, and room for new blocks between two restarts, in blocks.
_GUARD_BLOCKS, _ROOM_BLOCKS = 1, 4
# What a row of unit length has outside the basis is rounding below this; random rows keep about (1 − n/N)^½.
_LOST = 1e-3
# Eigenvalues below this share of the largest are not told from zero: differences of gradients do not show them.
_RESOLUTION = 1e-6


class KrylovSubspace:
    """Eigenpairs of largest magnitude of a symmetric matrix H that does not change, by block Krylov iteration.

    A `TrackedSubspace` replaces its basis in every sweep, as it must where H changes. Where H stands still nothing
    need be forgotten: all directions Q probed so far and their responses `S = H Q` are kept, and Rayleigh-Ritz on
    `sym(Q Sᵀ)` gives the pairs `(θ_i, x_i)`. The next block is the orthonormal basis of the residuals

        r_i = H x_i − θ_i x_i

    of the first pairs that have not converged, made orthogonal to Q. In exact arithmetic these residuals span what a
    block Lanczos step would add; taken afresh from all of Q in every sweep, they also correct the rounding of earlier
    ones. When the basis is full it is restarted from the leading Ritz vectors, whose responses are known (thick
    restart). Memory: two rows of N numbers for each of the 2·order + 5·block basis vectors, at most.

    Args:
        order: number of eigenpairs wanted, in 1 … N.
        size: N.
        block: directions in a sweep, in 1 … N: one a replica.
        tolerance: relative residual up to which a pair counts as converged, > 0; see `relative_residuals`.
        seed: of the random first block.
        device: where the directions live, in fp64.

    Attributes:
        sweeps: blocks observed so far.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Block Krylov methods and Rayleigh-Ritz: Saad, Numerical Methods for Large Eigenvalue Problems (2011), ch. 6;
        restart: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.
    """

    def __init__(
        self,
        order: int,
        size: int,
        *,
        block: int = 8,
        tolerance: float = 1e-2,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= order <= size:
            raise ValueError(f"{order=} must be in [1, {size}], the number of parameters")
        if not 1 <= block <= size:
            raise ValueError(f"{block=} must be in [1, {size}], the number of parameters")
        if not 0.0 < tolerance < float("inf"):
            raise ValueError(f"{tolerance=} must be positive and finite")
        self.order = order
        self.block = block
        self.tolerance = tolerance
        self.sweeps = 0
        self._size = size
        self._capacity = 2 * order + (_GUARD_BLOCKS + _ROOM_BLOCKS) * block
        self._generator = torch.Generator().manual_seed(seed)
        # Once pairs exist, the basis are the Ritz vectors themselves: leading ones first, the responses beside them.
        self._basis = self._responses = torch.zeros(0, size, device=device, dtype=torch.float64)
        self._directions = self._orthonormal(self._random(block))
        self._values = torch.zeros(0, dtype=torch.float64)

    def directions(self) -> Tensor:
        """Directions to probe next.

        Returns:
            `(count, N)`, orthonormal rows: `block` of them, fewer where fewer pairs are open, none when all converged.
        """
        return self._directions

    def observe(self, responses: Tensor) -> None:
        """Take in the responses to the directions that `directions` gave.

        Args:
            responses: H q for every direction q, of the shape of the directions.

        Raises:
            ValueError: if the shape does not fit or a response is not finite; the space then stays as it was.
        """
        if responses.shape != self._directions.shape:
            raise ValueError(f"responses must be {tuple(self._directions.shape)}, got {tuple(responses.shape)}")
        if not bool(torch.isfinite(responses).all()):
            raise ValueError("responses must be finite")
        if len(self._basis) + len(self._directions) > self._capacity:
            kept = self.order + _GUARD_BLOCKS * self.block
            self._basis, self._responses = self._basis[:kept], self._responses[:kept]
        basis = torch.cat((self._basis, self._directions))
        images = torch.cat((self._responses, responses.to(self._basis)))
        projected = inner_products(basis, images)
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        rotation = rotation[:, order].T.to(basis)
        self._values = values[order]
        self._basis, self._responses = rotation @ basis, rotation @ images
        self.sweeps += 1
        self._directions = self._next_block()

    @property
    def eigenvalues(self) -> Tensor:
        """Ritz values, `(order,)` fp64 on the CPU, signed, by magnitude descending; fewer in the first sweeps."""
        return self._values[: self.order].clone()

    @property
    def eigenvectors(self) -> Tensor:
        """Ritz vectors, as many orthonormal rows of N elements."""
        return self._basis[: self.order].clone()

    @property
    def residuals(self) -> Tensor:
        """`‖H x_i − θ_i x_i‖` of every pair, fp64 on the CPU: an eigenvalue of H lies within this distance of θ_i."""
        lengths: Tensor = torch.linalg.vector_norm(self._errors(), dim=1)
        return lengths.cpu()

    @property
    def relative_residuals(self) -> Tensor:
        """`‖H x_i − θ_i x_i‖ / |θ_i|`, over 1e-6 · |θ_1| where |θ_i| is smaller; 0 where H vanishes."""
        values = self.eigenvalues.abs()
        scale = values.clamp(min=_RESOLUTION * float(values.max())) if len(values) else values
        return torch.where(scale > 0.0, self.residuals / scale, 0.0)

    @property
    def converged(self) -> bool:
        """Whether all pairs are there and have converged, or nothing is left to probe."""
        found = len(self._values) >= self.order and bool((self.relative_residuals <= self.tolerance).all())
        return found or not len(self._directions)

    def _errors(self) -> Tensor:
        values = self._values[: self.order].to(self._basis)
        return self._responses[: self.order] - values[:, None] * self._basis[: self.order]

    def _next_block(self) -> Tensor:
        """Orthonormal basis of what the residuals of the first open pairs have outside the basis."""
        if len(self._values) < self.order:  # too few pairs to tell which are wanted: any will do that says something
            chosen = self.residuals.argsort(descending=True, stable=True)[: self.block]
        else:
            chosen = (self.relative_residuals > self.tolerance).nonzero().flatten()[: self.block]
        errors = self._errors()[chosen.to(self._basis.device)]
        errors = errors[: max(self._size - len(self._basis), 0)]
        return self._orthonormal(torch.nn.functional.normalize(errors, dim=1, eps=torch.finfo(errors.dtype).tiny))

    def _orthonormal(self, rows: Tensor) -> Tensor:
        """Orthonormal basis of what unit rows have outside the basis; random directions where that is nothing."""
        passes, lost = 0, torch.ones(1, dtype=torch.bool)
        while passes < 2 or bool(lost.any()):  # twice is enough where nothing is lost (Parlett 1998, section 6.9)
            columns, lengths = torch.linalg.qr((rows - (rows @ self._basis.T) @ self._basis).T)
            lost = lengths.diagonal().abs() < _LOST
            rows = torch.where(lost[:, None], self._random(len(rows)), columns.T)
            passes += 1
        return rows.contiguous()

    def _random(self, count: int) -> Tensor:
        rows = torch.randn(count, self._size, generator=self._generator, dtype=torch.float64)
        return torch.nn.functional.normalize(rows, dim=1).to(self._basis.device)
