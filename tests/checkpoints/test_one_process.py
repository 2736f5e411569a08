"""Checkpoints in one process: what comes back, what is kept, what damage is found, what is refused."""

import json
import logging
import re
from pathlib import Path

import cases
import cases_checkpoints
import pytest
import torch
from cases_checkpoints import run
from torch.nn.functional import cross_entropy

from replica_newton import ReplicaNewton, Simulated, load_checkpoint, save_checkpoint
from replica_newton.checkpoints import CheckpointError
from replica_newton.checkpoints.folder import MANIFEST, newest_checkpoint, write_checkpoint

ONE = Simulated(1)


def save(folder: Path, *steps: int, **options: int) -> None:
    for step in steps:
        write_checkpoint(folder, step, {"tensor": torch.full((1000,), float(step))}, ONE, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_at_the_same_bits(tmp_path: Path) -> None:
    whole = run(Simulated(4), None, range(10))
    run(Simulated(4), tmp_path, range(5), save_at=5)
    resumed = run(Simulated(4), tmp_path, range(5, 10), load=True, seed=3)
    assert resumed["losses"] == whole["losses"][5:]
    assert torch.equal(resumed["parameters"], whole["parameters"])


def test_momentum_and_random_numbers_come_back_for_other_optimizers_too(tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        module = cases.network(torch.float32)
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
        torch.manual_seed(5)
        for step in range(6):
            if stop and step == 3:
                save_checkpoint(tmp_path, step, module, optimizer)
                module = cases.network(torch.float32, seed=1)
                optimizer = torch.optim.SGD(module.parameters(), 0.01)
                assert load_checkpoint(tmp_path, module, optimizer).step == 3
            optimizer.zero_grad()
            inputs, targets = cases.batch(step, torch.float32)
            cross_entropy(module(torch.nn.functional.dropout(inputs, 0.5)), targets).backward()
            optimizer.step()
        ends.append(cases_checkpoints.vector(module))
    assert torch.equal(*ends)


def test_replicas_part_anew_with_another_number_of_them(tmp_path: Path) -> None:
    before = run(Simulated(4), tmp_path, range(5), save_at=5)
    after = run(Simulated(2), tmp_path, range(5, 8), load=True, seed=3)
    assert not after["found"].parted
    assert torch.equal(after["loaded"], before["saved"])
    module = cases.network(torch.float64)
    optimizer = ReplicaNewton(module.parameters(), 0.3, rule="paper", topology=Simulated(2))
    load_checkpoint(tmp_path, module, optimizer)
    state = next(iter(optimizer.state.values()))
    assert state == {"step": 5}
    assert optimizer.param_groups[0]["lr"] == cases_checkpoints.RATE


def test_an_empty_folder_changes_nothing(tmp_path: Path) -> None:
    module = cases.network(torch.float32)
    before = cases_checkpoints.vector(module)
    for folder in (tmp_path, tmp_path / "missing"):
        assert load_checkpoint(folder, module, torch.optim.SGD(module.parameters(), 0.1)) is None
    assert torch.equal(cases_checkpoints.vector(module), before)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003"]
    save(tmp_path, 40, keep=1)
    assert names(tmp_path) == ["checkpoint-000004"]
    # The newest is the one saved last, whatever its step: a run that went back is not thrown away.
    save(tmp_path, 5)
    assert newest_checkpoint(tmp_path, ONE).step == 5
    assert names(tmp_path / "checkpoint-000005") == ["manifest.json", "process-0.pt"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    path.write_text(json.dumps([1, 2]))


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("process-0.pt", cut, r"process-0.pt has \d+ bytes, not \d+"),
        ("process-0.pt", flip, "process-0.pt has another SHA-256"),
        ("process-0.pt", Path.unlink, "process-0.pt is missing"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, cut, "manifest.json or a file cannot be read"),
        (MANIFEST, emptied, "manifest.json or a file cannot be read"),
        (MANIFEST, other, "manifest.json or a file cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, file, damage, named):
    save(tmp_path, 10, 20)
    damage(tmp_path / "checkpoint-000002" / file)
    with caplog.at_level(logging.WARNING, logger="replica_newton"):
        found = newest_checkpoint(tmp_path, ONE)
    assert found.step == 10
    assert torch.equal(found.content(0)["tensor"], torch.full((1000,), 10.0))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'checkpoint-000002'} is not used: ")
    assert re.search(named, said)
    # And the run that goes on from there saves again, after the damaged one.
    save(tmp_path, 15)
    assert newest_checkpoint(tmp_path, ONE).step == 15


def test_all_damaged_is_an_error_but_never_completed_is_none(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoint-000001" / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path, ONE) is None
    save(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-000002"]
    cut(tmp_path / "checkpoint-000002" / "process-0.pt")
    with pytest.raises(CheckpointError, match="no whole checkpoint, checkpoint-000002 is damaged"):
        newest_checkpoint(tmp_path, ONE)


@pytest.mark.parametrize("failing", ["process-0.pt", MANIFEST])
def test_failure_while_saving_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch, failing):
    save(tmp_path, 10)
    genuine = Path.write_bytes

    def fail(self: Path, content: bytes) -> int:
        if failing in self.name:
            genuine(self, content[: len(content) // 2])
            raise OSError("disk full")
        return genuine(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-000001"]
    assert newest_checkpoint(tmp_path, ONE).step == 10


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    write_checkpoint(tmp_path, 1, {"module": Exploit()}, ONE)
    with pytest.raises(CheckpointError, match=r"process-0\.pt cannot be read"):
        newest_checkpoint(tmp_path, ONE).content(0)
    assert not (tmp_path / "executed").exists()


def test_what_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    module = cases.network(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(TypeError, match="extra must hold tensors, numbers"):
        save_checkpoint(tmp_path, 1, module, optimizer, extra=object())
    with pytest.raises(ValueError, match="step=-1 must be >= 0"):
        save_checkpoint(tmp_path, -1, module, optimizer)
    with pytest.raises(ValueError, match="keep=0 must be >= 1"):
        save_checkpoint(tmp_path, 1, module, optimizer, keep=0)
    assert names(tmp_path) == []
