"""Rows that are not copied must give what copies give, until they are released."""

import pytest
import torch
from reference import F64, normal
from torch import Tensor

from replica_newton.curvature import SecantCurvature
from replica_newton.curvature import differences as module
from replica_newton.curvature.differences import Differences


def rows(M: int, N: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return normal(M, N, seed=1).to(dtype), 3.0 + normal(M, N, seed=2).to(dtype)


@pytest.mark.parametrize("copy", [True, False], ids=["kept", "made"])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 17])
@pytest.mark.parametrize(("M", "N"), [(2, 1), (4, 37), (1, 5), (3, 0)])
def test_products_and_sums_are_those_of_the_differences(monkeypatch, M: int, N: int, chunk: int, copy: bool) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    W, G = rows(M, N)
    both = torch.cat((W[1:] - W[0], G[1:] - G[0]))
    found, vector, weights = Differences(W, G, copy=copy), normal(N, seed=3), normal(2, 2 * M - 2, seed=4)
    n = M - 1
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.gradient_gram(), both[n:] @ both[n:].T, **close)
    for got, expected in zip(found.displacement_products(), (both[:n], both[n:]), strict=True):
        torch.testing.assert_close(got, both[:n] @ expected.T, **close)
    torch.testing.assert_close(found.products(None), both @ both.T, **close)
    longer = torch.cat((both, vector[None]))
    torch.testing.assert_close(found.products(vector), longer @ longer.T, **close)
    for which, expected in (("W", both[:n]), ("G", both[n:]), ("both", both)):
        torch.testing.assert_close(found.dots(vector[None], which), vector[None] @ expected.T, **close)
    assert found.squared_displacements() == pytest.approx(float(both[:n].square().sum()))
    assert found.parted() == (both[:n].numel() > 0)
    torch.testing.assert_close(found.combine(weights), weights @ both, **close)
    some = slice(N // 3, N - N // 4)
    torch.testing.assert_close(found.combine(weights[0], some), (weights[0] @ both)[some], **close)


def test_differences_of_fp32_are_those_of_fp32_summed_in_fp64() -> None:
    W, G = rows(3, 1000, torch.float32)
    G += 1e6  # products of these in fp32 would keep nothing of the differences
    both = torch.cat((W[1:] - W[0], G[1:] - G[0])).double()
    for copy in (True, False):
        torch.testing.assert_close(Differences(W, G, copy=copy).products(None), both @ both.T, rtol=1e-13, atol=1e-10)


def test_sums_of_rows_that_are_not_kept_lose_no_more_than_the_rows_have_lost() -> None:
    W, G = rows(5, 1000, torch.float32)
    weights, rounding = normal(8, seed=3), 1000.0 * torch.finfo(torch.float32).eps
    exact = weights @ torch.cat((W[1:] - W[0], G[1:] - G[0])).double()  # the differences before anything is added
    found = Differences(W, 1000.0 + G, copy=False).combine(weights)
    assert float((found - exact).abs().max()) < 4.0 * rounding * float(weights.abs().sum())


def test_what_was_copied_does_not_change_with_its_source_and_what_was_not_can_be_released() -> None:
    W, G = rows(4, 20)
    z = normal(20, seed=5)
    kept = SecantCurvature(W, G)
    made = SecantCurvature(W, G, copy=False, total=torch.clone)
    torch.testing.assert_close(made.inverse_hvp(z), kept.inverse_hvp(z), rtol=1e-10, atol=1e-10)
    before, eigenvalues = kept.inverse_hvp(z), made.eigenvalues
    made.release()
    kept.release()
    G.zero_()
    assert torch.equal(kept.inverse_hvp(z), before)
    assert torch.equal(made.eigenvalues, eigenvalues)
    for call in (lambda: made.inverse_hvp(z), lambda: made.eigenvectors, lambda: made.left_singular_vectors):
        with pytest.raises(RuntimeError, match="those of a step that is over"):
            call()


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("copy", [True, False], ids=["kept", "made"])
def test_the_product_by_columns_is_the_product_of_the_dense_inverse(copy: bool, damping: float) -> None:
    W, G = rows(4, 20)
    curvature = SecantCurvature(W, G, damping=damping, copy=copy, total=None if copy else torch.clone)
    centred = (W - W.mean(dim=0)).T
    U, sigma, V = torch.linalg.svd((G - G.mean(dim=0)).T + damping * centred, full_matrices=False)
    U, sigma, V = U[:, :3], sigma[:3], V[:3]
    inverse = torch.eye(20, dtype=F64) - U @ U.T + centred @ V.T @ torch.diag(1 / sigma) @ U.T
    for z in (normal(20, seed=5), normal(2, 20, seed=6)):
        columns = curvature.inverse_hvp_by_columns(z)
        found = torch.cat([columns(slice(low, high)) for low, high in ((0, 1), (1, 12), (12, 12), (12, 20))], dim=-1)
        torch.testing.assert_close(found, z @ inverse.T, rtol=1e-9, atol=1e-9)
