"""Under torchrun: killed, out of memory and told to leave, a run ends at the bits of one to which nothing happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cases_checkpoints
import elastic_worker
import pytest
import torch
from processes import run_processes

STEPS, PROCESSES = 10, 3


def torchrun(folder: Path, *arguments: object, restarts: int = 0) -> "subprocess.Popen[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    return subprocess.Popen(
        [*launcher, f"--max-restarts={restarts}", elastic_worker.__file__, folder, f"--steps={STEPS}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(900)
def test_killed_out_of_memory_and_terminated_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run_processes(
        tmp_path / "whole", PROCESSES, cases_checkpoints.part_of_a_run, folder=None, steps=range(STEPS)
    )
    waiting = [tmp_path / f"waiting-{rank}" for rank in range(PROCESSES)]
    failing = torchrun(tmp_path, "--killed-at=3", "--out-of-memory-at=5", "--wait-at=6", restarts=2)
    try:
        until = time.monotonic() + 400.0
        while not all(marker.exists() for marker in waiting):
            assert failing.poll() is None, failing.communicate()[0]
            assert time.monotonic() < until, "not all processes came to the step at which they wait"
            time.sleep(0.05)
        failing.send_signal(signal.SIGTERM)
        said = failing.communicate(timeout=120)[0]
    finally:
        failing.kill()
    assert failing.returncode != 0
    assert "(MemoryError: no room for the batch)" in said, "the others do not know why"
    assert not list(tmp_path.glob("end-*"))

    with torchrun(tmp_path) as rest:
        said = rest.communicate(timeout=400)[0]
    assert rest.returncode == 0, said
    for rank in range(PROCESSES):
        # Killed in step 3: on from the checkpoint after 2; out of memory in 5: after 4; told to leave in 6: after 7.
        assert (tmp_path / f"starts-{rank}").read_text().split() == ["0", "2", "4", "7"]
        assert torch.equal(torch.load(tmp_path / f"end-{rank}.pt"), whole[rank]["parameters"])
