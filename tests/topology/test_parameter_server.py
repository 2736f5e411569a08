from pathlib import Path

import cases
import pytest
import torch
from processes import run_processes

from replica_newton import ParameterServer, RandomDirections


@pytest.mark.parametrize(
    ("workers", "servers", "options"),
    [
        (2, 1, {"dtype": torch.float64, "plain_closure": True, "decay": 0.99}),
        (4, 2, {"dtype": torch.float64, "secant_data": "common", "normalised": True}),
        (2, 3, {"dtype": torch.float32, "rule": "saddle-free", "damping": 1.0}),
        (2, 2, {"dtype": torch.float64, "spread": RandomDirections(), "secant_data": "common"}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_workers_and_servers_train_as_one_process_does(
    workers: int, servers: int, options: dict, tmp_path: Path
) -> None:
    results = run_processes(tmp_path, servers + workers, cases.train, steps=200, servers=servers, **options)
    options.pop("plain_closure", None)
    alone = cases.train(None, workers, steps=200, **options)
    cases.check_parity(results[servers:], alone, 1e-10 if options["dtype"] == torch.float64 else 1e-5)
    for server in results[:servers]:
        assert server["lr"] == pytest.approx(0.05 * options.get("decay", 1.0) ** 200), "they follow the workers' rate"


@pytest.mark.parametrize("servers", [2])
def test_workers_keep_nothing_and_send_their_gradient(servers: int, tmp_path: Path) -> None:
    workers, size = 3, sum(parameter.numel() for parameter in cases.network(torch.float64).parameters())
    results = run_processes(tmp_path, servers + workers, cases.train, steps=30, mark=10, servers=servers)
    width = -(-size // servers)
    for rank, result in enumerate(results):
        sent = result["sent_a_step"]
        if rank < servers:
            assert sent["points"] == workers * width
            assert sent["gradients"] == 0
            assert result["state"] == (workers + 1) * width
        else:
            assert sent["gradients"] == servers * width
            assert sent["points"] == 0
            assert result["state"] == 0


def test_a_loss_that_is_not_finite_is_no_end_for_the_servers(tmp_path: Path) -> None:
    results = run_processes(tmp_path, 3, cases.not_finite, servers=1)
    assert results[0] is None
    assert {result["said"] for result in results[1:]} == {"loss or gradient of replica 1 is not finite (loss nan)"}
    assert torch.equal(results[1]["parameters"], results[2]["parameters"])


def test_there_must_be_a_worker(tmp_path: Path) -> None:
    said = "servers=2 must be in 1 … 1, to leave a worker of 2 processes"
    assert run_processes(tmp_path, 2, cases.too_many_servers) == [said] * 2


def test_without_a_process_group_there_are_no_servers() -> None:
    with pytest.raises(RuntimeError, match="must be initialised first"):
        ParameterServer()
