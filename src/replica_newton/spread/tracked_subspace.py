"""TrackedSubspace: the sharpest directions of a Hessian that changes, followed by one probe after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replica_newton.curvature.gram import column_chunks, inner_products
from replica_newton.curvature.low_rank import damped_inverse_hvp, low_rank_hvp
from replica_newton.spread.columns import Columns
from replica_newton.spread.rows import DTYPES, Writer, kept_in, orthonormal, weighted_sums

_CORRECTED = torch.tensor([1.0, 0.25], dtype=torch.float64)
"""Eigenvalue from a Ritz value and its correction."""


class _Basis(NamedTuple):
    """Orthonormal rows for the next sweep, and their products with those of this sweep and with their responses."""

    rows: Tensor
    on_vectors: Tensor
    on_responses: Tensor


class TrackedSubspace:
    """Directions that follow the top eigenspace of a changing, noisily observed symmetric matrix H.

    A probe takes some directions q (one a replica), measures the responses `H q`, and hands them back. The space keeps
    Ritz vectors X and their responses Z ≈ H X, `(order, N)` each, hence the symmetric model of rank 2·order

        A = X Zᵀ + Z Xᵀ − X (Zᵀ X) Xᵀ,

    which agrees with Z on X and, H being symmetric, knows half of H elsewhere. It is as symmetric as XᵀZ: exactly for
    the responses of one H, up to their noise and age otherwise. In the new directions Q the response is
    the model's, mixed with what is measured:

        S_i = (1 − smoothing) A q_i + smoothing · H q_i     for the directions just probed,
        S_i = A q_i                                         for the others,

    and Rayleigh-Ritz on `sym(Q Sᵀ)` gives the new X and Z. When all directions have been probed, an orthonormal basis
    of the span of Z takes their place: block power iteration, one sweep for `order` probed directions. The model
    carries past probes over as the basis turns, so the noise of mini-batches is averaged. The basis is mixed, each
    direction with a part of every Ritz vector: so all probes, and all replicas' samples, count towards every pair.
    More than `order` directions at once are a frame of the space, and Q S what fits all responses best.

    From one sweep to the next the basis stands still, and so do the rows that are kept: Rayleigh-Ritz turns X and Z
    alike, by a matrix of `(order, order)` that is kept beside them, and a response changes Z by a matrix of rank one.
    So what a probe costs beside the gradient is a few passes over `order` rows, until the sweep is over.

    The innovation of a probe, `H q − A q`, is what noise and change add to what was known. Along a Ritz vector x, all
    probed q together, its mean square `Σ_q (xᵀq)² (xᵀ(H q − A q))²/Σ_q (xᵀq)²`, smoothed over probes, is the variance
    of a response and of what it is compared with; the variance of the eigenvalue is the fraction of it that the
    smoothing leaves. What the q agree on is no noise of theirs: where H has changed since, the square of the sum
    `Σ_q (xᵀq) xᵀ(H q − A q)`, less c below, is larger than noise explains. An eigenvalue that takes in the newest probe
    with weight w misses (1 − w)² of that variance, which is added.

    Ritz values of a noisy matrix are too large, as its vectors turn to where the noise E adds: to second order by
    `b = Σ_j (y_jᵀ E y)²/(λ − λ_j)` for an eigenvector y among others y_j. The innovation shows by how much: the probe's
    noise is new to the Ritz vector x, so its mean along x, `c = Σ_q (xᵀq) xᵀ(H q − A q)/Σ_q (xᵀq)²`, tells the
    curvature along x from the Ritz value θ. That curvature is too small, for x is no eigenvector, and to second order
    by the same b: from noise alone the eigenvalue would be `θ + c/2`. Where H changes, x is no eigenvector either, and
    c is negative though θ is too small, if anything, being that of an average of matrices whose vectors differ. The two
    are not told apart, so the eigenvalue is taken half-way, `θ + c/4`, with c smoothed as the responses are. Were it
    anywhere between θ and θ + c alike, its variance would be c²/12, which is added. For exact responses of one H, c is
    zero.

    Args:
        order: number of directions, in 1 … N.
        size: N.
        smoothing: weight in (0, 1] of a new response; 1 forgets, and suits a Hessian without noise.
        seed: of the random first directions.
        device: where the directions live.
        dtype: in which Ritz vectors and responses are kept, fp32 or bfloat16; all else is done in fp32 and fp64.
            bfloat16 takes half of the memory, and rounds every element up or down by less than 2⁻⁷ of itself, at
            random so that it is right in the mean, and no change is too small to be seen. Errors of many elements
            hardly add up along any one direction: eigenvalues are what they are in fp32, and residuals end at half a
            percent of the eigenvalue.
        columns: processes that follow one space together; each then holds and hands over n columns of every row, where
            `(…, N)` is written below, and all call the same methods. None for one process with all columns.

    Attributes:
        sweeps: how often all directions have been probed.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, whose U are the normalised responses; block power iteration and
        Rayleigh-Ritz as in Saad, Numerical Methods for Large Eigenvalue Problems (2011), ch. 5.
    """

    def __init__(
        self,
        order: int,
        size: int,
        *,
        smoothing: float = 0.5,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        columns: Columns | None = None,
    ) -> None:
        if not 1 <= order <= size:
            raise ValueError(f"{order=} must be in [1, {size}], the number of parameters")
        if not 0.0 < smoothing <= 1.0:
            raise ValueError(f"{smoothing=} must be in (0, 1]")
        if dtype not in DTYPES:
            raise ValueError(f"{dtype=} must be torch.float32 or torch.bfloat16")
        self.order = order
        self.smoothing = smoothing
        self.sweeps = 0
        self._next, self._over = 0, False
        generator = torch.Generator().manual_seed(seed)
        self._columns = columns
        rows = (torch.randn(size, generator=generator) for _ in range(order))
        parts = [row if columns is None else columns.part(row) for row in rows]
        self._turned: _Basis | None = None
        self._response_gram: Tensor | None = None
        # Rows of the basis and their responses; the pairs are these, turned.
        self._vectors = kept_in(dtype, orthonormal(torch.stack(parts).to(device), self._total)[0], seed=0)
        self._responses = torch.zeros_like(self._vectors)
        self._rotation = torch.eye(order, dtype=torch.float64)
        self._projected = torch.zeros(order, order, dtype=torch.float64)
        self._mixture = _frame(order, order)
        self._values = torch.zeros(order, dtype=torch.float64)
        self._corrections = torch.zeros(order, dtype=torch.float64)
        self._variances = torch.full((order,), torch.inf, dtype=torch.float64)
        self._changes = torch.zeros(order, dtype=torch.float64)
        self._averaged = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)

    def directions(self, count: int) -> Tensor:
        """Directions to probe next, in turn; where all have been probed, the basis turns first.

        Args:
            count: how many, >= 1.

        Returns:
            `(count, N)`, rows of unit length.

        Raises:
            ValueError: if `count` is out of range.
        """
        if count < 1:
            raise ValueError(f"{count=} must be >= 1")
        mixture, turn = self._next_probe(count)
        basis = self._turned_basis().rows if self._over else self._vectors
        return weighted_sums(mixture[turn], basis)

    def observe(self, responses: Tensor) -> None:
        """Take in the responses to the directions that `directions` gave last.

        Args:
            responses: `(count, N)`, H q for every direction q.

        Raises:
            FloatingPointError: if a response is not finite; the space then stays as it was.
            ValueError: if the shape does not fit.
        """
        size = self._vectors.shape[1]
        if responses.dim() != 2 or len(responses) < 1 or responses.shape[1] != size:
            raise ValueError(f"responses must be (count, {size}), count >= 1, got {tuple(responses.shape)}")
        responses = responses.float()
        count, first_sweep = len(responses), self.sweeps == 0
        mixture, turn = self._next_probe(count)
        shares, probed = torch.linalg.pinv(mixture), mixture[turn]
        if self._over:
            basis, coordinates, on_responses = self._turned_basis()
            products = self._products((basis, self._vectors, responses), responses)
            along_basis, along_before, squares = torch.split(products, [self.order, self.order, count])
            self._check_finite(squares)
            # Of the model's responses `C Z + D X` to the basis, with the products of X and Z, in place of a sum.
            across = on_responses - coordinates @ self._projected
            projected = on_responses @ coordinates.T + coordinates @ across.T
            known = self._projected @ coordinates.T + across.T
            self._model(coordinates, across, self._responses)  # in place of what is older
            before, reference = self._rotation @ coordinates.T, torch.eye(self.order, dtype=torch.float64)
        else:
            basis, before, reference = self._vectors, self._rotation, self._rotation
            products = self._products((basis, responses), responses)
            self._check_finite(products[self.order :])
            known, along_before = projected, along_basis = self._projected, products[: self.order]
        if not first_sweep:
            along = self._rotation @ (along_before - known @ probed.T)
            self._learn(before @ shares, turn, along, before.square().sum(dim=1))
        gain = shares[:, turn] * (1.0 if first_sweep else self.smoothing)
        self._projected = projected + (along_basis - projected @ probed.T) @ gain.T
        self._vectors, self._mixture = basis, mixture
        self._turned = self._response_gram = None
        self._take_in(responses, probed, gain)
        self._next = turn[0] + count
        self._over = self._next >= len(mixture)
        if first_sweep and not self._over:
            return
        self._rayleigh_ritz(reference)
        self._carry_over(self._rotation @ before.T)
        self.sweeps += self._over

    @property
    def eigenvalues(self) -> Tensor:
        """`(order,)` fp64 on the CPU, signed, Ritz values by magnitude, then corrected; empty in the first sweep."""
        return (_CORRECTED[0] * self._values + _CORRECTED[1] * self._corrections)[: self.order if self.sweeps else 0]

    @property
    def eigenvectors(self) -> Tensor:
        """Ritz vectors, `(order, N)`, orthonormal rows; empty in the first sweep."""
        return weighted_sums(self._rotation[: self.order if self.sweeps else 0], self._vectors)

    @property
    def residuals(self) -> Tensor:
        """`‖H x_i − θ_i x_i‖` of Ritz pairs with the smoothed responses, fp64 on the CPU; empty in the first sweep."""
        return self.look(self._vectors[:0], self._values[:0])[0] if self.sweeps else self._values[:0].clone()

    def look(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals, products of the Ritz vectors with rows, and whatever else is to be summed, in one sum.

        Processes that share the columns wait for the number of their sums rather than for their size.

        Args:
            rows: `(k, N)`, fp32 or fp64.
            numbers: `(c,)`, fp64 on the CPU; this process's share.

        Returns:
            Residuals `(order,)`, products `(order, k)` and the sums of the numbers, `(c,)`, over all columns, fp64 on
            the CPU; in the first sweep none of the first two.
        """
        parts = [self._squared_residuals(), self.coordinates(rows), numbers]
        if self._over and self._response_gram is None:
            parts.append(inner_products(self._responses, self._responses))  # the next basis begins with them
        total = self._total(torch.cat([part.flatten() for part in parts]))
        sums = torch.split(total, [part.numel() for part in parts])
        squares, products, others, *gram = (own.view_as(part) for own, part in zip(sums, parts, strict=True))
        if gram:
            self._response_gram = gram[0]
        return squares.sqrt(), products, others

    def coordinates(self, rows: Tensor) -> Tensor:
        """Products of the Ritz vectors with rows.

        Args:
            rows: `(k, N)`, fp32 or fp64.

        Returns:
            `(order, k)`, fp64 on the CPU; of the columns held here, if processes share them. Empty in the first sweep.
        """
        return self._rotation[: self.order if self.sweeps else 0] @ inner_products(self._vectors, rows)

    def combined(self, weights: Tensor) -> Tensor:
        """Sum of the Ritz vectors with weights.

        Args:
            weights: `(order,)`, none in the first sweep.

        Returns:
            `(N,)`, of the columns held here, if processes share them.
        """
        turned = weights.double().cpu() @ self._rotation[: len(weights)]
        return weighted_sums(turned[None], self._vectors)[0]

    @property
    def uncertainties(self) -> Tensor:
        """Standard error of every eigenvalue, `(order,)` fp64 on the CPU; inf until a third probe; see above."""
        left = float(_CORRECTED @ self._averaged @ _CORRECTED)
        variances = left / (1.0 + self._averaged[0, 0]) * self._variances + self._corrections.square() / 12
        newest = self.smoothing * float(_CORRECTED.sum())
        variances += (1.0 - newest) ** 2 * self._changes.clamp_min(0.0)
        return variances.sqrt()[: self.order if self.sweeps else 0]

    def hvp(self, z: Tensor, *, bulk: float = 0.0) -> Tensor:
        """Hessian-vector product on the tracked pairs, `bulk · z_⊥ + Σ_i θ_i (x_iᵀ z) x_i`.

        In the first sweep there are no pairs: the product is `bulk · z`.

        Args:
            z: `(N,)` or `(k, N)`.
            bulk: curvature outside the space, in units of the Hessian; see `low_rank_hvp`.

        Returns:
            The product, of the shape of z, in fp32.

        Raises:
            ValueError: if `bulk` is not finite, the shape of z does not fit, or processes share the columns.
        """
        self._check_alone()
        return low_rank_hvp(self.eigenvalues, self.eigenvectors, z, bulk=bulk)

    def inverse_hvp(self, z: Tensor, damping: float, *, bulk: float = 0.0, absolute: bool = False) -> Tensor:
        """Product with the damped inverse, `z_⊥/(bulk + λ) + Σ_i (x_iᵀ z) x_i/(θ_i + λ)`.

        Args:
            z: `(N,)` or `(k, N)`.
            damping: λ, in units of the Hessian.
            bulk: curvature outside the space, in units of the Hessian.
            absolute: whether to take |θ_i| in place of θ_i; see `damped_inverse_hvp`.

        Returns:
            The product, of the shape of z, in fp32.

        Raises:
            ValueError: if `bulk + damping` or a `θ_i + damping` is not positive, the shape of z does not fit, or
                processes share the columns.
        """
        self._check_alone()
        return damped_inverse_hvp(self.eigenvalues, self.eigenvectors, z, damping, bulk=bulk, absolute=absolute)

    @staticmethod
    def _check_finite(products: Tensor) -> None:
        if not bool(products.isfinite().all()):
            raise FloatingPointError("responses must be finite")

    def _check_alone(self) -> None:
        if self._columns is not None:
            raise ValueError("products need all columns: CurvatureMonitor.eigenvectors has them in every process")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the space has learnt: tensors and numbers."""
        names = ["order", "smoothing", "sweeps", "_next", "_over", "_mixture", "_vectors", "_rotation", "_projected"]
        names += ["_values", "_variances", "_corrections", "_changes", "_averaged"]
        # Responses change in place.
        return {name.lstrip("_"): getattr(self, name) for name in names} | {"responses": self._responses.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a space of the same order and size.

        Args:
            state: what `state_dict()` returned.

        Raises:
            ValueError: if order or size differ, or something is missing.
        """
        # States of before there was a rotation hold the pairs themselves.
        turned = {"rotation", "projected"} <= state.keys()
        missing = sorted(self.state_dict().keys() - state.keys() - {"rotation", "projected"})
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}: it is of another version")
        shape = tuple(state["vectors"].shape)
        if shape != tuple(self._vectors.shape):
            raise ValueError(f"the state has (order, N) = {shape}, the space {tuple(self._vectors.shape)}")
        self.smoothing, self.sweeps = state["smoothing"], state["sweeps"]
        self._next, self._over = state["next"], state["over"]
        self._turned = self._response_gram = None
        for name in ("vectors", "responses"):
            setattr(self, f"_{name}", state[name].to(self._vectors, copy=True))
        small = {name: state[name] for name in ("mixture", "values", "variances", "corrections", "changes", "averaged")}
        small["rotation"] = state["rotation"] if turned else torch.eye(self.order)
        small["projected"] = state["projected"] if turned else self._products(self._vectors, self._responses)
        for name, value in small.items():
            setattr(self, f"_{name}", value.to(dtype=torch.float64, device="cpu", copy=True))

    def _next_probe(self, count: int) -> tuple[Tensor, list[int]]:
        """The mixture of the basis that are the directions of this sweep, and which of them are next."""
        if not self._over and count <= len(self._mixture):
            return self._mixture, [(self._next + i) % len(self._mixture) for i in range(count)]
        mixture = _frame(max(count, self.order), self.order)
        return mixture if self._over else mixture @ self._rotation, list(range(count))

    def _total(self, sums: Tensor) -> Tensor:
        return sums if self._columns is None else self._columns.total(sums)

    def _products(self, rows: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor]) -> Tensor:
        """See `inner_products`; summed over the columns of all processes at once."""
        return self._total(inner_products(rows, others))

    def _take_in(self, responses: Tensor, probed: Tensor, gain: Tensor) -> None:
        """Change the responses of the basis, in place, by the innovations of what was probed."""
        gain, probed = gain.to(responses), probed.to(responses)
        write = Writer(self._responses, seed=self._probes)
        for kept, new in column_chunks(self._responses, responses):
            Z = kept.float()  # itself, if that is what is kept
            write(kept, Z.addmm_(gain, torch.addmm(new, probed, Z, alpha=-1.0)))

    @property
    def _probes(self) -> int:
        """Another number for every probe."""
        return self.sweeps * self.order + self._next

    def _squared_residuals(self) -> Tensor:
        """Of the columns held here."""
        if not self.sweeps:
            return self._values[:0]
        turn = self._rotation.to(self._vectors.device, torch.float32)
        scaled = self._values[:, None].to(turn) * turn
        squares = torch.zeros(self.order, dtype=torch.float64, device=turn.device)
        for X, Z in column_chunks(self._vectors, self._responses):
            errors = torch.addmm(turn @ Z.float(), scaled, X.float(), alpha=-1.0)
            squares += torch.linalg.vector_norm(errors, dim=1, dtype=torch.float64).square()
        return squares.cpu()

    def _model(self, on_responses: Tensor, on_vectors: Tensor, into: Tensor) -> None:
        """Write `C Z + D X`; it is `A q` for rows q with products `C` with X and `C P + D` with Z, where `P = X Zᵀ`."""
        on_responses, on_vectors = (one.to(into.device, torch.float32) for one in (on_responses, on_vectors))
        write = Writer(into, seed=self._probes)
        for target, X, Z in column_chunks(into, self._vectors, self._responses):
            write(target, torch.addmm(on_responses @ Z.float(), on_vectors, X.float()))

    def _rayleigh_ritz(self, reference: Tensor) -> None:
        """Turn to the eigenvectors of `sym(X Zᵀ)`, with the signs that they have along the first row of a reference."""
        values, rotation = torch.linalg.eigh((self._projected + self._projected.T) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        rotation = rotation[:, order].T
        # A sign is no property of an eigenvector, but one of the mixture with others.
        self._rotation = torch.where((rotation @ reference[0])[:, None] < 0.0, -rotation, rotation)
        self._values = values[order]

    def _learn(self, shares: Tensor, turn: list[int], along: Tensor, within: Tensor) -> None:
        """What a probe says about the pairs before it: corrections and variances.

        Args:
            shares: `(order, K)`, of every direction in the vectors so far.
            turn: which directions were probed.
            along: `(order, count)`, products of these vectors with the innovations.
            within: `(order,)`, squared length of what of a vector is in the basis that is probed.
        """
        along, squares = along * shares[:, turn], shares.square()
        seen = squares[:, turn].sum(dim=1) / squares.sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny) * within
        excess = along.sum(dim=1) - seen.clamp_max(1.0) * self._corrections
        self._corrections = self._corrections + self.smoothing * excess
        # The first sweep's model knows what its own responses say along its vectors, whatever H is.
        if self.sweeps > 1:
            variances = along.square().sum(dim=1) / seen.clamp_min(torch.finfo(torch.float64).tiny)
            known = torch.isfinite(self._variances)
            self._variances = torch.where(known, torch.lerp(self._variances, variances, self.smoothing), variances)
            expected = (1.0 + self._averaged.sum()) / (1.0 + self._averaged[0, 0]) * variances
            changes = excess.square() / seen.clamp_min(torch.finfo(torch.float64).tiny) - expected
            self._changes = torch.where(known, torch.lerp(self._changes, changes, self.smoothing), changes)
        # Of one noise e of variance 1: θ ← θ + s (e − θ), c ← c + s (e − θ − c).
        s = self.smoothing
        passed_on = torch.tensor([[1.0 - s, 0.0], [-s, 1.0 - s]], dtype=torch.float64)
        renewed = passed_on @ self._averaged @ passed_on.T + s**2
        self._averaged = torch.lerp(self._averaged, renewed, len(turn) / shares.shape[1])

    def _carry_over(self, cosines: Tensor) -> None:
        """Corrections and variances of the new pairs, from those of the old ones that they are made of."""
        shares = cosines.square()
        shares /= shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self._corrections = shares @ self._corrections
        self._variances = shares @ self._variances
        self._changes = shares @ self._changes

    def _turned_basis(self) -> _Basis:
        """An orthonormal basis of the responses, for the next sweep."""
        # Not before: a basis turned by the model alone can lock on to a vector that is no eigenvector of H.
        if self._turned is None:
            Z, P, turn = self._responses, self._projected, self._rotation
            if self._response_gram is None:
                self._response_gram = self._products(Z, Z)
            gram = turn @ self._response_gram @ turn.T
            # A pair without response keeps its direction: QR would complete with coordinate axes, always the same ones.
            longest = float(gram.diagonal().max().clamp_min(0.0).sqrt())
            some_response = longest > torch.finfo(Z.dtype).tiny
            on_responses, on_vectors = (turn / longest, 1e-7 * turn) if some_response else (0.0 * turn, turn)
            mixed = on_vectors @ P @ on_responses.T
            gram = on_responses @ self._response_gram @ on_responses.T + mixed + mixed.T + on_vectors @ on_vectors.T
            rows = torch.empty_like(Z, dtype=torch.float32)
            self._model(on_responses, on_vectors, rows)
            rows, products = orthonormal(rows, self._total, (self._vectors, Z), gram)
            rows = kept_in(Z.dtype, rows, seed=self._probes)
            self._turned = _Basis(rows, *torch.split(products, self.order, dim=1))
        return self._turned


def _frame(count: int, order: int) -> Tensor:
    """`(count, order)`, rows of unit length with entries of nearly equal size, `count >= order`: cosine waves."""
    place = torch.arange(count, dtype=torch.float64)[:, None] + 0.5
    waves = torch.cos(torch.pi / count * place * torch.arange(order))
    # An orthogonal matrix where it is square: the first wave is constant, and has twice the square of another.
    waves[:, 0] /= 2**0.5
    rows: Tensor = waves / torch.linalg.vector_norm(waves, dim=1, keepdim=True)
    return rows
