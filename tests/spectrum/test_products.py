"""Hessian-vector products against dense Hessians, and the pairs of a real network against SciPy's."""

import copy

import networks
import numpy as np
import pytest
import torch
from networks import Problem, flat, trained
from reference import F64, flat_loss, normal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton.spectrum import ExactProducts, ProbedProducts, hessian_spectrum
from replica_newton.training.datasets import load_dataset
from replica_newton.training.models import reference_convnet

KINDS = {"probed": (ProbedProducts, 1e-5), "exact": (ExactProducts, 1e-10)}


def dense(problem: Problem) -> Tensor:
    module = copy.deepcopy(problem.module).eval()
    return flat_loss(module, lambda model: problem.criterion(model(*problem.inputs), problem.targets)).hessian


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [networks.convnet, networks.tied, networks.batch_norm, networks.mlp])
@pytest.mark.parametrize("batch_size", [24, 7])
def test_products_are_those_of_the_dense_hessian_however_the_data_are_batched(kind: str, make, batch_size: int):
    problem, (products_of, accuracy) = make(), KINDS[kind]
    products = products_of(problem.module, problem.criterion, problem.inputs[0], problem.targets, batch_size=batch_size)
    H = dense(problem)
    rows = 3.0 * normal(4, products.size, seed=3)
    before = flat([*problem.module.parameters(), *problem.module.buffers()])
    shares: list[float] = []
    torch.testing.assert_close(products(rows, shares.append), rows @ H, rtol=0.0, atol=accuracy * float(H.norm()))
    assert sum(shares) % 1.0 == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(flat([*problem.module.parameters(), *problem.module.buffers()]), before)


def test_frozen_parameters_are_left_out():
    problem = networks.frozen()
    products = ExactProducts(problem.module, problem.criterion, problem.inputs[0], problem.targets)
    assert products.size == sum(parameter.numel() for parameter in trained(problem.module)) == 5
    probed = ProbedProducts(problem.module, problem.criterion, problem.inputs[0], problem.targets)
    rows = torch.eye(5, dtype=F64)
    torch.testing.assert_close(probed(rows), products(rows), rtol=0.0, atol=1e-6)


def test_gradients_are_counted():
    problem = networks.mlp()
    probed, exact = (kind(*problem[:2], problem.inputs[0], problem.targets) for kind in (ProbedProducts, ExactProducts))
    rows = normal(3, probed.size, seed=0)
    for _ in range(2):
        probed(rows)
        exact(rows)
    assert probed.gradients == 1 + 2 * 3
    assert exact.gradients == 2 * 2 * 3


def test_a_loss_linear_in_the_parameters_has_no_curvature():
    module = nn.Linear(3, 2)
    products = ExactProducts(module, lambda y, t: (y * t).mean(), normal(6, 3, seed=0), normal(6, 2, seed=1))
    assert torch.equal(products(normal(2, 8, seed=2)), torch.zeros(2, 8, dtype=F64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"relative_step": 0.0}, r"relative_step=0.0 must be in \(0, 1\)"),
        ({"targets": torch.zeros(3, 1)}, "inputs and targets must hold as many samples, >= 1; got 24, 3"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str):
    problem = networks.mlp()
    options = {"inputs": problem.inputs[0], "targets": problem.targets} | change
    with pytest.raises(ValueError, match=message):
        ProbedProducts(problem.module, problem.criterion, **options)


def test_a_model_with_nothing_to_train_and_vectors_of_another_shape_are_refused():
    problem = networks.mlp()
    with pytest.raises(ValueError, match=r"vectors must be \(count, 21\) in fp64, got \(21,\), torch.float64"):
        ProbedProducts(*problem[:2], problem.inputs[0], problem.targets)(torch.zeros(21, dtype=F64))
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        ProbedProducts(problem.module.requires_grad_(False), problem.criterion, problem.inputs[0], problem.targets)


@pytest.fixture(scope="module", params=["relu", "tanh"])
def digits_network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """The reference convnet on 128 digits after a few steps, and SciPy's five eigenvalues of largest magnitude."""
    data = load_dataset("digits", train_limit=128)
    x, y = data.train_inputs, data.train_labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = reference_convnet(data.input_shape, activation=request.param)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(25):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    twin = copy.deepcopy(model).double()
    parameters = list(twin.parameters())
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(cross_entropy(twin(x.double()), y), parameters, create_graph=True)]
    )

    def product(v: np.ndarray) -> np.ndarray:
        row = torch.from_numpy(np.ascontiguousarray(v.reshape(-1)))
        return flat(torch.autograd.grad(gradient @ row, parameters, retain_graph=True)).numpy()

    size = gradient.numel()
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    values = eigsh(operator, k=5, which="LM", tol=1e-4, v0=np.ones(size), return_eigenvectors=False)
    return model, x, y, values[np.argsort(-abs(values))]


@pytest.mark.parametrize("kind", KINDS)
def test_on_digits_the_top_eigenvalues_are_those_of_scipy(kind: str, digits_network):
    model, x, y, expected = digits_network
    products = KINDS[kind][0](model, cross_entropy, x, y, batch_size=100)
    found = hessian_spectrum(products, 5, replicas=4, tolerance=1e-2)
    assert found.converged
    # The promise is 1 % and 5 %; a residual of 1 % gives far more.
    errors = np.abs(found.eigenvalues.numpy() - expected) / np.abs(expected)
    assert errors[0] < 1e-3
    assert errors.max() < 5e-3
    assert products.gradients <= (2 if kind == "exact" else 1) * 100


def test_a_long_step_counts_the_kinks_of_relu_as_curvature(digits_network):
    model, x, y, _ = digits_network
    exact = ExactProducts(model, cross_entropy, x, y)
    q = torch.nn.functional.normalize(normal(1, exact.size, seed=0), dim=1)
    expected = exact(q)
    short, long = (
        float((ProbedProducts(model, cross_entropy, x, y, relative_step=h)(q) - expected).norm() / expected.norm())
        for h in (1e-7, 1e-3)
    )
    assert short < 1e-4
    kinks = any(isinstance(module, nn.ReLU) for module in model.modules())
    assert (long > 0.1) == kinks
