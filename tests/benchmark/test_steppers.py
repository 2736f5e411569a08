import pytest
import torch
from torch import Tensor, nn

from replica_newton.benchmark.optimizers import METHODS, WithoutFall, WithoutGrowth, WithoutRise
from replica_newton.benchmark.steppers import DiagonalHessian, Stepper
from replica_newton.optim.rate import DistanceRate

CURVATURES = torch.tensor([1.0, 2.0, 5.0, 0.5])


class Bowl(nn.Module):
    """`½ Σ h w²` for every sample, whatever its input: its Hessian is diagonal, where one probe is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -1.0, 2.0, 3.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """The loss of every sample."""
        return (0.5 * CURVATURES * self.w**2).sum().expand(len(inputs))


def mean(outputs: Tensor, _targets: Tensor) -> Tensor:
    return outputs.mean()


class Remembers(torch.optim.SGD):
    """SGD that remembers the estimates it is given."""

    def __init__(self, params: object) -> None:
        super().__init__(params, lr=0.1)  # type: ignore[arg-type]
        self.estimates: list[Tensor | None] = []

    def step(self, closure: object = None, hessian: list[Tensor] | None = None) -> object:  # type: ignore[override]
        """Remember, and step."""
        self.estimates.append(None if hessian is None else hessian[0])
        return super().step(closure)  # type: ignore[call-overload]


def test_hutchinsons_estimate_is_the_diagonal_and_costs_two_gradients() -> None:
    module = Bowl()
    optimizer = Remembers(module.parameters())
    stepper = DiagonalHessian(module, mean, optimizer, every=3, gaussian=False)
    batch = (torch.zeros(8, 1), torch.zeros(8))
    start = module.w.detach().clone()
    loss, samples = stepper.step(*batch)
    assert (loss, samples) == (float((0.5 * CURVATURES * start**2).sum()), 3 * 8)
    assert torch.allclose(module.w, start * (1.0 - 0.1 * CURVATURES))
    assert [stepper.step(*batch)[1] for _ in range(4)] == [8, 8, 24, 8]
    given = optimizer.estimates
    assert [one is None for one in given] == [False, True, True, False, True]
    assert given[0] is not None
    assert torch.allclose(given[0], CURVATURES)
    assert module.w.grad is not None
    assert not module.w.grad.requires_grad


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_counts(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    method, module = METHODS[name], network()
    inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
    stepper = method.make(module, nn.functional.cross_entropy, method.rates[len(method.rates) // 2])
    found = [stepper.step(inputs, targets) for _ in range(12)]
    first, counts = found[0][0], [samples for _, samples in found]
    with stepper.evaluating():
        last = float(nn.functional.cross_entropy(module(inputs), targets).detach())
    assert last < first
    expected = {
        "lbfgs": [160] * 12,
        "adahessian": [48] * 12,
        "sophia": [48, *[16] * 9, 48, 16],
        # The first step, before the replicas have parted, needs no second gradient.
        **{key: [16, *[32] * 11] for key in ("M=2", "M=4", "M=8", "random-directions", "paper-common")},
    }
    assert counts == expected.get(name, [16] * 12)


def test_the_rate_of_every_group_is_scaled() -> None:
    pytest.importorskip("pytorch_optimizer")
    stepper = METHODS["muon"].make(network(), nn.functional.cross_entropy, 0.1)
    before = [group["lr"] for group in stepper.optimizer.param_groups]
    assert len(before) == 2
    for factor in (0.5, 0.25):
        stepper.scale_rate(factor)
        assert [group["lr"] for group in stepper.optimizer.param_groups] == pytest.approx([x * factor for x in before])
    # Hidden weights alone are Muon's: one of three linear layers is the last.
    muon = next(group for group in stepper.optimizer.param_groups if group["use_muon"])
    assert [tuple(parameter.shape) for parameter in muon["params"]] == [(8, 4), (8, 8)]


@pytest.mark.parametrize(("name", "rate"), [("schedule-free", 0.1), ("replica-newton", 1.0)])
def test_methods_without_a_schedule_keep_their_rate_and_are_evaluated_at_their_average(name: str, rate: float) -> None:
    pytest.importorskip("pytorch_optimizer")
    module = Bowl()
    stepper = METHODS[name].make(module, mean, rate)
    for _ in range(5):
        stepper.scale_rate(0.0)
        stepper.step(torch.zeros(8, 1), torch.zeros(8))
    there = module.w.detach().clone()
    assert float(there[0]) < 0.9
    with stepper.evaluating():
        assert not torch.equal(module.w, there)
    assert torch.allclose(module.w, there)


def test_a_plain_stepper_steps_as_its_optimizer() -> None:
    module = Bowl()
    stepper = Stepper(module, mean, torch.optim.SGD(module.parameters(), 0.1))
    start = module.w.detach().clone()
    stepper.scale_rate(0.5)
    stepper.step(torch.zeros(8, 1), torch.zeros(8))
    assert torch.allclose(module.w, start * (1.0 - 0.05 * CURVATURES))


def observed(rate: DistanceRate, steps: int) -> list[float]:
    """Rates of so many steps that all leave the slope as it is, in a network that grows."""
    rates = []
    for step in range(steps):
        rates.append(rate(1.0 + step))
        rate.observe(1.0, 1.0)
    return rates


def test_the_ablations_of_the_rate_leave_out_what_they_say() -> None:
    default, rise, fall, growth = (
        observed(kind(), 60) for kind in (DistanceRate, WithoutRise, WithoutFall, WithoutGrowth)
    )
    assert rise[0] == rise[10] == pytest.approx(0.5)
    assert rise[25:] == default[25:]
    assert fall[:20] == default[:20]
    assert fall[-1] == pytest.approx(default[-1] * 3.0**0.5)
    assert growth[-1] == pytest.approx(0.5 / 3.0**0.5)
    assert default[-1] > 2.0 * growth[-1]
