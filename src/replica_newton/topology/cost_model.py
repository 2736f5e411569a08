"""How long a step takes: a model of latency, bandwidth and work, fitted to measured steps."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from replica_newton.topology.collectives import exchanges_for_a_sum, numbers_at_once, sent_for_a_sum
from replica_newton.topology.estimate import numbers_summed

_SUM_BYTES = 8


@dataclass(frozen=True)
class Setting:
    """What a step is made of.

    Attributes:
        parameters: N >= 1.
        replicas: M >= 1, one a process.
        every: K >= 1, steps from one second gradient on common data (`secant_data="common"` takes one every step) to
            the next; None if there are none.
        element: bytes of an element.
        crowding: processes that share a processor core, >= 1; all that a process does takes so many times longer.
    """

    parameters: int
    replicas: int
    every: int | None = None
    element: int = 4
    crowding: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """A measured step.

    Attributes:
        setting: of what.
        gradient: seconds of one forward and backward pass alone, in all processes at once.
        step: seconds of the step.
    """

    setting: Setting
    gradient: float
    step: float


@dataclass(frozen=True)
class Work:
    """What a process does in a step beside its gradient.

    Attributes:
        messages: that follow each other.
        sent: bytes to other processes.
        elements: of the vectors that the step makes or reads, in units of rows of N elements.
        products: fp64 multiply-adds of inner products and of the algebra of M×M matrices.
        calls: of the step and of its second gradients, with their small operations, whatever they work on.
    """

    messages: float
    sent: float
    elements: float
    products: float
    calls: float


def work(setting: Setting) -> Work:
    """What a process of `TreeReduction` does in a step.

    Two all-to-alls of a row of N elements and one or two of the parts of a sum of about 2 M² numbers, in each of which
    a process sends M − 1 messages; on 1/M of the columns of 2 M − 1 rows all inner products, and a linear combination;
    the inverse of an M×M matrix. A second gradient repeats one all-to-all, the sum and nothing else.

    Args:
        setting: N, M, K and bytes.

    Returns:
        The amounts, on average over K steps.
    """
    N, M = setting.parameters, setting.replicas
    second = 0.0 if setting.every is None else 1.0 / setting.every
    sums = numbers_summed(M), M, numbers_at_once(N, setting.element)
    row = N * (M - 1) / M * setting.element
    return Work(
        messages=((2 + second) + (1 + second) * exchanges_for_a_sum(*sums)) * (M - 1),
        sent=(2 + second) * row + (1 + second) * sent_for_a_sum(*sums) * _SUM_BYTES,
        elements=float(N),
        products=(2 * M - 1) ** 2 * N / M + M**3,
        calls=1.0 + second,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what they are spent on.

    Attributes:
        gradient: forward and backward passes.
        latency: of messages.
        bandwidth: sending.
        vectors: passes over vectors.
        algebra: inner products and M×M matrices.
        overhead: small operations.
    """

    gradient: float
    latency: float
    bandwidth: float
    vectors: float
    algebra: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all; what of it overlaps in truth makes a step shorter."""
        return float(sum(astuple(self)))


@dataclass(frozen=True)
class CostModel:
    """Step time as a sum of amounts of work times their costs.

        t = (1 + 1/K) t_gradient
            + c · (messages · latency + sent · byte + N · element + products · product + (1 + 1/K) call)

    with the `crowding` c; `t_gradient` is what a gradient takes under that crowding. The overlap of communication with
    the backward pass is in the fitted costs, as far as there was any where they were measured, and is not modelled.

    Attributes:
        latency: seconds a message.
        byte: seconds a byte sent, the inverse of the bandwidth.
        element: seconds that all passes over a vector take an element.
        product: seconds a multiply-add.
        call: seconds of small operations a step.
    """

    latency: float
    byte: float
    element: float
    product: float
    call: float

    def step(self, setting: Setting, gradient: float) -> StepTime:
        """What a step takes.

        Args:
            setting: N, M, K, bytes and crowding.
            gradient: seconds of one gradient, under that crowding.

        Returns:
            Seconds, by what they are spent on.
        """
        amounts, c = work(setting), setting.crowding
        second = 0.0 if setting.every is None else 1.0 / setting.every
        return StepTime(
            gradient=(1.0 + second) * gradient,
            latency=c * amounts.messages * self.latency,
            bandwidth=c * amounts.sent * self.byte,
            vectors=c * amounts.elements * self.element,
            algebra=c * amounts.products * self.product,
            overhead=c * amounts.calls * self.call,
        )


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """Costs that describe measured steps best: non-negative least squares of the relative errors.

    Args:
        measurements: at least five, that differ in N and M.

    Returns:
        The model.

    Raises:
        ValueError: if there are fewer than five measurements.
    """
    from sklearn.linear_model import LinearRegression  # half a second, which only this function is worth

    if len(measurements) < len(CostModel.__dataclass_fields__):
        raise ValueError(f"a fit of five costs needs at least five measurements, got {len(measurements)}")
    rows = [[one.setting.crowding * amount / one.step for amount in astuple(work(one.setting))] for one in measurements]
    seconds = [
        (one.step - CostModel(0.0, 0.0, 0.0, 0.0, 0.0).step(one.setting, one.gradient).total) / one.step
        for one in measurements
    ]
    # Columns of one size: amounts differ by ten orders of magnitude.
    scales = [max(row[column] for row in rows) or 1.0 for column in range(len(rows[0]))]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    costs = LinearRegression(fit_intercept=False, positive=True).fit(scaled, seconds).coef_
    return CostModel(*(float(cost) / scale for cost, scale in zip(costs, scales, strict=True)))
