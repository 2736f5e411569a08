"""The same numbers on a GPU as on the CPU, in one process and over several; skipped where there is no GPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import networks
import pytest
import torch
from networks import Problem, closure_of, flat, trained
from processes import run_processes
from reference import F64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import CurvatureMonitor, PairedProbes, ReplicaNewton, SecantCurvature, Simulated
from replica_newton.optim.bases import orthonormal_bases
from replica_newton.spectrum import ExactProducts, ProbedProducts, hessian_spectrum

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")


def on(device: str, problem: Problem) -> Problem:
    module, criterion, inputs, targets = problem
    return Problem(module.to(device), criterion, tuple(one.to(device) for one in inputs), targets.to(device))


def plain(problem: Problem, optimizer: ReplicaNewton) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.criterion(problem.module(*problem.inputs), problem.targets)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "paper", "secant_data": "common", "lr": 0.05},
        {"rule": "saddle-free", "damping": 0.5, "lr": 0.05, "max_norm": 1.0, "weight_decay": 0.1},
        {"metric": "identity"},
        {"metric": "diagonal", "weight_decay": 0.1},
        {"metric": "diagonal", "spread": PairedProbes(every=3, rank=4, relative_step=1e-6)},
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", [networks.convnet, networks.odd_parameters], ids=lambda build: build.__name__)
def test_an_optimizer_takes_the_steps_that_it_takes_on_the_cpu(problem: Any, options: dict[str, Any]) -> None:
    ends, averages, losses = [], [], []
    for device in ("cpu", GPU):
        one = on(device, problem())
        optimizer = ReplicaNewton(one.module.parameters(), topology=Simulated(4), **copy.deepcopy(options))
        losses.append([float(optimizer.step(closure_of(one, optimizer.topology))) for _ in range(30)])
        ends.append(flat(trained(one.module)).cpu())
        with optimizer.averaged():
            averages.append(flat(trained(one.module)).cpu())
    # The directions of a space are kept in fp32.
    tolerance = 1e-4 if "spread" in options else 1e-8
    torch.testing.assert_close(*ends, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*averages, rtol=tolerance, atol=tolerance)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.parametrize("build", [networks.mlp, networks.odd_parameters], ids=lambda build: build.__name__)
@pytest.mark.parametrize("after", [6, 8, 9])
def test_a_step_in_the_bases_of_the_cpu_is_that_of_the_cpu(build: Any, after: int, tmp_path: Path) -> None:
    """With a turn of the bases in it or not; in networks without directions whose units are made of rounding."""
    problem = build()
    optimizer = ReplicaNewton(problem.module.parameters())
    for _ in range(after):
        optimizer.step(plain(problem, optimizer))
    torch.save((problem.module.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    ends = []
    for device in ("cpu", GPU):
        other = on(device, build())
        resumed = ReplicaNewton(other.module.parameters())
        module, state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.module.load_state_dict(module)
        resumed.load_state_dict(state)
        held = [one for kept in resumed.state.values() for one in kept.values() if isinstance(one, Tensor)]
        assert {one.device.type for one in held} == {device}
        resumed.step(plain(other, resumed))
        ends.append(flat(trained(other.module)).cpu())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def test_a_state_of_the_gpu_goes_on_on_the_cpu(tmp_path: Path) -> None:
    problem = on(GPU, networks.convnet())
    optimizer = ReplicaNewton(problem.module.parameters(), metric="diagonal")
    for _ in range(12):
        optimizer.step(plain(problem, optimizer))
    torch.save((problem.module.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    other = networks.convnet()
    resumed = ReplicaNewton(other.module.parameters(), metric="diagonal")
    module, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.module.load_state_dict(module)
    resumed.load_state_dict(state)
    for _ in range(12):
        optimizer.step(plain(problem, optimizer))
        resumed.step(plain(other, resumed))
    torch.testing.assert_close(flat(trained(other.module)), flat(trained(problem.module)).cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 200])
def test_bases_of_a_gpu_are_those_of_a_qr_decomposition(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(size, size, generator=generator) for _ in range(3)]
    matrices += [matrices[0] @ torch.diag(torch.logspace(0, -6, size)), torch.zeros(size, size), matrices[1].clone()]
    matrices[-1][:, size // 2] = 0.0
    for found, matrix in zip(orthonormal_bases([one.to(GPU) for one in matrices]), matrices, strict=True):
        Q, R = torch.linalg.qr(matrix.double())
        found = found.cpu().double()
        torch.testing.assert_close(found.T @ found, torch.eye(size, dtype=F64), rtol=0.0, atol=1e-5)
        known = R.diagonal().abs() > 1e-3
        turned = (found * Q).sum(dim=0)[known]
        torch.testing.assert_close(turned.abs(), torch.ones_like(turned), rtol=1e-3, atol=0.0)


def test_the_default_learns_on_the_gpu_what_it_learns_on_the_cpu() -> None:
    for device in ("cpu", GPU):
        problem = on(device, networks.convnet())
        optimizer = ReplicaNewton(problem.module.parameters())
        losses = [float(optimizer.step(plain(problem, optimizer))) for _ in range(60)]
        assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_learns_in_single_and_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 20, device=GPU, dtype=dtype)
    y = (x[:, :4].float() @ torch.randn(4, 4, device=GPU)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4)).to(GPU, dtype)
    optimizer = ReplicaNewton(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(100)]
    assert losses[-1] < 0.3 * losses[0]
    assert {one.dtype for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)} == {
        torch.float32
    }


def test_autocast_around_the_loss_learns_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 20, device=GPU)
    y = (x[:, :4] @ torch.randn(4, 4, device=GPU)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).to(GPU)
    optimizer = ReplicaNewton(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(GPU, torch.bfloat16):
            loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(100)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "options", [{}, {"relative_step": 1e-6}, {"dtype": torch.bfloat16}], ids=["exact", "difference", "bfloat16"]
)
@pytest.mark.parametrize("M", [None, 4])
def test_a_monitor_sees_what_it_sees_on_the_cpu_and_leaves_no_trace(M: int | None, options: dict[str, Any]) -> None:
    seen, ends = [], []
    for device in ("cpu", GPU):
        problem = on(device, networks.convnet())
        adam = torch.optim.Adam(problem.module.parameters(), 1e-2)
        monitor = CurvatureMonitor(problem.module, optimizer=adam, rank=3, every=1, **options)

        def loss(problem: Problem = problem) -> Tensor:
            return problem.criterion(problem.module(*problem.inputs), problem.targets)

        for _ in range(20):
            adam.zero_grad()
            loss().backward()
            before = torch.cuda.get_rng_state(), flat([p.grad for p in problem.module.parameters()])
            one = monitor.observe(loss if M is None else closure_of(problem, M))
            assert torch.equal(torch.cuda.get_rng_state(), before[0])
            assert torch.equal(flat([p.grad for p in problem.module.parameters()]), before[1])
            adam.step()
        seen.append(one)
        ends.append(flat(trained(problem.module)).cpu())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)
    # The directions of a space are kept in fp32; in bfloat16 they are rounded at random, by other numbers on a GPU.
    rounding = 0.05 if "dtype" in options else 1e-3
    ours, theirs = (one.eigenvalues.cpu() for one in seen)
    torch.testing.assert_close(theirs, ours, rtol=rounding, atol=rounding * float(ours.abs().max()))
    assert seen[1].stability_ratio == pytest.approx(seen[0].stability_ratio, rel=10 * rounding)
    if M is not None:
        assert seen[1].gradient_noise_scale == pytest.approx(seen[0].gradient_noise_scale, rel=1e-6)


def test_dropout_draws_the_same_units_for_a_probe_as_for_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3)).double().to(GPU)
    x, y = torch.randn(48, 6, device=GPU, dtype=F64), torch.randint(3, (48,), device=GPU)
    closure = Simulated(2, batched=False).closure(model, cross_entropy, x, y)
    parameters = list(model.parameters())
    point = flat(parameters)
    here = closure.gradients(parameters, point.expand(2, -1)).gradients
    again = closure.gradients_again(parameters, point.expand(2, -1))
    assert torch.equal(here, again)
    assert not torch.equal(here, closure.gradients(parameters, point.expand(2, -1)).gradients)


def test_the_spectrum_of_a_network_is_that_of_its_dense_hessian() -> None:
    problem = on(GPU, networks.convnet())
    names = [name for name, _ in problem.module.named_parameters()]
    sizes = [p.numel() for p in problem.module.parameters()]

    def loss(w: Tensor) -> Tensor:
        pieces = zip(names, problem.module.parameters(), w.split(sizes), strict=True)
        state = {name: piece.view(p.shape) for name, p, piece in pieces}
        return problem.criterion(torch.func.functional_call(problem.module, state, problem.inputs), problem.targets)

    dense = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat(problem.module.parameters())))
    top = dense[dense.abs().argsort(descending=True)][:3].cpu()
    for products in (ProbedProducts, ExactProducts):
        operator = products(problem.module, problem.criterion, problem.inputs[0], problem.targets)
        found = hessian_spectrum(operator, 3, replicas=3, tolerance=1e-4)
        torch.testing.assert_close(found.eigenvalues.cpu(), top, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1000), (8, 300_000)])
def test_secants_of_fp32_rows_have_the_products_of_fp64(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    H = 0.5 + torch.rand(shape[1], generator=generator)
    z = torch.randn(shape[1], generator=generator)
    for copied in (True, False):
        ours = SecantCurvature(W.to(GPU), (W * H).to(GPU), copy=copied).inverse_hvp(z.to(GPU))
        theirs = SecantCurvature(W.double(), (W * H).double()).inverse_hvp(z.double())
        assert ours.device.type == GPU
        assert float((ours.cpu() - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"plain_closure": True},
        {"rule": "metric", "lr": 1.0, "plain_closure": True},
        {"secant_data": "common", "rule": "saddle-free", "damping": 1.0},
        {"normalised": True, "secant_data": "common"},
        {"rule": "metric", "metric": "diagonal", "lr": 1.0},
        {"servers": 1},
        {"dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_a_gpu_train_as_one_process_does(
    count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    servers = options.get("servers", 0)
    results = run_processes(tmp_path, servers + count, cases.train, steps=60, device=GPU, **options)[servers:]
    options.pop("plain_closure", None)
    kronecker = options.get("rule") == "metric" and "metric" not in options
    # Bases of directions without a gradient are made of rounding, which must then be the same.
    alone = cases.train(None, count, steps=60, **options, **({"batched": False, "device": GPU} if kronecker else {}))
    cases.check_parity(results, alone, 1e-5 if options.get("dtype") == torch.float32 else 1e-10)


@pytest.mark.parametrize(
    "options",
    [{"plain_closure": True}, {"normalised": True}, {"rule": "metric", "metric": "diagonal", "lr": 1.0}],
    ids=str,
)
def test_processes_with_a_gpu_each_train_over_nccl_as_one_process_does(options: dict[str, Any], tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    results = run_processes(tmp_path, count, cases.train, steps=60, device=GPU, backend="nccl", **options)
    options.pop("plain_closure", None)
    cases.check_parity(results, cases.train(None, count, steps=60, **options), 1e-10)


@pytest.mark.parametrize("options", [["--method", "paper"], ["--method", "metric"]], ids=lambda options: options[1])
@pytest.mark.parametrize("where", [[], ["--topology", "tree", "--processes", "2"]], ids=["alone", "tree"])
def test_the_command_trains_on_a_gpu_and_resumes_on_the_cpu(
    options: list[str], where: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "replica_newton", "train", *options, *where, "--out", str(tmp_path)]
    for device, more in (("cuda", ["--epochs", "2"]), ("cpu", ["--epochs", "3", "--resume"])):
        ran = subprocess.run([*command, *more, "--device", device], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [epoch["train_nll"] for epoch in epochs]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    assert losses[-1] < 1.0


def test_a_comparison_and_a_spectrum_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    compare = ["compare", "--methods", "sgd,paper", "--replicas", "2", "--epochs", "2"]
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        spectrum = ["spectrum", "--checkpoint", str(tmp_path / "cpu/runs/sgd-M1-rate0.3-seed0"), "--top", "3"]
        for options in ([*compare, "--out", str(folder)], [*spectrum, "--out", str(folder)]):
            command = [sys.executable, "-m", "replica_newton", *options, "--device", device]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr
        runs = json.loads((folder / "summary.json").read_text())["runs"]
        losses = [run["train_nll"][-1] for run in runs]
        found[device] = losses, json.loads((folder / "spectrum.json").read_text())["eigenvalues"]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=0.05)
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=0.02)


def test_a_step_over_processes_waits_for_what_the_gpu_has_still_to_do(tmp_path: Path) -> None:
    """Buffers that are written to again: with kernels that take long, a step must not read or send too early."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    runs = [
        run_processes(folder, 2, cases.train_wide, steps=8, device=GPU, busy=busy)
        for folder, busy in zip(folders, (False, True), strict=True)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
