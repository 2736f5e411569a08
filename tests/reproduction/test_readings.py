import pytest
import torch
from torch import nn

from replica_newton import ReplicaNewton, Simulated
from replica_newton.reproduction.readings import LITERAL, READINGS, PaperReplicas, Reading, reading_named

RATE = 0.05


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(seed: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 6, generator=generator, dtype=torch.float64),
        torch.randint(3, (size,), generator=generator),
    )


def replicas(reading: Reading, M: int = 4) -> PaperReplicas:
    return PaperReplicas([network(m if reading.start == "different" else 0) for m in range(M)], reading, RATE)


def gradients(trainer: PaperReplicas, inputs: torch.Tensor, targets: torch.Tensor, data: str) -> torch.Tensor:
    """Gradients at the replicas' points, one after the other, by autograd alone."""
    state = trainer.state_dict()
    points = state["mean"] + state["displacements"]
    M = len(points)
    shards = list(zip(inputs.chunk(M), targets.chunk(M), strict=True))
    rows = []
    for m, point in enumerate(points):
        model = network()
        nn.utils.vector_to_parameters(point, model.parameters())
        x, y = shards[m] if data == "own" else shards[0]
        loss = nn.functional.cross_entropy(model(x), y)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def dense_step(W: torch.Tensor, G: torch.Tensor, z: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The formula of `Reading`, from a dense singular value decomposition of the centred rows."""
    W, G = W - W.mean(0), G - G.mean(0)
    U, S, Vh = torch.linalg.svd(G.T, full_matrices=False)
    kept = 1e-9 * S[0] < S
    U, S, V = U[:, kept], S[kept], Vh.T[:, kept]
    divisor = S if reading.divisor == "singular" else S**2
    curved = (z @ U) / divisor @ (W.T @ V).T
    orthogonal = z - (z @ U) @ U.T if reading.orthogonal == "kept" else torch.zeros_like(z)
    return RATE * (orthogonal + curved) if reading.damped == "both" else RATE * orthogonal + curved


def test_there_are_128_readings_with_names_of_their_own() -> None:
    assert len(READINGS) == 128
    assert len({one.name for one in READINGS}) == 128
    assert all(reading_named(one.name) is one for one in READINGS)
    assert LITERAL in READINGS


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'sgd' is not the name of a reading"):
        reading_named("sgd")


def test_the_literal_reading_is_the_papers_rule_of_the_optimizer() -> None:
    model, topology = network(), Simulated(4)
    optimizer = ReplicaNewton(model.parameters(), RATE, rule="paper", topology=topology)
    trainer = replicas(LITERAL)
    for step in range(12):
        inputs, targets = batch(step)
        theirs = optimizer.step(topology.closure(model, nn.functional.cross_entropy, inputs, targets))
        ours, evaluated = trainer.step(inputs, targets)
        assert optimizer.fallbacks == 0, "the optimizer has a safeguard that the reading has not"
        assert ours == pytest.approx(float(theirs), rel=1e-9)
        assert evaluated == len(targets)
    expected = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(trainer.state_dict()["mean"], expected.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reading", READINGS, ids=lambda one: one.name)
def test_two_steps_follow_the_dense_formulas(reading: Reading) -> None:
    trainer = replicas(reading)
    parted = bool(trainer.state_dict()["displacements"].any())
    assert parted == (reading.start == "different")
    for step in range(3):
        inputs, targets = batch(step)
        before = {name: value.clone() for name, value in trainer.state_dict().items()}
        W = before["displacements"]
        own = gradients(trainer, inputs, targets, "own")
        mean, deviations = own.mean(0), own - own.mean(0)
        secants = gradients(trainer, inputs, targets, reading.data)
        _, evaluated = trainer.step(inputs, targets)
        after = trainer.state_dict()
        if not bool(W.any()):
            expected_mean, expected = before["mean"] - RATE * mean, -RATE * deviations
            assert evaluated == len(targets)
        else:
            expected_mean = before["mean"] - dense_step(W, secants, mean[None], reading)[0]
            expected = {
                "local": -RATE * deviations,
                "summed": W - RATE * deviations,
                "fixed": W,
                "own": W - dense_step(W, secants, deviations, reading),
                "reset": torch.zeros_like(W),
            }[reading.parting]
            assert evaluated == len(targets) * (2 if reading.data == "common" else 1)
        scale = float(expected_mean.abs().max())
        torch.testing.assert_close(after["mean"], expected_mean, rtol=1e-6, atol=1e-9 * max(1.0, scale))
        torch.testing.assert_close(
            after["displacements"], expected, rtol=1e-6, atol=1e-9 * max(1.0, float(expected.abs().max()))
        )


def test_own_steps_have_the_mean_step_as_their_mean() -> None:
    trainer = replicas(Reading(parting="own"))
    for step in range(4):
        trainer.step(*batch(step))
        displacements = trainer.state_dict()["displacements"]
        assert float(displacements.mean(0).abs().max()) < 1e-12 * max(1.0, float(displacements.abs().max()))


def test_replicas_that_start_together_are_not_parted_by_rounding() -> None:
    for M in (3, 6, 7, 8):
        trainer = PaperReplicas([network().float() for _ in range(M)], LITERAL, RATE)
        assert not bool(trainer.state_dict()["displacements"].any())


def test_one_replica_is_sgd() -> None:
    trainer, model = replicas(LITERAL, M=1), network()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(3):
        inputs, targets = batch(step)
        trainer.step(inputs, targets)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    trained = nn.utils.parameters_to_vector(trainer.network().parameters())
    torch.testing.assert_close(trained, nn.utils.parameters_to_vector(model.parameters()), rtol=1e-12, atol=1e-12)


def test_a_run_that_has_left_all_bounds_goes_on_to_nan() -> None:
    trainer = replicas(LITERAL)
    trainer.step(*batch(0))
    trainer.load_state_dict(trainer.state_dict() | {"mean": torch.full_like(trainer.state_dict()["mean"], 1e308)})
    loss, _ = trainer.step(*batch(1))
    trainer.step(*batch(2))
    assert not loss < 1e300 or loss != loss
    assert bool(torch.isnan(trainer.state_dict()["mean"]).all())


def test_a_state_is_taken_over_as_a_copy() -> None:
    first, second = replicas(LITERAL), replicas(LITERAL)
    first.step(*batch(0))
    state = first.state_dict()
    second.load_state_dict(state)
    second.step(*batch(1))
    assert torch.equal(first.state_dict()["mean"], state["mean"])
    first.step(*batch(1))
    assert torch.equal(first.state_dict()["mean"], second.state_dict()["mean"])
