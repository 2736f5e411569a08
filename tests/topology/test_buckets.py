from pathlib import Path
from typing import Any

import cases_buckets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes

from replica_newton.topology.buckets import Buckets

PARTITIONS = given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    holders=st.integers(1, 5),
    bucket_bytes=st.integers(1, 600),
)


@PARTITIONS
def test_buckets_are_a_partition(sizes: list[int], holders: int, bucket_bytes: int) -> None:
    buckets = Buckets(sizes, torch.float32, holders, bucket_bytes)
    vector = torch.arange(1.0, sum(sizes) + 1.0)
    parts = [buckets.part(vector, holder) for holder in range(holders)]
    assert {len(part) for part in parts} == {buckets.width}
    assert sum(bucket.size for bucket in buckets) == sum(sizes) == buckets.size
    assert len(list(buckets)) >= 1
    assert holders * buckets.width < sum(sizes) + holders * len(list(buckets)), "padding"
    # Every element is in one column of one holder.
    columns = torch.cat(parts)
    assert torch.equal(columns[columns > 0].sort().values, vector)
    pieces = vector.split(sizes)
    for bucket in buckets:
        assert torch.equal(torch.cat(pieces[bucket.parameters]), vector[bucket.elements])
        rows = buckets.split(bucket, pieces[bucket.parameters])
        for row, part in zip(rows, parts, strict=True):
            assert torch.equal(row, part[bucket.columns])


@PARTITIONS
def test_groups_are_small_and_have_every_bucket_in_its_place(sizes: list[int], holders: int, bucket_bytes: int) -> None:
    buckets = Buckets(sizes, torch.float32, holders, bucket_bytes)
    assert [bucket for group in buckets.groups for bucket in group] == list(buckets)
    for group, following in zip(buckets.groups, [*buckets.groups[1:], None], strict=True):
        elements = sum(bucket.size for bucket in group)
        assert len(group) == 1 or 4 * elements <= bucket_bytes
        assert following is None or 4 * (elements + following[0].size) > bucket_bytes


def test_what_a_network_of_a_million_parameters_need_not_send_early_is_one_message() -> None:
    assert [len(group) for group in Buckets([256 * 640, 640 * 640, 640 * 640], torch.float32, 2).groups] == [2]
    # Here each is as large as a bucket is meant to be.
    assert [len(group) for group in Buckets([7 << 20] * 4, torch.float32, 2).groups] == [1, 1, 1, 1]


def test_the_last_parameters_go_first_and_the_first_bucket_is_small() -> None:
    buckets = list(Buckets([1 << 22, 1 << 20, 1 << 18, 8], torch.float32, 2, 8 << 20))
    assert [bucket.parameters for bucket in buckets] == [slice(2, 4), slice(0, 2)]
    assert buckets[0].size == (1 << 18) + 8


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (3, {}),
        (2, {"micro_batches": 2}),
        (2, {"micro_batches": 2, "changed": True, "secant_data": "own", "max_norm": 0.3}),
    ],
    ids=["buckets", "accumulation", "gradients changed by the closure, clipped"],
)
def test_buckets_train_as_one_process_does(count: int, options: dict[str, Any], tmp_path: Path) -> None:
    results = run_processes(tmp_path, count, cases_buckets.train, **options)
    own = {name: value for name, value in options.items() if name not in {"micro_batches", "changed"}}
    alone = cases_buckets.train(None, count, **own)
    buckets, size = results[0]["buckets"], len(alone["parameters"])
    assert len(buckets) == 3
    width = sum(-(-one // count) for one in buckets)
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        torch.testing.assert_close(result["parameters"], alone["parameters"], rtol=1e-10, atol=1e-10)
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert result["calls"] == results[0]["calls"], "the order of collectives"
        started_in_backward = [inside for _, _, inside in result["calls"]]
        assert any(started_in_backward) != options.get("changed", False)
        # Every step sends each bucket once, filled up to a multiple of the number of processes.
        assert result["sent"]["gradients"] == result["sent"]["points"] == 8 * (count - 1) * width
        assert width * count < size + len(buckets) * count


def test_points_of_small_buckets_travel_together(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 3, cases_buckets.train, bucket_bytes=1 << 20, first_bytes=100)
    alone = cases_buckets.train(None, 3)
    for result in results:
        assert (len(result["buckets"]), result["groups"]) == (2, [2])
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        torch.testing.assert_close(result["parameters"], alone["parameters"], rtol=1e-10, atol=1e-10)
        assert result["sent"]["points"] == result["sent"]["gradients"]


def test_a_missing_gradient_is_zero_and_changes_no_order(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    many = run_processes(tmp_path / "many", 2, cases_buckets.train, dropped=True)
    one = run_processes(tmp_path / "one", 2, cases_buckets.train, dropped=True, bucket_bytes=1 << 20)
    assert [(step, width) for step, width, _ in many[0]["calls"]] == [
        (step, width) for step, width, _ in many[1]["calls"]
    ]
    assert many[0]["calls"] != many[1]["calls"], "without its gradient a bucket starts after the backward pass"
    assert [len(result["buckets"]) for result in (*many, *one)] == [3, 3, 1, 1]
    torch.testing.assert_close(many[0]["parameters"], one[0]["parameters"], rtol=1e-10, atol=1e-10)


def test_a_gradient_that_changes_after_it_is_sent_is_refused(tmp_path: Path) -> None:
    for said, sound in run_processes(tmp_path, 2, cases_buckets.gradient_changed):
        lines = said.splitlines()
        assert len(lines) == 2
        assert all("in `with topology.no_sync():`" in line for line in lines)
        assert sound
