"""The same training in one process, over a tree and with parameter servers; the same numbers in all three.

Without arguments it runs all three on this machine and prints a table of what they reached and what they sent:

    python examples/distributed.py

Under torchrun it is an ordinary script, here with four replicas, or with one server and four workers:

    torchrun --standalone --nproc-per-node 4 examples/distributed.py --topology tree
    torchrun --standalone --nproc-per-node 5 examples/distributed.py --topology server
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from replica_newton import ParameterServer, ReplicaNewton, Simulated, TreeReduction
from replica_newton.training.datasets import load_dataset
from replica_newton.training.models import reference_convnet

REPLICAS = 4
BATCH = 64
RATE = 0.1


def main() -> None:
    """One of the processes of torchrun, or the comparison of all topologies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=("tree", "server"), default="tree", help="under torchrun")
    parser.add_argument("--epochs", type=int, default=3, help="passes over scikit-learn's digits (default 3)")
    parser.add_argument("--out", type=Path, help="file for the result of the first replica")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        result = train(TreeReduction() if options.topology == "tree" else ParameterServer(servers=1), options.epochs)
        if result and options.out:
            options.out.write_text(json.dumps(result))
        dist.destroy_process_group()
    else:
        compare(options.epochs)


def train(topology: Simulated | TreeReduction | ParameterServer, epochs: int) -> dict[str, Any] | None:
    """Train the reference convnet: the same lines for every topology, up to which part of a batch is whose."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    model = reference_convnet(data.input_shape, data.classes, activation="tanh")
    optimizer = ReplicaNewton(model.parameters(), rule="paper", lr=RATE, topology=topology)
    if isinstance(topology, ParameterServer) and topology.is_server:
        optimizer.serve()
        return None

    M, mine = (1, 0) if isinstance(topology, Simulated) else (topology.replicas, topology.replica or 0)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(epoch))
        total, batches = 0.0, order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        for batch in batches:
            shard = batch.chunk(M)[mine]
            closure = topology.closure(model, cross_entropy, data.train_inputs[shard], data.train_labels[shard])
            total += float(optimizer.step(closure))
        losses.append(total / len(batches))
    optimizer.synchronise()  # from where each replica stands to the parameters that all share
    optimizer.close()
    steps = epochs * len(batches)
    sent = {} if isinstance(topology, Simulated) else topology.elements_sent
    is_first = isinstance(topology, Simulated) or topology.replica == 0
    result = {
        "losses": losses,
        "sent": (sent["gradients"] + sent["points"]) / steps if sent else 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return result if is_first else None


def compare(epochs: int) -> None:
    """Run all topologies and show them side by side."""
    console = Console()
    results = {"Simulated(4)": train(Simulated(REPLICAS), epochs)}
    with tempfile.TemporaryDirectory() as folder:
        for name, topology, processes in (("TreeReduction()", "tree", 4), ("ParameterServer(1)", "server", 5)):
            console.print(f"{name}: {processes} processes …")
            out = Path(folder) / f"{topology}.json"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            script = [__file__, "--topology", topology, "--epochs", str(epochs), "--out", str(out)]
            subprocess.run([*launcher, *script], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # noqa: S603
            results[name] = json.loads(out.read_text())

    alone = results["Simulated(4)"]
    if alone is None:
        raise RuntimeError("one process has all replicas")
    all_reduce = 2 * alone["parameters"] * (REPLICAS - 1) / REPLICAS
    table = Table(title=f"digits, {alone['parameters']:,} parameters, {REPLICAS} replicas, {epochs} epochs")
    table.add_column("topology", no_wrap=True)
    for column in ("training loss", "difference", "sent by a replica a step", "÷ all-reduce"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if result is not None:
            difference = max(abs(a / b - 1.0) for a, b in zip(result["losses"], alone["losses"], strict=True))
            sent = [f"{result['sent']:,.0f}", f"{result['sent'] / all_reduce:.3f}"] if result["sent"] else []
            table.add_row(name, f"{result['losses'][-1]:.6f}", f"{difference:.1e}", *sent)
    console.print(table)


if __name__ == "__main__":
    main()
