"""Bases from Cholesky factors, as a GPU makes them, beside Householder's."""

import pytest
import torch
from reference import generator, normal

from replica_newton.optim.bases import _cholesky_qr, eigenvectors, orthonormal_bases


def matrices(size: int) -> torch.Tensor:
    """A random one, one near to orthonormal columns, and products of a factor of large condition with its basis."""
    random, near = normal(size, size, seed=0), torch.eye(size).double() + 0.01 * normal(size, size, seed=1)
    turn = torch.linalg.qr(normal(size, size, seed=2)).Q
    factor = turn @ torch.diag(torch.logspace(0, -6, size, dtype=torch.float64)) @ turn.T
    return torch.stack([random, near, factor @ (turn + 0.01 * normal(size, size, seed=3))]).float()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_cholesky_qr_is_qr_up_to_signs(size: int):
    given = matrices(size)
    Q, sound = _cholesky_qr(given)
    assert sound.tolist() == [True] * 3
    eye = torch.eye(size).expand(3, -1, -1)
    torch.testing.assert_close(Q.mT @ Q, eye, rtol=0.0, atol=1e-5)
    exact = torch.linalg.qr(given.double()).Q
    torch.testing.assert_close((Q.double() * exact).sum(dim=1).abs(), torch.ones(3, size).double(), rtol=1e-4, atol=0.0)


def test_what_is_singular_is_not_sound():
    given = matrices(6)
    given[0, :, 2] = 0.0
    given[1, :, 3] = given[1, :, 4]
    given[2] = 0.0
    assert _cholesky_qr(given)[1].tolist() == [False] * 3


def test_bases_keep_the_order_of_their_matrices():
    given = [torch.randn(n, n, generator=generator(n)) for n in (3, 5, 3, 2)]
    for basis, matrix in zip(orthonormal_bases(given), given, strict=True):
        assert torch.equal(basis, torch.linalg.qr(matrix).Q)


def test_eigenvectors_descend():
    turn = torch.linalg.qr(normal(5, 5, seed=4)).Q
    found = eigenvectors(turn @ torch.diag(torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0]).double()) @ turn.T)
    torch.testing.assert_close((found * turn[:, [1, 3, 2, 4, 0]]).sum(dim=0).abs(), torch.ones(5).double())
