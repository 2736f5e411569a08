"""The rule "metric" over several processes, each of which moves the parameters that are dealt to it."""

from pathlib import Path

import cases
import cases_buckets
import pytest
import torch
from processes import run_processes

from replica_newton import PairedProbes
from replica_newton.optim.metric import Metric
from replica_newton.topology.buckets import Buckets
from replica_newton.topology.dealing import deal, is_even

METRIC = {"rule": "metric", "lr": 1.0}
SIZES = [p.numel() for p in cases.network(torch.float64).parameters()]


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"metric": "kronecker", "plain_closure": True}),
        (4, {"metric": "kronecker", "normalised": True}),
        (3, {"metric": "diagonal", "weight_decay": 0.1}),
    ],
    ids=["2-kronecker", "4-normalised", "3-diagonal"],
)
def test_processes_train_as_one_process_does(count: int, options: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, count, cases.train, steps=60, **METRIC, **options)
    options.pop("plain_closure", None)
    # Replicas one by one: bases of directions without a gradient are made of rounding, which must be the same.
    alone = cases.train(None, count, steps=60, batched=False, **METRIC, **options)
    cases.check_parity(results, alone, 1e-10)
    assert sum(result["state"] for result in results) == alone["state"], "each keeps what it moves, and no more"


@pytest.mark.parametrize(
    ("workers", "servers", "options"),
    [
        (2, 1, {"metric": "kronecker", "plain_closure": True}),
        (3, 2, {"metric": "kronecker", "normalised": True, "decay": 0.99}),
        # More servers than parameters, of which some hold nothing.
        (2, 8, {"metric": "identity", "weight_decay": 0.1, "maximize": True}),
    ],
    ids=["2-1-kronecker", "3-2-normalised", "2-8-identity"],
)
def test_servers_train_as_one_process_does(workers: int, servers: int, options: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, servers + workers, cases.train, steps=60, servers=servers, **METRIC, **options)
    options.pop("plain_closure", None)
    alone = cases.train(None, workers, steps=60, batched=False, **METRIC, **options)
    cases.check_parity(results[servers:], alone, 1e-10)
    assert sum(server["state"] for server in results[:servers]) == alone["state"]
    assert not any(result["state"] for result in results[servers:]), "workers keep nothing"


@pytest.mark.parametrize(
    "options", [{"metric": "kronecker"}, {"metric": "diagonal", "weight_decay": 0.1}], ids=["kronecker", "diagonal"]
)
def test_sharded_replicas_train_as_whole_ones_do(options: dict, tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases_buckets.train_sharded, steps=40, **METRIC, **options)
    alone = cases_buckets.train_sharded(None, 4, steps=40, **METRIC, **options)
    assert len({result["local"] for result in results}) == 2, "shards are not of the same size"
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        for name in ("parameters", "averaged"):
            torch.testing.assert_close(result[name], alone[name], rtol=1e-10, atol=1e-10)
            assert torch.equal(result[name], results[0][name])


