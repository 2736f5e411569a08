import pytest
import torch
from reference import F64, centred, normal
from torch import Tensor

from replica_newton.curvature.gram import CHUNK, differences_basis, inner_products, unresolved, working_dtype

EXACT = {"rtol": 0.0, "atol": 1e-14}
LONG = 2 * CHUNK + 17


@pytest.mark.parametrize("columns", [1, CHUNK - 1, CHUNK, CHUNK + 1, LONG])
def test_inner_products_cover_every_chunk(columns: int) -> None:
    left, right = normal(3, columns, seed=0), normal(2, columns, seed=1)
    products = inner_products(left, right)
    assert products.shape == (3, 2)
    # 1e-15 of the sum of magnitudes: the order of summation differs, nothing else
    torch.testing.assert_close(products, left @ right.T, rtol=0.0, atol=1e-15 * columns)
    torch.testing.assert_close(inner_products(left, left), left @ left.T, rtol=1e-13, atol=1e-15 * columns)


A, B, C, NONE = (normal(count, CHUNK + 3, seed=count) for count in (2, 3, 4, 0))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([A], [A, B, C]),
        ([B, C], [A, B, C]),
        ([A, C], [A, B, C]),
        ([A, B], [B, A]),
        ([A, A], [A]),
        ([A], [B, C]),
        ([NONE, A], [A]),
        ([NONE], [A]),
    ],
)
def test_inner_products_of_blocks_are_those_of_all_rows(left: list[Tensor], right: list[Tensor]) -> None:
    expected = torch.cat(left) @ torch.cat(right).T
    torch.testing.assert_close(inner_products(left, right), expected, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(inner_products(right, left), expected.T, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("position", [0, CHUNK - 1, CHUNK, 2 * CHUNK, LONG - 1])
def test_inner_products_count_every_column_once(position: int) -> None:
    rows = torch.zeros(2, LONG)
    rows[:, position] = torch.tensor([3.0, 5.0])
    assert inner_products(rows, rows).tolist() == [[9.0, 15.0], [15.0, 25.0]]


def test_inner_products_take_rows_of_any_memory_layout() -> None:
    rows = normal(LONG, 4, seed=2).T
    assert not rows.is_contiguous()
    torch.testing.assert_close(inner_products(rows[::2], rows), rows[::2] @ rows.T, rtol=0.0, atol=1e-15 * LONG)


def test_inner_products_of_fp32_rows_resolve_what_an_fp32_gram_matrix_loses() -> None:
    common, small = normal(2, LONG, seed=3).float()
    rows = torch.stack((common, common + 1e-5 * small))
    expected = torch.linalg.svdvals(rows.double())[-1]

    def smallest(gram: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(gram.double())[0].clamp(min=0).sqrt()

    # the squares of the singular values lie 4e10 apart: fp64 leaves 2e-16 · 4e10 = 1e-5 of the smaller one
    torch.testing.assert_close(smallest(inner_products(rows, rows)), expected, rtol=1e-4, atol=0.0)
    assert (smallest(rows @ rows.T) - expected).abs() > 0.5 * expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_inner_products_are_fp64_on_the_cpu_and_exact_in_the_given_elements(dtype: torch.dtype) -> None:
    rows = normal(3, 100, seed=4).to(dtype)
    products = inner_products(rows, rows)
    assert products.dtype == F64
    assert products.device.type == "cpu"
    torch.testing.assert_close(products, rows.double() @ rows.double().T, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("replicas", range(1, 10))
def test_differences_basis_is_orthonormal_and_sums_to_zero(replicas: int) -> None:
    basis = differences_basis(replicas)
    assert basis.shape == (replicas, replicas - 1)
    assert basis.dtype == F64
    torch.testing.assert_close(basis.T @ basis, torch.eye(replicas - 1, dtype=F64), **EXACT)
    torch.testing.assert_close(basis.sum(dim=0), torch.zeros(replicas - 1, dtype=F64), **EXACT)
    # complete: what it leaves out is the vector of ones alone
    mean = torch.full((replicas, replicas), 1.0 / replicas, dtype=F64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(replicas, dtype=F64) - mean, **EXACT)


def test_differences_basis_stays_on_the_cpu_whatever_the_default_device() -> None:
    differences_basis.cache_clear()
    with torch.device("meta"):
        basis = differences_basis(3)
    differences_basis.cache_clear()
    assert basis.device.type == "cpu"


def test_differences_basis_sees_rows_as_centring_does() -> None:
    rows = normal(5, 7, seed=5)
    basis = differences_basis(5)
    expected = basis.T @ (centred(rows).T @ centred(rows)) @ basis
    torch.testing.assert_close(basis.T @ (rows @ rows.T) @ basis, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, F64), F64),
        ((F64, torch.float32), F64),
    ],
)
def test_working_dtype_is_fp64_only_if_some_input_is(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert working_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected


@pytest.mark.parametrize(
    ("squares", "rtol", "scale", "expected"),
    [
        ([0.0, 1.0, 4.0], 0.0, 0.0, 1),
        ([0.25, 1.0, 4.0], 0.5, 4.0, 2),  # lengths 1/2, 1, 2: up to 1/2 of the longest are dropped
        ([1e-15, 1e-13, 1.0], 0.0, 1.0, 1),  # 1e-7 squared lies between
        ([-1e-16, 1e-15], 0.0, 1.0, 2),  # what is left after cancellation in rows of length 1
        ([0.0, 0.0], 0.0, 0.0, 2),
        ([], 0.0, 0.0, 0),
    ],
)
def test_lengths_up_to_cut_off_or_rounding_are_unresolved(
    squares: list[float], rtol: float, scale: float, expected: int
) -> None:
    assert unresolved(torch.tensor(squares, dtype=F64), rtol=rtol, scale=scale) == expected
