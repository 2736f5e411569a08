"""Influence functions from live curvature: find the digits whose labels are wrong.

A tenth of the labels of 600 digits is flipped, a small network is trained on them, and a `CurvatureMonitor` watches.
How much a sample holds its own loss down is its self-influence,

    s_i = g_iᵀ (|H| + λI)⁻¹ g_i,

with its gradient g_i and the Hessian H of the training loss (Koh and Liang 2017, arXiv 1703.04730). Samples that only
their own label explains have a large one. The monitor gives the inverse on the tracked pairs; across them it is 1/λ.
The network is small enough to write H down, so the same is computed exactly, and compared by rank correlation.

Beside it stand two measures that need no curvature: the squared gradient norm (no tracked pair at all) and the loss.

    python examples/influence.py
"""

from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from replica_newton import CurvatureMonitor
from replica_newton.training.datasets import load_dataset

SAMPLES, FLIPPED, HIDDEN, STEPS, RANK = 600, 60, 10, 400, 32
DAMPINGS = (0.003, 0.03, 0.3)


def main() -> None:
    """Flip, train, rank, compare."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_dataset("digits", train_limit=SAMPLES)
    x = data.train_inputs.flatten(start_dim=1)
    y, wrong = flip(data.train_labels, data.classes)
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, data.classes))
    monitor = train(model, x, y)
    gradients, losses = sample_gradients(model, x, y)
    theta, vectors = torch.linalg.eigh(dense_hessian(model, x, y).double())

    table = Table("λ", "measure", "rank correlation with exact", f"flipped among the first {FLIPPED}")
    for damping in DAMPINGS:
        exact = ((gradients.double() @ vectors).square() / (theta.abs() + damping)).sum(dim=1)
        tracked = (gradients * monitor.inverse_hvp(gradients, damping, absolute=True)).sum(dim=1)
        rows = {"exact": exact, f"tracked, {RANK} pairs": tracked, "gradient norm": gradients.square().sum(dim=1)}
        for name, scores in (rows | {"loss": losses}).items():
            correlation = spearmanr(scores.numpy(), exact.numpy()).statistic
            table.add_row(f"{damping:g}", name, f"{correlation:.3f}", f"{found(scores, wrong)} of {FLIPPED}")
        table.add_section()
    console = Console()
    console.print(
        f"{gradients.shape[1]:,} parameters, training loss {float(losses.mean()):.3f}; Hessian eigenvalues from "
        f"{float(theta.min()):.3g} to {float(theta.max()):.3g}, tracked {monitor.subspace.eigenvalues[0]:.3g} to "
        f"{monitor.subspace.eigenvalues[-1]:.3g}. By chance {FLIPPED**2 // SAMPLES} would be found."
    )
    console.print(table)


def flip(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels of which `FLIPPED` are wrong, and which ones."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(labels), generator=generator)[:FLIPPED]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, classes, (FLIPPED,), generator=generator)) % classes
    return labels, wrong


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, x: Tensor, y: Tensor) -> CurvatureMonitor:
    """Full-batch Adam with weight decay, watched at every step by a gradient more."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    monitor = CurvatureMonitor(model, rank=RANK, every=1, relative_step=1e-3, reuse_gradient=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x, y).backward()  # type: ignore[no-untyped-call]
        monitor.observe(partial(loss, model, x, y))
        optimizer.step()
    return monitor


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of every sample's loss, `(samples, N)`, and the losses."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of(state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, state, (x[None],)), y[None])

    by_name = vmap(grad(of), in_dims=(None, 0, 0))(state, x, y)
    losses = nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    return torch.cat([piece.flatten(start_dim=1) for piece in by_name.values()], dim=1), losses


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The whole Hessian, `(N, N)`."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in named.values()]

    def of(vector: Tensor) -> Tensor:
        pieces = zip(named.items(), torch.split(vector, sizes), strict=True)
        state = {name: piece.view_as(parameter) for (name, parameter), piece in pieces}
        return nn.functional.cross_entropy(functional_call(model, state, (x,)), y)

    point = torch.cat([parameter.flatten() for parameter in named.values()])
    hessian: Tensor = jacrev(grad(of), chunk_size=128)(point)
    return (hessian + hessian.T) / 2


def found(scores: Tensor, wrong: Tensor) -> int:
    """How many flipped labels are among the highest scores."""
    return len(set(scores.topk(FLIPPED).indices.tolist()) & set(wrong.tolist()))


if __name__ == "__main__":
    main()
