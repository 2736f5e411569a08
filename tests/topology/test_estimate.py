from pathlib import Path

import cases
import pytest
import torch
from processes import run_processes

from replica_newton import cli
from replica_newton.topology.estimate import all_reduce, estimate

SIZE = sum(parameter.numel() for parameter in cases.network(torch.float64).parameters())


@pytest.mark.parametrize(("replicas", "servers"), [(3, 0), (2, 2)])
def test_estimates_are_what_is_counted(replicas: int, servers: int, tmp_path: Path) -> None:
    results = run_processes(tmp_path, replicas + servers, cases.train, steps=30, mark=10, servers=servers)
    kind = "server" if servers else "tree"
    loads = {load.role: load for load in estimate(kind, SIZE, replicas, servers=max(servers, 1), element=8)}
    assert sum(load.processes for load in loads.values()) == replicas + servers
    for rank, result in enumerate(results):
        load, sent = loads["server" if rank < servers else "worker" if servers else "process"], result["sent_a_step"]
        assert load.sent == 8 * (sent["gradients"] + sent["points"])
        assert load.sums_sent == 8 * sent["inner products"]
        assert load.state == 8 * result["state"]


@pytest.mark.parametrize(("replicas", "servers"), [(3, 0), (2, 2)])
def test_estimates_of_the_metric_are_what_is_counted(replicas: int, servers: int, tmp_path: Path) -> None:
    options = {"steps": 30, "mark": 10, "servers": servers, "rule": "metric", "metric": "diagonal"}
    results = run_processes(tmp_path, replicas + servers, cases.train, **options)
    kind = "server" if servers else "tree"
    loads = {
        load.role: load for load in estimate(kind, SIZE, replicas, servers=max(servers, 1), element=8, rule="metric")
    }
    sent, state = dict.fromkeys(loads, 0.0), dict.fromkeys(loads, 0)
    for rank, result in enumerate(results):
        role, by_phase = "server" if rank < servers else "worker" if servers else "process", result["sent_a_step"]
        assert loads[role].sums_sent == 8 * by_phase["inner products"]
        sent[role] += 8 * (by_phase["gradients"] + by_phase["parameters"])
        state[role] += 8 * result["state"]
    for role, load in loads.items():
        assert sent[role] == pytest.approx(load.sent * load.processes, abs=load.processes)
        # The scale of every parameter, and what is rounded up.
        assert state[role] == pytest.approx(load.state * load.processes, abs=8 * 6 + 5 * 8 * load.processes)


@pytest.mark.parametrize(("rule", "floats"), [("paper", 2), ("metric", 5)])
def test_a_tree_sends_what_an_all_reduce_does_at_any_size(rule: str, floats: int) -> None:
    for parameters in (16_358, 1_000_000, 25_000_000):
        for replicas in (2, 4, 8, 64):
            (load,) = estimate("tree", parameters, replicas, rule=rule)
            assert load.sent / all_reduce(parameters, replicas) <= 1.05
            assert replicas > 8 or (load.sent + load.sums_sent) / all_reduce(parameters, replicas) <= 1.05
            # Displacements and shared parameters: at most two floats a parameter.
            assert load.state <= floats * 4 * parameters * 1.01


def test_one_process_sends_nothing() -> None:
    (load,) = estimate("simulated", 1000, 8)
    assert (load.sent, load.sums_sent, load.state) == (0, 0, 32_000)
    (alone,) = estimate("tree", 1000, 1)
    assert (alone.sent, alone.sums_sent) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ring", 10, 2), "the topology must be one of simulated, tree, server, got 'ring'"),
        (("tree", 0, 2), "parameters must be >= 1, got 0"),
        (("tree", 10, 0), "replicas must be >= 1, got 0"),
    ],
)
def test_bad_input_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(*arguments)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="the rule must be one of metric, paper, got 'newton'"):
        estimate("tree", 10, 2, rule="newton")


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--parameters", "25000000", "--replicas", "8", "--topology", "server", "--servers", "2"]
    options += ["--rule", "paper"]
    monkeypatch.setattr("sys.argv", ["replica-newton", "estimate", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "8 × worker" in said
    assert "100.0 MB" in said
    assert "175.0 MB a step" in said


def test_the_command_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["replica-newton", "estimate", "--parameters", "9", "--topology", "ring"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == "replica-newton: the topology must be one of simulated, tree, server, got 'ring'\n"
