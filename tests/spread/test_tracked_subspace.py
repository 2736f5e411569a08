"""The tracked space on matrices whose eigenpairs are known."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import F64, normal, symmetric
from torch import Tensor

from replica_newton import TrackedSubspace

TOP = torch.tensor([10.0, -8.0, 6.0, 5.0, -4.0, 3.0, 2.5, 2.2], dtype=F64)
SPECTRUM = torch.cat((TOP, torch.linspace(1.0, -1.0, 32, dtype=F64)))
N, ORDER = len(SPECTRUM), len(TOP)


def probe(space: TrackedSubspace, H: Tensor, count: int = ORDER, *, times: int = 1) -> None:
    for _ in range(times):
        space.observe(space.directions(count).to(F64) @ H)


def by_magnitude(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues by magnitude descending and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(H)
    order = values.abs().argsort(descending=True)
    return values[order], vectors[:, order].T


def assert_orthonormal(rows: Tensor, atol: float = 2e-6) -> None:
    gram = rows.to(F64) @ rows.to(F64).T
    torch.testing.assert_close(gram, torch.eye(len(rows), dtype=F64), rtol=0.0, atol=atol)


def assert_independent(rows: Tensor) -> None:
    """Of unit length, and none nearly a mixture of the others."""
    sizes = torch.linalg.svdvals(rows.to(F64))
    torch.testing.assert_close(rows.to(F64).norm(dim=1), torch.ones(len(rows), dtype=F64), rtol=0.0, atol=2e-6)
    assert float(sizes.min()) > 0.1


def assert_equal_states(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name], name


def copied(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


@pytest.mark.parametrize("count", [ORDER, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 2])
def test_exact_responses_converge_to_the_top_eigenpairs_with_their_signs(count: int, seed: int):
    H = symmetric(SPECTRUM, seed=seed)
    space = TrackedSubspace(ORDER, N, smoothing=1.0, seed=seed)
    probe(space, H, count, times=16 * ORDER // count)
    torch.testing.assert_close(space.eigenvalues, TOP, rtol=1e-4, atol=0.0)
    # Here a basis turned after every probe locked on to -1.27, which is no eigenvalue, with a residual of 1e-5.
    cosines = (space.eigenvectors.to(F64) * by_magnitude(H)[1][:ORDER]).sum(dim=1).abs()
    assert float(cosines.min()) > 0.9999
    assert float(space.residuals.max()) < 1e-2


@pytest.mark.parametrize(("smoothing", "count"), [(1.0, ORDER), (0.5, 1), (0.3, 3), (0.7, 5)])
def test_directions_are_independent_and_eigenvectors_orthonormal_at_all_times(smoothing: float, count: int):
    space = TrackedSubspace(ORDER, N, smoothing=smoothing)
    for step in range(30):
        assert_independent(space.directions(ORDER))
        assert_orthonormal(space.eigenvectors)
        probe(space, symmetric(1e3 * SPECTRUM, seed=step % 3), count)


@pytest.mark.parametrize("sweeps", [1, 3, 12])
def test_residuals_are_those_of_the_matrix_when_all_responses_are_its_own(sweeps: int):
    H = symmetric(SPECTRUM, seed=0)
    space = TrackedSubspace(ORDER, N, smoothing=1.0)
    probe(space, H, times=sweeps)
    vectors = space.eigenvectors.to(F64)
    direct = (vectors @ H - space.eigenvalues[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(space.residuals, direct, rtol=1e-4, atol=1e-5)
    # By then the first are converged and the last not yet, so that both ends of the scale are seen.
    assert sweeps != 3 or float(direct[0]) < 1.0 < 10.0 * float(direct[-1])


def model(space: TrackedSubspace) -> Tensor:
    A, on_vectors, on_responses = torch.empty(N, N), space._vectors.T.double(), space._responses.T.double()
    space._model(on_vectors, on_responses - on_vectors @ space._projected, A)
    return A.to(F64)


def test_the_model_is_symmetric_and_agrees_with_one_matrix_on_the_space():
    H = symmetric(SPECTRUM, seed=0)
    space = TrackedSubspace(ORDER, N, smoothing=1.0)
    probe(space, H, times=3)
    A, X = model(space), space.eigenvectors.to(F64)
    torch.testing.assert_close(A, A.T, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(X @ A, X @ H, rtol=0.0, atol=2e-5)
    # It knows half of H elsewhere: H less its part across the space.
    across = torch.eye(N, dtype=F64) - X.T @ X
    torch.testing.assert_close(A, H - across @ H @ across, rtol=0.0, atol=2e-5)


def test_the_model_agrees_with_the_responses_on_the_space_whatever_they_are():
    space = TrackedSubspace(ORDER, N, smoothing=0.4)
    for seed in range(20):
        space.observe(normal(3, N, seed=seed))
    state = space.state_dict()
    torch.testing.assert_close(state["vectors"] @ model(space).float(), state["responses"], rtol=0.0, atol=1e-5)


def test_smoothing_averages_noise():
    def error(smoothing: float, seed: int) -> float:
        H = symmetric(SPECTRUM, seed=seed)
        space = TrackedSubspace(ORDER, N, smoothing=smoothing, seed=seed)
        errors = []
        for step in range(300):
            noise = 0.1 * normal(N, N, seed=1000 * seed + step)
            probe(space, H + noise + noise.T, 2)
            if step >= 150:
                errors.append(((space.eigenvalues - TOP) / TOP).abs()[:5].mean())
        return float(torch.stack(errors).mean())

    for seed in range(3):
        assert error(0.2, seed) < 0.5 * error(1.0, seed)


@pytest.mark.parametrize("count", [ORDER, 2])
def test_uncertainties_are_the_errors_that_noise_makes(count: int):
    """90 % intervals of the eigenvalues of a matrix, of which each replica sees another noisy copy, hold 85–95 %."""
    H, covered = symmetric(SPECTRUM, seed=0), []
    space = TrackedSubspace(ORDER, N, smoothing=0.5)
    for step in range(200 * ORDER // count):
        noise = 0.1 * normal(count, N, N, seed=step)
        space.observe(torch.einsum("mi,mij->mj", space.directions(count).to(F64), H + noise + noise.mT))
        if step >= 20 * ORDER // count:
            covered.append(((space.eigenvalues - TOP).abs() < 1.645 * space.uncertainties)[:5])
    assert 0.85 < float(torch.stack(covered).to(F64).mean()) < 0.95


def test_without_noise_there_is_no_uncertainty_and_before_a_third_probe_none_is_known():
    H = symmetric(SPECTRUM, seed=0)
    space = TrackedSubspace(ORDER, N)
    assert space.uncertainties.shape == (0,)
    probe(space, H)
    probe(space, H)
    assert bool(space.uncertainties.isinf().all())
    probe(space, H)
    early = space.uncertainties
    probe(space, H, times=60)
    assert float(early[0]) > 0.1
    assert float(space.uncertainties.max()) < 1e-2


@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_the_space_follows_a_matrix_that_rotates_slowly(smoothing: float):
    H = symmetric(SPECTRUM, seed=0)
    start = by_magnitude(H)[1][0]
    skew = normal(N, N, seed=1)
    rotation = torch.linalg.matrix_exp(5e-4 * (skew - skew.T))
    space = TrackedSubspace(ORDER, N, smoothing=smoothing)
    for _ in range(300):
        H = rotation @ H @ rotation.T
        probe(space, H, 1)
    top = by_magnitude(H)[1][0]
    assert abs(float(start @ top)) < 0.5
    assert abs(float(space.eigenvectors[0].to(F64) @ top)) > 0.99
    torch.testing.assert_close(space.eigenvalues[:5], TOP[:5], rtol=0.02, atol=0.0)


@pytest.mark.parametrize("count", [1, 3, ORDER])
def test_there_is_nothing_to_see_before_every_direction_has_been_probed(count: int):
    space = TrackedSubspace(ORDER, N)
    H = symmetric(SPECTRUM, seed=0)
    for _ in range(-(-ORDER // count)):
        assert space.sweeps == 0
        assert space.eigenvalues.shape == space.residuals.shape == (0,)
        assert space.eigenvectors.shape == (0, N)
        probe(space, H, count)
    assert space.sweeps == 1
    assert space.eigenvalues.shape == space.residuals.shape == (ORDER,)
    assert space.eigenvalues.dtype == space.residuals.dtype == F64
    assert space.eigenvectors.shape == (ORDER, N)


def test_the_first_sweep_gives_the_ritz_values_of_the_random_directions():
    space = TrackedSubspace(ORDER, N, smoothing=0.1)
    responses = normal(ORDER, N, seed=3)  # of a matrix as far from symmetric as noise can make it
    projected = space.directions(ORDER).to(F64) @ responses.T
    for rows in responses.split(3):
        space.observe(rows)
    expected = by_magnitude((projected + projected.T) / 2)[0]
    torch.testing.assert_close(space.eigenvalues, expected, rtol=0.0, atol=1e-5)


def test_directions_are_probed_in_turn():
    space = TrackedSubspace(5, N)
    first = space.directions(5)
    torch.testing.assert_close(space.directions(2), first[:2])
    probe(space, symmetric(SPECTRUM, seed=0), 2)
    torch.testing.assert_close(space.directions(4), first[[2, 3, 4, 0]], rtol=0.0, atol=1e-6)
    probe(space, symmetric(SPECTRUM, seed=0), 2)
    torch.testing.assert_close(space.directions(1), first[4:], rtol=0.0, atol=1e-6)
    probe(space, symmetric(SPECTRUM, seed=0), 1)
    assert (space.directions(5) @ first.T).abs().max() < 0.9


@pytest.mark.parametrize("count", [6, 1])
def test_a_matrix_of_lower_rank_has_no_other_eigenvalues(count: int):
    H = symmetric(torch.cat((torch.tensor([3.0, -2.0, 1.0]), torch.zeros(N - 3))), seed=0)
    space = TrackedSubspace(6, N, smoothing=1.0)
    for _ in range(60):
        probe(space, H, count)
        assert_independent(space.directions(6))
    expected = torch.tensor([3.0, -2.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(space.eigenvalues, expected, rtol=0.0, atol=1e-4)
    assert_orthonormal(space.eigenvectors)


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    order=st.integers(1, 8),
    count=st.integers(1, 12),
    decades=st.sampled_from([0, 3, 9, 18]),
    rank=st.integers(0, 40),
    noise=st.sampled_from([0.0, 1e-6, 1.0, 100.0]),
    smoothing=st.sampled_from([0.1, 0.5, 1.0]),
    vanishes=st.sampled_from([1.0, 0.0, 2.0**-140]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_responses_are_the_basis_is_orthonormal_and_all_is_finite(
    size: int,
    seed: int,
    order: int,
    count: int,
    decades: int,
    rank: int,
    noise: float,
    smoothing: float,
    vanishes: float,
    dtype: torch.dtype,
):
    spectrum = 10.0 ** torch.linspace(0.0, -decades, size, dtype=F64) * (torch.arange(size) < rank)
    H = symmetric(spectrum, seed=seed)
    space = TrackedSubspace(min(order, size), size, smoothing=smoothing, seed=seed, dtype=dtype)
    for step in range(24):
        E = noise * normal(size, size, seed=step)
        probe(space, (1.0 if step < 12 else vanishes) * (H + E + E.T), count)
        if len(space.eigenvectors):
            assert_orthonormal(space.eigenvectors, 2e-6 if dtype == torch.float32 else 2.0**-5)
        for numbers in (space.eigenvalues, space.residuals):
            assert bool(numbers.isfinite().all())


@pytest.mark.parametrize("zeros", [1, 3, 10])
def test_after_sweeps_without_response_curvature_is_still_found_wherever_it_appears(zeros: int):
    space = TrackedSubspace(3, N, smoothing=1.0)
    for _ in range(zeros):
        probe(space, torch.zeros(N, N, dtype=F64), 3)
        assert torch.equal(space.eigenvalues, torch.zeros(3, dtype=F64))
        assert torch.equal(space.residuals, torch.zeros(3, dtype=F64))
        assert_independent(space.directions(3))
    # Flat along the first axes: inputs that are always zero, say.
    H = torch.cat((torch.zeros(N - 4), torch.tensor([5.0, -4.0, 3.0, 0.5]))).to(F64).diag()
    probe(space, H, 3, times=20)
    torch.testing.assert_close(space.eigenvalues, torch.tensor([5.0, -4.0, 3.0]).to(F64), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("size", [1, 6])
def test_a_space_of_all_directions_knows_the_whole_spectrum_at_once(size: int):
    H = symmetric(normal(size, seed=3), seed=1)
    space = TrackedSubspace(size, size, smoothing=1.0)
    probe(space, H, size)
    torch.testing.assert_close(space.eigenvalues, by_magnitude(H)[0], rtol=0.0, atol=1e-5)
    assert float(space.residuals.max()) < 1e-5


@pytest.mark.parametrize("factor", [2.0**-40, -1.0, 2.0**40])
def test_a_multiple_of_the_matrix_has_multiples_of_the_eigenvalues(factor: float):
    H = symmetric(SPECTRUM, seed=0)
    spaces = [TrackedSubspace(ORDER, N), TrackedSubspace(ORDER, N)]
    for space, matrix in zip(spaces, (H, factor * H), strict=True):
        probe(space, matrix, 3, times=60)
    torch.testing.assert_close(spaces[1].eigenvalues, factor * spaces[0].eigenvalues, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(
        spaces[1].residuals, abs(factor) * spaces[0].residuals, rtol=1e-3, atol=5e-5 * abs(factor)
    )


def test_the_order_of_the_parameters_does_not_matter():
    H, permutation = symmetric(SPECTRUM, seed=0), normal(N, seed=5).argsort()
    space, permuted = TrackedSubspace(ORDER, N), TrackedSubspace(ORDER, N)
    state = copied(space.state_dict())
    permuted.load_state_dict(state | {"vectors": state["vectors"][:, permutation]})
    for _ in range(20):
        probe(space, H, 3)
        probe(permuted, H[permutation][:, permutation], 3)
        torch.testing.assert_close(permuted.eigenvalues, space.eigenvalues, rtol=0.0, atol=1e-3)


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("probes", [0, 2, 3, 11])
def test_a_loaded_state_goes_on_bit_for_bit(probes: int):
    H = symmetric(SPECTRUM, seed=0)
    space = TrackedSubspace(ORDER, N, smoothing=0.3)
    probe(space, H, 3, times=probes)
    state = space.state_dict()
    expected = copied(state)
    resumed = TrackedSubspace(ORDER, N, smoothing=0.9, seed=5)
    resumed.load_state_dict(through_a_file(state))
    assert_equal_states(resumed.state_dict(), expected)
    for each in (space, resumed):
        probe(each, H, 3, times=5)
    assert_equal_states(resumed.state_dict(), space.state_dict())
    # A state that is kept does not go on with the space.
    assert_equal_states(state, expected)


@pytest.mark.parametrize("probes", [1, 4, 8, 11])
def test_a_state_of_before_there_was_a_rotation_goes_on(probes: int):
    H = symmetric(SPECTRUM, seed=0)
    space, resumed = TrackedSubspace(ORDER, N, smoothing=0.3), TrackedSubspace(ORDER, N, seed=5)
    probe(space, H, 3, times=probes)
    state = copied(space.state_dict())
    turn = state.pop("rotation")
    del state["projected"]
    pairs = {name: turn.float() @ state[name] for name in ("vectors", "responses")}
    resumed.load_state_dict(state | pairs | {"mixture": state["mixture"] @ turn.T})
    for each in (space, resumed):
        probe(each, H, 3, times=7)
    torch.testing.assert_close(resumed.eigenvalues, space.eigenvalues, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, ORDER])
def test_products_with_the_pairs_are_those_with_their_vectors(count: int):
    space, rows, weights = TrackedSubspace(ORDER, N), normal(2, N, seed=8), normal(ORDER, seed=9)
    assert space.coordinates(rows).shape == (0, 2)
    assert torch.equal(space.combined(weights[:0]), torch.zeros(N))
    probe(space, symmetric(SPECTRUM, seed=0), count, times=11)
    X = space.eigenvectors.to(F64)
    torch.testing.assert_close(space.coordinates(rows), X @ rows.T, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(space.combined(weights).to(F64), weights @ X, rtol=0.0, atol=1e-5)


class Counted:
    """Columns of one process, which has all, and how often it sums."""

    def __init__(self) -> None:
        self.sums = 0

    def part(self, vector: Tensor) -> Tensor:
        """All columns."""
        return vector

    def total(self, sums: Tensor) -> Tensor:
        """A copy, as the sum of one share is."""
        self.sums += 1
        return 1.0 * sums


@pytest.mark.parametrize("count", [3, ORDER])
def test_a_look_sums_everything_at_once(count: int):
    H, rows, numbers = symmetric(SPECTRUM, seed=0), normal(2, N, seed=8), torch.tensor([1.0, 2.0, 3.0]).double()
    space, alone = TrackedSubspace(ORDER, N, columns=Counted()), TrackedSubspace(ORDER, N)
    assert [part.shape for part in space.look(rows, numbers)] == [(0,), (0, 2), (3,)]
    for _ in range(4):
        probe(space, H, count)
        probe(alone, H, count)
        residuals, products, same = space.look(rows, numbers)
        assert torch.equal(same, numbers)
        assert torch.equal(products, alone.coordinates(rows))
        assert torch.equal(residuals, alone.residuals)


def test_a_probe_of_all_directions_waits_for_three_sums():
    columns = Counted()
    space = TrackedSubspace(ORDER, N, columns=columns, smoothing=0.5)
    for step in range(30):
        before = columns.sums
        noise = 0.1 * normal(N, N, seed=step)
        probe(space, symmetric(SPECTRUM, seed=0) + noise + noise.T)
        space.look(torch.zeros(1, N), torch.zeros(1, dtype=F64))
        # The next basis, the responses, the look; from random directions the basis takes another round.
        assert columns.sums - before == 3 or step == 0


@pytest.mark.parametrize("smoothing", [1.0, 0.1])
def test_pairs_kept_in_bfloat16_take_half_and_are_right_in_the_mean(smoothing: float):
    size, spaces = 50 * N, {}
    vectors = torch.linalg.qr(normal(size, N, seed=0)).Q.T
    for dtype in (torch.float32, torch.bfloat16):
        # The one in bfloat16 comes last.
        spaces[dtype] = space = TrackedSubspace(ORDER, size, smoothing=smoothing, dtype=dtype)
        for _ in range(100):
            space.observe(space.directions(ORDER).to(F64) @ vectors.T * SPECTRUM @ vectors)
    for name in ("vectors", "responses"):
        whole, half = (one.state_dict()[name].untyped_storage().nbytes() for one in spaces.values())
        assert (whole, half) == (4 * ORDER * size, 2 * ORDER * size)
    # Rounded to the nearest, changes are lost below 2⁻⁹ over the smoothing: 0.1 ends 2 % off.
    torch.testing.assert_close(space.eigenvalues, TOP, rtol=1e-3, atol=0.0)
    assert float((space.residuals / TOP.abs()).max()) < 0.01
    cosines = (space.eigenvectors * spaces[torch.float32].eigenvectors).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(ORDER), rtol=0.0, atol=1e-3)


def test_noise_hides_the_rounding_of_bfloat16():
    size, spaces = 50 * N, [TrackedSubspace(ORDER, 50 * N, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    vectors = torch.linalg.qr(normal(size, N, seed=0)).Q.T
    for step in range(40):
        noise = 0.1 * normal(ORDER, N, N, seed=step)
        for space in spaces:
            along = space.directions(ORDER).to(F64) @ vectors.T
            space.observe(torch.einsum("mi,mij->mj", along, SPECTRUM.diag() + noise + noise.mT) @ vectors)
    exact, rounded = spaces
    assert float((exact.eigenvalues - TOP).abs().max()) > 0.01
    off = (exact.eigenvalues - rounded.eigenvalues).abs() / exact.uncertainties
    assert float(off.max()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_taken_over_into_bfloat16_from_either(dtype: torch.dtype):
    H = symmetric(SPECTRUM, seed=0)
    space, resumed = TrackedSubspace(ORDER, N, dtype=dtype), TrackedSubspace(ORDER, N, dtype=torch.bfloat16)
    probe(space, H, 3, times=5)
    resumed.load_state_dict(space.state_dict())
    assert resumed.state_dict()["vectors"].dtype == torch.bfloat16
    probe(space, H, 3, times=5)
    probe(resumed, H, 3, times=5)
    if dtype == torch.bfloat16:
        assert_equal_states(resumed.state_dict(), space.state_dict())
    torch.testing.assert_close(resumed.eigenvalues, space.eigenvalues, rtol=0.0, atol=0.01 * float(TOP[0]))


@pytest.mark.parametrize("shape", [(ORDER, N + 1), (ORDER - 1, N)])
def test_the_state_of_another_shape_is_refused(shape: tuple[int, int]):
    space = TrackedSubspace(ORDER, N)
    before = copied(space.state_dict())
    with pytest.raises(ValueError, match=rf"state has \(order, N\) = \({shape[0]}, {shape[1]}\), the space \(8, 40\)"):
        space.load_state_dict(TrackedSubspace(*shape).state_dict())
    assert_equal_states(space.state_dict(), before)


def test_the_state_of_another_version_is_refused_in_a_sentence():
    space = TrackedSubspace(3, 9)
    state = space.state_dict()
    del state["averaged"], state["mixture"]
    with pytest.raises(ValueError, match="the state lacks averaged, mixture: it is of another version"):
        space.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"order=0 must be in \[1, 40\]"),
        ({"order": 41}, r"order=41 must be in \[1, 40\]"),
        ({"smoothing": 0.0}, r"smoothing=0.0 must be in \(0, 1\]"),
        ({"smoothing": 1.5}, r"smoothing=1.5 must be in \(0, 1\]"),
        ({"smoothing": float("nan")}, r"smoothing=nan must be in \(0, 1\]"),
        ({"dtype": torch.float16}, r"dtype=torch.float16 must be torch.float32 or torch.bfloat16"),
    ],
)
def test_an_argument_out_of_range_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrackedSubspace(**({"order": ORDER, "size": N} | options))


def test_there_are_no_directions_to_give_to_nobody():
    with pytest.raises(ValueError, match="count=0 must be >= 1"):
        TrackedSubspace(ORDER, N).directions(0)


@pytest.mark.parametrize("count", [ORDER + 1, 3 * ORDER])
def test_more_replicas_than_directions_find_the_same_pairs(count: int):
    H = symmetric(SPECTRUM, seed=0)
    few, many = (TrackedSubspace(ORDER, N, smoothing=1.0) for _ in range(2))
    probe(few, H, times=12)
    probe(many, H, count, times=12)
    assert_independent(many.directions(ORDER))
    torch.testing.assert_close(many.eigenvalues, few.eigenvalues, rtol=1e-4, atol=0.0)


def test_more_replicas_than_directions_average_their_noise():
    def error(count: int) -> float:
        H, errors = symmetric(SPECTRUM, seed=0), []
        space = TrackedSubspace(ORDER, N, smoothing=1.0)
        for step in range(200):
            noise = 0.05 * normal(count, N, N, seed=step)
            space.observe(torch.einsum("mi,mij->mj", space.directions(count).to(F64), H + noise + noise.mT))
            errors.append((space.eigenvalues - TOP).abs()[:3].mean())
        return float(torch.stack(errors[20:]).mean())

    # Three times as many leave the root of a third.
    assert error(3 * ORDER) < 0.65 * error(ORDER)


BAD = {
    "wide": (torch.ones(2, N + 1), r"must be \(count, 40\), count >= 1, got \(2, 41\)"),
    "none": (torch.ones(0, N), r"got \(0, 40\)"),
    "flat": (torch.ones(N), r"got \(40,\)"),
    "nan": (torch.full((2, N), float("nan")), "must be finite"),
    "inf": (torch.eye(2, N) * float("inf"), "must be finite"),
    "beyond-fp32": (torch.full((2, N), 1e39, dtype=F64), "must be finite"),
}


@pytest.mark.parametrize(("responses", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("probes", [1, 10])
def test_a_response_that_cannot_be_used_leaves_the_space_as_it_was(responses: Tensor, message: str, probes: int):
    space = TrackedSubspace(ORDER, N)
    probe(space, symmetric(SPECTRUM, seed=0), 3, times=probes)
    before = copied(space.state_dict())
    with pytest.raises(FloatingPointError if "finite" in message else ValueError, match=message):
        space.observe(responses)
    assert_equal_states(space.state_dict(), before)


def test_the_seed_chooses_the_first_directions_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (TrackedSubspace(ORDER, N, seed=seed).directions(ORDER) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