def test_sharded_parameters_in_bf16_are_kept_in_fp32(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 4, cases_buckets.train_sharded, dtype=torch.bfloat16, steps=30, **METRIC)
    alone = cases_buckets.train_sharded(None, 4, dtype=torch.float32, steps=30, **METRIC)
    for result in results:
        assert result["state"] <= {torch.float32}
        assert result["parameters"].dtype == torch.bfloat16
        assert result["losses"] == pytest.approx(alone["losses"], rel=3e-2)
        assert torch.equal(result["parameters"], results[0]["parameters"])


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_sends_what_an_all_reduce_does(count: int, tmp_path: Path) -> None:
    results = run_processes(tmp_path, count, cases.train, steps=5, mark=3, plain_closure=True, **METRIC)
    sent = [result["sent_a_step"] for result in results]
    N = sum(SIZES)
    assert sum(one["parameters"] for one in sent) == (count - 1) * N
    assert all(one["inner products"] < 12 * count for one in sent)
    if count == 2:
        assert sum(one["gradients"] for one in sent) == (count - 1) * N
    else:
        # The first layer has more than twice a fourth of all elements: gradients go by columns, their mean goes on.
        width = -(-N // count)
        assert all(one["gradients"] == (count - 1) * width and one["mean gradient"] <= width for one in sent)


@pytest.mark.parametrize(
    ("sizes", "dealt", "hands", "even"),
    [([3, 3], [0, 1], 2, True), ([5, 1], [0, 1], 2, True), ([5, 1, 1], [0, 1, 2], 3, False), ([], [], 4, True)],
)
def test_gradients_go_to_hands_at_once_if_none_has_much_more(
    sizes: list[int], dealt: list[int], hands: int, even: bool
) -> None:
    assert is_even(sizes, dealt, hands) is even


@pytest.mark.parametrize(
    ("count", "probes", "options", "tolerance"),
    [
        # Directions without a gradient are known to rounding alone, that of fp32 where they are probed.
        (2, {"blocks": "all"}, {"metric": "kronecker"}, 1e-2),
        (3, {"blocks": "tensor"}, {"metric": "diagonal"}, 1e-5),
        # More processes than parameters: some hold nothing.
        (8, {"relative_step": None}, {"metric": "identity", "maximize": True}, 1e-5),
    ],
    ids=["2-kronecker", "3-tensors", "8-exact"],
)
def test_probes_of_processes_are_those_of_one_process(
    count: int, probes: dict, options: dict, tolerance: float, tmp_path: Path
) -> None:
    def spread() -> PairedProbes:
        return PairedProbes(every=3, rank=3, **probes)

    options = METRIC | options | {"steps": 45}
    results = run_processes(tmp_path, count, cases.train, spread=spread(), **options)
    alone = cases.train(None, count, batched=False, spread=spread(), **options)
    cases.check_parity(results, alone, tolerance)
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert len(result["probes"]) == len(alone["probes"])
        for ours, theirs in zip(result["probes"], alone["probes"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_probe_leaves_no_trace_in_any_process(tmp_path: Path) -> None:
    buffers = []
    for name, spread in (("none", None), ("probes", PairedProbes(every=2))):
        (tmp_path / name).mkdir()
        options = METRIC | {"lr": 0.0, "steps": 27, "normalised": True, "spread": spread}
        buffers.append([result["buffers"] for result in run_processes(tmp_path / name, 2, cases.train, **options)])
    for without, with_probes in zip(*buffers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(without, with_probes, strict=True))


def test_a_probe_sends_one_all_reduce_more(tmp_path: Path) -> None:
    count, spread = 4, PairedProbes(every=10, rank=4)
    results = run_processes(tmp_path, count, cases.train, steps=31, mark=21, spread=spread, **METRIC)
    more = [10 * result["sent_a_step"][phase] for result in results for phase in ("directions", "responses")]
    assert sum(more) == pytest.approx(2 * (count - 1) * sum(SIZES))


def test_a_loss_that_is_not_finite_moves_nothing_in_any_process(tmp_path: Path) -> None:
    options = METRIC | {"steps": 8, "poisoned": (3,), "nonfinite": "skip"}
    results = run_processes(tmp_path, 2, cases.train, **options)
    cases.check_parity(results, cases.train(None, 2, batched=False, **options), 1e-10)
    assert [result["skipped"] for result in results] == [1, 1]


@pytest.mark.parametrize("hands", [1, 2, 3, 8])
def test_dealt_work_is_shared_and_stays_where_it_is_when_more_comes(hands: int) -> None:
    metric = Metric()
    work = [metric.work(shape) for shape in ((256, 784), (256,), (256, 256), (256,), (64, 256), (64,), (), (10, 64))]
    dealt = deal(work, hands)
    loads = [sum(one for one, hand in zip(work, dealt, strict=True) if hand == of) for of in range(hands)]
    assert max(loads) <= sum(work) / hands + max(work)
    assert deal(work[:4], hands) == dealt[:4]


@pytest.mark.parametrize("holders", [1, 2, 3, 8])
def test_pieces_hold_every_element_once_where_its_column_is(holders: int) -> None:
    sizes = (5, 0, 17, 1, 64, 3)
    buckets = Buckets(sizes, torch.float32, holders, bucket_bytes=80)
    vector = torch.arange(1.0, sum(sizes) + 1)
    parts = [buckets.part(vector, holder) for holder in range(holders)]
    parameters = [torch.zeros(size) for size in sizes]
    for piece in buckets.pieces():
        assert not parameters[piece.parameter][piece.elements].any()
        parameters[piece.parameter][piece.elements] = parts[piece.holder][piece.columns]
    assert torch.equal(torch.cat(parameters), vector)
