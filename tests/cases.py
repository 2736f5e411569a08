"""What the processes of `processes.run_processes` do, and the same in one process."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replica_newton import ParameterServer, ReplicaNewton, Simulated, TreeReduction

BATCH = 48
CLASSES = 4


class Network(nn.Module):
    """Batch normalisation or not, a parameter of no dimension, one that gets no gradient; 155 or 171 elements."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.first = nn.Linear(7, 12)
        self.norm = nn.BatchNorm1d(12) if normalised else nn.Identity()
        self.second = nn.Linear(12, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


def network(dtype: torch.dtype, *, normalised: bool = False, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(normalised).to(dtype)


def batch(step: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A global batch that is the same for all."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64)
    targets = (inputs[:, :CLASSES] + 0.3 * torch.randn(BATCH, CLASSES, generator=generator)).argmax(dim=1)
    return inputs.to(device, dtype), targets.to(device)


def train(
    rank: int | None,
    count: int,
    *,
    steps: int,
    dtype: torch.dtype = torch.float64,
    normalised: bool = False,
    plain_closure: bool = False,
    servers: int = 0,
    lr: float = 0.05,
    decay: float = 1.0,
    poisoned: tuple[int, ...] = (),
    batched: bool | None = None,
    mark: int = 0,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Train by the optimizer, over processes or (rank None) in this one; everything that a test may want to know."""
    # Processes start apart on purpose: rank 0 decides.
    module = network(dtype, normalised=normalised, seed=0 if rank is None else (rank - servers) % count).to(device)
    if rank is None:
        topology: Any = Simulated(count, batched=batched)
    else:
        topology = ParameterServer(servers) if servers else TreeReduction()
    optimizer = ReplicaNewton(module.parameters(), lr, topology=topology, **({"rule": "paper"} | options))
    if servers and rank is not None and topology.is_server:
        noted = {0: {}, steps: {}}
        take = optimizer._try_step

        def note(closure: Any) -> None:
            noted.setdefault(topology.steps, dict(topology.elements_sent))
            take(closure)
            noted[steps] = dict(topology.elements_sent)

        optimizer._try_step = note
        optimizer.serve()
        return {
            "sent_a_step": a_step(noted[steps], noted[mark], steps - mark),
            "state": state_size(optimizer),
            "lr": optimizer.param_groups[0]["lr"],
        }
    losses, eigenvalues, together, sent_before = [], [], [], {}
    for step in range(steps):
        if step == mark and rank is not None:
            sent_before = dict(topology.elements_sent)
        inputs, targets = batch(step, dtype, device)
        if step in poisoned:
            inputs[-1, 0] = torch.nan
        if rank is not None:
            workers, worker = count - servers, rank - servers
            inputs, targets = inputs.chunk(workers)[worker], targets.chunk(workers)[worker]
        closure = topology.closure(module, cross_entropy, inputs, targets)
        if plain_closure and rank is not None:

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                loss = cross_entropy(module(inputs), targets)
                loss.backward()
                return loss

        loss = float(optimizer.step(closure))
        if step in poisoned:
            assert not math.isfinite(loss)
        else:
            losses.append(loss)
        # By one alone: what is M-sized must not need the others. After a step that is given up, that of the step before
        # is kept in one process alone.
        if optimizer.curvature is not None and rank in {None, servers} and step not in poisoned:
            eigenvalues.append(optimizer.curvature.eigenvalues)
        if step % 50 == 7:
            optimizer.synchronise()
            together.append(nn.utils.parameters_to_vector(module.parameters()).detach().to("cpu", copy=True))
        for group in optimizer.param_groups:
            group["lr"] *= decay
    sent = dict(topology.elements_sent) if rank is not None else {}
    with optimizer.averaged():
        averaged = nn.utils.parameters_to_vector(module.parameters()).detach().to("cpu", copy=True)
    optimizer.close()
    return {
        "averaged": averaged,
        "losses": losses,
        "eigenvalues": eigenvalues,
        "together": together,
        "parameters": nn.utils.parameters_to_vector(module.parameters()).detach().cpu(),
        "buffers": [buffer.to("cpu", copy=True) for buffer in module.buffers()],
        "fallbacks": optimizer.fallbacks,
        "skipped": optimizer.skipped,
        "sent_a_step": a_step(sent, sent_before, steps - mark),
        "state": state_size(optimizer),
        "probes": None if optimizer.probes is None else optimizer.probes.eigenvalues,
    }


def a_step(after: dict[str, int], before: dict[str, int], steps: int) -> dict[str, float]:
    """Elements sent in each of so many steps, by phase."""
    return {phase: (count - before.get(phase, 0)) / steps for phase, count in after.items()}


def state_size(optimizer: ReplicaNewton) -> int:
    """Elements that the optimizer keeps in this process."""
    return sum(one.numel() for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor))


def resume(rank: int, count: int, *, steps: int) -> tuple[Tensor, Tensor]:
    """Parameters after twice as many steps, without and with a checkpoint half-way."""
    ends = []
    for interrupted in (False, True):
        module = network(torch.float32)
        topology = TreeReduction()
        optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
        for step in range(2 * steps):
            if interrupted and step == steps:
                optimizer.synchronise()
                saved = module.state_dict(), optimizer.state_dict()
                module = network(torch.float32, seed=9)
                optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
                module.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            inputs, targets = (one.chunk(count)[rank] for one in batch(step, torch.float32))
            optimizer.step(topology.closure(module, cross_entropy, inputs, targets))
        optimizer.synchronise()
        ends.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return ends[0], ends[1]


def other_number(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Parameters after a step with the state of another number of replicas, and after one without a state."""
    ends = []
    for loaded in (True, False):
        module = network(torch.float64)
        optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=TreeReduction())
        if loaded:
            state = optimizer.state_dict()
            state["state"] = {0: {"displacements": torch.ones(count + 1, 9), "shared": torch.ones(9), "step": 4}}
            optimizer.load_state_dict(state)
        inputs, targets = (one.chunk(count)[rank] for one in batch(0, torch.float64))
        optimizer.step(optimizer.topology.closure(module, cross_entropy, inputs, targets))
        optimizer.synchronise()
        ends.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return ends[0], ends[1]


def given_gradients(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Parameters after steps without a closure, and after SGD on the mean gradient."""
    module, reference = network(torch.float64), network(torch.float64)
    optimizer = ReplicaNewton(module.parameters(), 0.1, rule="paper", topology=TreeReduction())
    sgd = torch.optim.SGD(reference.parameters(), 0.1)
    for step in range(3):
        inputs, targets = batch(step, torch.float64)
        module.zero_grad()
        cross_entropy(module(inputs.chunk(count)[rank]), targets.chunk(count)[rank]).backward()
        optimizer.step()
        sgd.zero_grad()
        cross_entropy(reference(inputs), targets).backward()
        sgd.step()
    optimizer.synchronise()
    return tuple(nn.utils.parameters_to_vector(one.parameters()).detach() for one in (module, reference))


def not_finite(rank: int, count: int, *, servers: int = 0) -> dict[str, Any] | None:
    """One replica's loss is nan in the fourth step: what all of them say, and that training can go on."""
    module = network(torch.float64)
    topology = ParameterServer(servers) if servers else TreeReduction()
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
    if not topology.is_worker:
        optimizer.serve()
        return None
    rank, count = rank - servers, count - servers
    said, before, after = "", None, None
    for step in range(6):
        inputs, targets = (one.chunk(count)[rank].clone() for one in batch(step, torch.float64))
        if step == 3 and rank == 1:
            inputs[0, 0] = torch.nan
        before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        try:
            optimizer.step(topology.closure(module, cross_entropy, inputs, targets))
        except FloatingPointError as error:
            said = str(error)
            after = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
            unchanged = torch.equal(before, after)
    optimizer.synchronise()
    optimizer.close()
    return {"said": said, "unchanged": unchanged, "parameters": nn.utils.parameters_to_vector(module.parameters())}


REFUSALS = [
    "spread must be LocalStep() or RandomDirections() over several processes, got 'outwards'",
    "timeout=0.0 must be positive and finite, in seconds",
    "on_lost='wait' must be one of drop, stop",
    "common data need a closure from topology.closure(module, criterion, inputs, targets)",
    "a TreeReduction belongs to its process and cannot be copied or pickled",
]


def refusals(rank: int, count: int) -> list[str]:
    """What is said to input that cannot work."""
    module, topology = network(torch.float64), TreeReduction()
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology, secant_data="common")
    inputs, targets = (one.chunk(count)[rank] for one in batch(0, torch.float64))

    def closure() -> Tensor:
        loss = cross_entropy(module(inputs), targets)
        loss.backward()
        return loss

    def two_steps() -> None:
        for _ in range(2):
            optimizer.step(closure)

    said = []
    for refused in (
        lambda: ReplicaNewton(module.parameters(), rule="paper", topology=topology, spread="outwards"),
        lambda: TreeReduction(timeout=0.0),
        lambda: ParameterServer(on_lost="wait"),
        two_steps,
        lambda: copy.deepcopy(topology),
    ):
        try:
            refused()
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def check_parity(results: list[dict[str, Any]], alone: dict[str, Any], tolerance: float) -> None:
    """That processes have trained as one process has, and are equal to each other bit for bit."""
    scale = float(alone["parameters"].abs().max())
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        for name in ("parameters", "averaged"):
            error = float((result[name] - alone[name]).abs().max())
            assert error <= tolerance * scale
        assert result["fallbacks"] == alone["fallbacks"]
        for ours, theirs in itertools.zip_longest(result["buffers"], alone["buffers"]):
            torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=tolerance)
    first = results[0]
    for ours, theirs in zip(first["eigenvalues"][:20], alone["eigenvalues"], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e6 * tolerance, atol=1e4 * tolerance)
    for result in results[1:]:
        assert result["losses"] == first["losses"]
        for one, other in zip(result["together"], first["together"], strict=True):
            assert torch.equal(one, other), "replicas differ after a synchronisation"
        assert torch.equal(result["parameters"], first["parameters"])


def too_many_servers(rank: int, count: int) -> str:
    """What is said to a group without a worker."""
    del rank
    try:
        ParameterServer(count)
    except ValueError as error:
        return str(error)
    return ""


def train_wide(rank: int, count: int, *, steps: int, device: str, busy: bool) -> Tensor:
    """Parameters of a network of 4 M after some steps; `busy` keeps the device at other work before every closure."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 2000), nn.Tanh(), nn.Linear(2000, 2000), nn.Tanh(), nn.Linear(2000, 4))
    module.to(device)
    topology = TreeReduction()
    optimizer = ReplicaNewton(module.parameters(), 0.05, rule="paper", topology=topology)
    load = torch.randn(4000, 4000, device=device)
    for step in range(steps):
        inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(device)
        targets = torch.arange(64, device=device) % 4
        closure = topology.closure(module, cross_entropy, inputs.chunk(count)[rank], targets.chunk(count)[rank])
        if busy:
            load = load @ load / 64.0
        optimizer.step(closure)
    optimizer.synchronise()
    return nn.utils.parameters_to_vector(module.parameters()).detach().cpu()
