"""The paper's algebra: the inverse-Hessian product of any vector from replicas at different parameters."""

from collections.abc import Callable
from functools import cache, cached_property
from math import isfinite

import torch
from torch import Tensor

from replica_newton.curvature.differences import Differences
from replica_newton.curvature.gram import (
    RESOLUTION,
    check_finite,
    check_floating,
    check_rows,
    differences_basis,
    inner_products,
    unresolved,
    working_dtype,
)
from replica_newton.curvature.ritz import RitzPairs, rayleigh_ritz

DEFAULT_RTOL = 1e-6
"""Above the rounding of centred fp32 rows (6e-8) and the resolution of an fp64 Gram matrix (1.5e-8)."""


class SecantCurvature:
    """Curvature seen by M replicas at parameters `w_m` with gradients `g_m`.

    Rows are centred, `W_m = w_m − w̄`, `G_m = g_m − ḡ`, so that `G ≈ H W`. The singular value decomposition
    `Gᵀ = U Σ Vᵀ` (N×M) comes from the M×M Gram matrix of G, and gives for any vector z

        Ĥ⁻¹ z = z_⊥ + Σ_i (u_iᵀ z) W v_i / σ_i,      z_⊥ = z − U Uᵀ z.

    That is `Ĥ⁻¹ = I + (W − G) G⁺`: type-II Anderson mixing with replicas in place of history. It is exact on the
    span of G for a quadratic and the identity across it. The mode of equal weights is dropped, so M replicas show
    at most M−1 directions, and one replica shows none (`inverse_hvp` is then the identity).

    Two kinds of spectrum are offered, under different names. `singular_values` are those of G, the paper's; they
    scale with how far apart the replicas stand. `eigenvalues` are Rayleigh–Ritz values of the Hessian: signed and
    free of that scale.

    The object keeps its inputs as differences (a copy of 2·(M−1)·N elements), so later changes of w_m or g_m do not
    reach it, but for `copy=False`. All M×M work is done in fp64. Displacements below the rounding of w_m are lost
    before they arrive here: pass displacements themselves as W (any common shift of the rows cancels) rather than
    parameters in low precision.

    Args:
        W: `(M, N)` parameters or displacements, one row a replica; any float dtype, any device.
        G: `(M, N)` gradients at those parameters; same shape and device.
        rtol: directions with `σ_i ≤ rtol·σ_max` are dropped, all of them if the replicas stand at one point. So are
            those that rounding of the fp64 Gram matrix hides: below 1e-7 of the longest row, or of its damped parts
            where `G + λ W` cancels. Gradients in half precision carry noise of 1e-3 to 1e-2 of their size: give them
            an rtol above it.
        damping: λ ≥ 0 in units of Hessian eigenvalues: the secants become `G + λ W = (H + λ I) W`, and singular
            vectors, `inverse_hvp` and `hvp` belong to `H + λ I`. Eigenvalues stay those of H.
        copy: whether W and G are copied. If not, they must not change as long as the object is used.
        total: for rows that are split by columns over several processes, each of which makes an object of its own
            columns: sums an fp64 tensor on the CPU over the processes. Everything N-sized (vectors z, results) is then
            the process's part, everything M-sized is the same on all. It is called by the constructor and by methods
            that take a z, which all processes must call together; properties can be read in one alone.
        vector: `(N,)`, a z whose inner products with the rows are summed along with all others, so that its
            `inverse_hvp` and `squared_decrement` need no sum of their own; only with `total`.

    Raises:
        TypeError: if W or G is not a dense real floating-point tensor.
        ValueError: if shapes or devices differ or are not `(M, N)`; if an element is not finite; if `rtol` is not
            in [0, 1) or `damping` is negative or not finite.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, section 2.
    """

    def __init__(
        self,
        W: Tensor,
        G: Tensor,
        *,
        rtol: float = DEFAULT_RTOL,
        damping: float = 0.0,
        copy: bool = True,
        total: Callable[[Tensor], Tensor] | None = None,
        vector: Tensor | None = None,
    ) -> None:
        for name, rows in (("W", W), ("G", G)):
            check_rows(name, rows, may_be_empty=total is not None)
        if W.shape != G.shape or W.device != G.device:
            raise ValueError(
                f"W and G must agree in shape and device; got {tuple(W.shape)} on {W.device} "
                f"and {tuple(G.shape)} on {G.device}"
            )
        if not 0.0 <= rtol < 1.0:
            raise ValueError(f"{rtol=} must be in [0, 1)")
        if not 0.0 <= damping < float("inf"):
            raise ValueError(f"{damping=} must be finite and >= 0")
        self.rtol = rtol
        self.damping = damping
        self.replicas = W.shape[0]

        # All weights below sum to zero over the replicas, so differences to the first serve as well as centred rows.
        self._differences = Differences(W, G, copy=copy)
        self._total = total
        self._vector = None if total is None else vector
        self._vector_products = torch.empty(0, dtype=torch.float64)
        if total is None:
            self._gradient_gram = self._differences.gradient_gram()
            squared_length = self._differences.squared_displacements()
            parted = squared_length > 0.0 or self._differences.parted()  # squares of tiny differences underflow
        else:
            squared_length, parted = self._sum_products(total)
        self._parted = parted
        if not isfinite(squared_length + float(self._gradient_gram.trace())) or self.replicas == 1:
            for name, rows in (("W", W), ("G", G)):
                check_finite(name, rows)
                rows = rows.to(self._differences.dtype)
                check_finite(f"differences between replicas in {name}", rows - rows[0])
                check_finite(f"squared differences between replicas in {name}", (rows - rows[0]).double().square())

    def _sum_products(self, total: Callable[[Tensor], Tensor]) -> tuple[float, bool]:
        """All products at once, so that whatever follows from them can be asked for in one process alone.

        Returns:
            Sum of the squared lengths of the differences in W, and whether there are any.
        """
        n = self.replicas - 1
        products = self._differences.products(self._vector)
        length = float(products[:n, :n].trace())
        parted = length != 0.0 or self._differences.parted()  # squares of tiny differences underflow
        row, column = _upper(len(products))
        sums = total(torch.cat((products[row, column], torch.tensor([float(parted)], dtype=torch.float64))))
        products[row, column] = products[column, row] = sums[:-1]
        G = slice(n, 2 * n)
        self._displacement_products = products[:n, :n], products[:n, G]
        self._gradient_gram, self._vector_products = products[G, G], products[2 * n :]
        return float(products[:n, :n].trace()), bool(sums[-1])

    @cached_property
    def _displacement_products(self) -> tuple[Tensor, Tensor]:
        """Inner products of the differences in W with those in W and in G, `(M−1, M−1)` each, in fp64."""
        return self._differences.displacement_products()

    @cached_property
    def _damped_gram(self) -> tuple[Tensor, float]:
        """Inner products of the differences in the (damped) G, and the largest squared length they are sums of."""
        gram = self._gradient_gram
        scale = max(gram.diagonal().tolist())
        if self.damping:
            WW, WG = self._displacement_products
            scale += self.damping**2 * max(WW.diagonal().tolist())
            gram = gram + self.damping * (WG + WG.T) + self.damping**2 * WW
        return gram, scale

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor]:
        """Right singular vectors V, `(M, rank)`, and singular values, `(rank,)`, of the (damped) G."""
        basis = differences_basis(self.replicas)
        if not self._parted:
            return basis[:, :0], basis.new_empty(0)
        gram, scale = self._damped_gram
        differences = basis[1:]  # weights of the differences to the first replica
        squares, V = torch.linalg.eigh(differences.T @ gram @ differences)
        first = unresolved(squares, rtol=self.rtol, scale=scale)
        return basis @ V[:, first:].flip(1), squares[first:].flip(0).sqrt()

    @cached_property
    def _inverse_gram(self) -> Tensor:
        """`V Σ⁻² Vᵀ` without the first replica, `(M−1, M−1)`: the pseudo-inverse of the Gram matrix on what is kept.

        Where every direction is kept it is the inverse, at a third of the cost of the decomposition. That is certain
        if `1/‖K⁻¹‖`, which the smallest eigenvalue of the Gram matrix K exceeds, passes the cut-off with a margin for
        the change to an orthonormal basis, whose smallest singular value is `M^(−1/2)`.
        """
        if self._parted:
            gram, scale = self._damped_gram
            factor, failed = torch.linalg.cholesky_ex(gram)
            if not int(failed):
                inverse = torch.cholesky_inverse(factor)
                cut_off = max(self.rtol**2 * float(gram.trace()), RESOLUTION**2 * scale)
                if self.replicas * cut_off * float(torch.linalg.vector_norm(inverse)) < 1.0:
                    return inverse
        V, sigma = self._svd
        scaled = V[1:] / sigma
        return scaled @ scaled.T

    def release(self) -> None:
        """Let go of W and G, if they were not copied.

        What is M-sized and has no argument can still be asked for where `total` was given; all else is a
        `RuntimeError` from then on.
        """
        self._differences.release()

    @property
    def parted(self) -> bool:
        """Whether the replicas stand apart at all: without that there is nothing to see."""
        return self._parted

    @property
    def rank(self) -> int:
        """Number of directions in which the (damped) G differs between replicas, at most M−1; 0 if W does not."""
        return self._svd[1].numel()

    @property
    def singular_values(self) -> Tensor:
        """Singular values σ of the centred (damped) G, `(rank,)` fp64 on the CPU, descending.

        They scale with the spread.
        """
        return self._svd[1].clone()

    @property
    def left_singular_vectors(self) -> Tensor:
        """The `u_i = G v_i / σ_i` as rows, `(rank, N)`, orthonormal."""
        V, sigma = self._svd
        weights = (V / sigma)[1:].T
        return self._combine(self.damping * weights, weights)

    def step_coefficients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weights α, β with `Ĥ⁻¹ z = z + Σ_m α_m G_m + β_m W_m`, so that no N×rank matrix is needed.

        `α = −V Σ⁻² Vᵀ G z` and `β = (λ − 1) α` with the damping λ. Both sum to zero over the replicas, so the
        raw parameters and gradients serve as well as the centred ones.

        Args:
            z: `(N,)` or `(k, N)` vectors.

        Returns:
            α and β, `(M,)` or `(k, M)`, fp64 on the CPU.

        Raises:
            TypeError: if `z` is not a dense real floating-point tensor.
            ValueError: if the last dimension of `z` is not N, or z is not one- or two-dimensional.
        """
        on_differences = -self._weights(z)
        alpha = torch.cat((-on_differences.sum(dim=-1, keepdim=True), on_differences), dim=-1)
        return alpha, (self.damping - 1.0) * alpha

    def inverse_hvp(self, z: Tensor) -> Tensor:
        """Inverse-Hessian product `Ĥ⁻¹ z = z_⊥ + Σ_i (u_iᵀ z) W v_i / σ_i`.

        Args:
            z: `(N,)` or `(k, N)` vectors.

        Returns:
            The product, of the shape of `z`, in fp32 (fp64 if W, G or z is).
        """
        return self.inverse_hvp_by_columns(z)(slice(0, self._differences.elements))

    def inverse_hvp_by_columns(self, z: Tensor) -> Callable[[slice], Tensor]:
        """What gives `Ĥ⁻¹ z` a few columns at a time, for who does more with them while they are in the cache.

        Args:
            z: `(N,)` or `(k, N)` vectors.

        Returns:
            Of a slice of columns, with a start and a stop, these columns of `inverse_hvp`; good as long as W and G are.
        """
        weights = self._weights(z)
        both = torch.cat(((1.0 - self.damping) * weights, -weights), dim=-1)

        def columns(some: slice) -> Tensor:
            change = self._differences.combine(both, some)
            return change.to(working_dtype(change, z)).add_(z.detach()[..., some])

        return columns

    def squared_decrement(self, z: Tensor) -> float:
        """Squared Newton decrement `zᵀ Ĥ⁻¹ z`: to first order, what a step `−Ĥ⁻¹ z` at a gradient z gains.

        Args:
            z: `(N,)`.

        Returns:
            The number; it is negative where the step would go uphill.
        """
        products = self._vector_products.flatten()
        if z is not self._vector:
            rows = z.detach()[None]
            dots = self._differences.dots(rows, "both")
            products = torch.cat((dots, inner_products(rows, rows)), dim=1)[0]
            products = products if self._total is None else self._total(products)
        on_W, on_G, square = torch.split(products, [self.replicas - 1, self.replicas - 1, 1])
        weights = self._vector_weights if z is self._vector else self._weights_from(on_W, on_G)
        return float(square[0] + weights @ ((1.0 - self.damping) * on_W - on_G))

    def hvp(self, z: Tensor) -> Tensor:
        """Hessian product `Ĥ z`, the inverse of `inverse_hvp`: `Ĥ z = z − (P − U)(Uᵀ P)⁻¹ Uᵀ z`.

        `P = W V Σ⁻¹`, so that `Ĥ P = U`. Where `Uᵀ P` is singular its pseudo-inverse is taken.

        Args:
            z: `(N,)` or `(k, N)` vectors.

        Returns:
            The product, of the shape of `z`, in fp32 (fp64 if W, G or z is).
        """
        V, sigma = self._svd
        scaled = V / sigma
        WW, WG = self._displacement_products
        core = scaled[1:].T @ (WG.T + self.damping * WW) @ scaled[1:]
        weights = (self._dots(z) @ scaled[1:]) @ torch.linalg.pinv(core, rtol=self.rtol).T @ scaled[1:].T
        change = self._combine((self.damping - 1.0) * weights, weights)
        return change.to(working_dtype(change, z)).add_(z.detach())

    @cached_property
    def ritz_pairs(self) -> RitzPairs:
        """The eigenpairs as Rayleigh–Ritz values, M-sized coefficients and residuals."""
        products = (*self._displacement_products, self._gradient_gram)
        # With the row and column of the first replica, whose differences are zero.
        WW, WG, GG = (torch.nn.functional.pad(one, (1, 0, 1, 0)) for one in products)
        return rayleigh_ritz(WW, WG, GG, rtol=self.rtol)

    @property
    def eigenvalues(self) -> Tensor:
        """Hessian eigenvalues θ on the span of the displacements, fp64 on the CPU, signed, by |θ| descending.

        There are as many as centred W has independent rows. Zeros among them mean `xᵀHx = 0`, not `H x = 0`: along a
        direction of an indefinite Hessian θ can vanish while the residual does not.
        """
        return self.ritz_pairs.values.clone()

    @property
    def eigenvectors(self) -> Tensor:
        """Hessian eigenvectors as orthonormal rows, `(len(eigenvalues), N)`, with fixed signs."""
        weights = self.ritz_pairs.coefficients[1:].T
        return self._combine(weights, torch.zeros_like(weights))

    @property
    def residuals(self) -> Tensor:
        """Residuals `‖H x_i − θ_i x_i‖` of the eigenpairs, fp64 on the CPU, in units of the Hessian."""
        return self.ritz_pairs.residuals.clone()

    @property
    def paper_learning_rate(self) -> float:
        """The paper's `1/σ_max(G)`; infinite when no curvature was seen.

        σ_max(G) is the response to the displacements as they are: replicas twice as far apart give half this
        rate. It is offered for comparison; `learning_rate` is the quantity that LeCun et al. (1993) mean.
        """
        return _reciprocal_of_largest(self._svd[1])

    @property
    def learning_rate(self) -> float:
        """LeCun's optimal rate `1/max|θ|`, in units of the Hessian's inverse; infinite when no θ differs from zero."""
        return _reciprocal_of_largest(self.ritz_pairs.values)

    def _weights(self, z: Tensor) -> Tensor:
        """`V Σ⁻² Vᵀ G z` without the first replica, `(M−1,)` or `(k, M−1)`, of the (damped) G."""
        return self._vector_weights if z is self._vector else self._dots(z) @ self._inverse_gram

    @cached_property
    def _vector_weights(self) -> Tensor:
        """These of the vector that was given."""
        return self._weights_from(*torch.split(self._vector_products[0, :-1], self.replicas - 1))

    def _weights_from(self, on_W: Tensor, on_G: Tensor) -> Tensor:
        """These of a z, from its inner products with the rows of W and of G but the first."""
        return (on_G + self.damping * on_W) @ self._inverse_gram

    def _dots(self, z: Tensor) -> Tensor:
        """Inner products of z with the rows of the (damped) G but the first, `(M−1,)` or `(k, M−1)` in fp64."""
        M, N = self.replicas, self._differences.elements
        check_floating("z", z)
        if z.dim() not in (1, 2) or z.shape[-1] != N:
            raise ValueError(f"z must have shape (N,) or (k, N) with {N=}, got {tuple(z.shape)}")
        vectors = z.detach() if z.dim() == 2 else z.detach()[None]
        dots = self._differences.dots(vectors, "G")
        if self.damping:
            dots += self.damping * self._differences.dots(vectors, "W")
        return (dots if self._total is None else self._total(dots)).reshape(*z.shape[:-1], M - 1)

    def _combine(self, on_W: Tensor, on_G: Tensor) -> Tensor:
        """Differences in W and in G to the first replica, summed with weights `(M−1,)` or `(k, M−1)`."""
        return self._differences.combine(torch.cat((on_W, on_G), dim=-1))


@cache
def _upper(count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the upper triangle of a square matrix."""
    row, column = torch.triu_indices(count, count, device="cpu")
    return row, column


def _reciprocal_of_largest(values: Tensor) -> float:
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 1.0 / largest if largest > 0.0 else float("inf")
