"""The commands `estimate` and `spectrum`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from replica_newton.cli.root import app
from replica_newton.cli.shared import (
    Activation,
    DataOption,
    DatasetOption,
    DeviceOption,
    ThreadsOption,
    end_interrupted,
    make_folder,
)
from replica_newton.report.tables import load_table
from replica_newton.topology.estimate import estimate as estimate_load
from replica_newton.training.command import device_named
from replica_newton.training.datasets import load_dataset
from replica_newton.training.run import MAX_SEED, RunError


@app.command(
    epilog="Examples:\n\n[bold]replica-newton estimate --parameters 25000000 --replicas 8[/bold]\n\n"
    "[bold]replica-newton estimate --parameters 25000000 --replicas 8 --topology server --servers 2[/bold]"
)
def estimate(
    parameters: Annotated[int, typer.Option(min=1, help="Number of parameters N.")],
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas M.")] = 8,
    topology: Annotated[str, typer.Option(help="Topology: tree, server or simulated.")] = "tree",
    servers: Annotated[int, typer.Option(min=1, help="Number of servers, of a parameter server.")] = 1,
    rule: Annotated[str, typer.Option(help="Rule for the step: metric or paper.")] = "metric",
) -> None:
    """Say what a step sends and what a process keeps, before anything is run."""
    try:
        loads = estimate_load(topology, parameters, replicas, servers=servers, rule=rule)  # type: ignore[arg-type]
    except ValueError as error:
        raise RunError(str(error)) from error
    factors = "without factors and bases: 2 a² + 2 b² numbers for a matrix of a × b"
    Console().print(load_table(loads, parameters, replicas, factors if rule == "metric" else ""))


@app.command(
    epilog="Examples:\n\n[bold]replica-newton spectrum --checkpoint runs/digits-paper-M8-rate0.05-seed0[/bold]\n\n"
    "[bold]replica-newton spectrum --checkpoint network.pt --dataset mnist --data mnist.npz --top 20 --density[/bold]"
)
def spectrum(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder of a run, its checkpoint, or a state_dict of the reference convnet.")
    ],
    dataset: DatasetOption = "digits",
    data: DataOption = None,
    top: Annotated[int, typer.Option(help="Eigenpairs of largest magnitude to find.")] = 20,
    replicas: Annotated[int, typer.Option(help="Simulated replicas M: directions probed in a sweep.")] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact Hessian-vector products, twice the price, in place of paired probes.")
    ] = False,
    density: Annotated[
        bool, typer.Option("--density", help="The density of all eigenvalues too, by stochastic Lanczos quadrature.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Residual ‖Hx − θx‖/|θ| at which a pair has converged.")] = 0.01,
    sweeps: Annotated[int, typer.Option(help="At most so many sweeps.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples evaluated at a time; changes memory, not results.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random directions.")] = 0,
    activation: Annotated[
        Activation, typer.Option(help="Activation of a network in a state_dict; a run knows its own.")
    ] = Activation.relu,
    train_limit: Annotated[
        int | None, typer.Option(help="Use this many training samples only, the first ones.")
    ] = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of the files; by default spectrum, beside it.")] = None,
) -> None:
    """Find the top Hessian eigenpairs of a saved network over its training set, at one gradient a direction.

    Writes spectrum.json, spectrum.npz (eigenvalues, residuals, eigenvectors), spectrum.png and spectrum.svg.
    """
    # Imported here: it loads matplotlib.
    from replica_newton.spectrum.command import SpectrumOptions, compute_and_write
    from replica_newton.training.network import load_network

    options = SpectrumOptions(top, replicas, exact, density, tolerance, sweeps, batch_size, seed)
    torch.set_num_threads(threads)
    own_device = device_named(device)
    loaded = load_dataset(dataset, data, train_limit=train_limit).to(own_device)
    model = load_network(checkpoint, loaded, activation=activation.value).to(own_device)
    options.check_fits(model)
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "spectrum"
    make_folder(folder)
    try:
        compute_and_write(model, loaded, options, folder, Console(), checkpoint)
    except KeyboardInterrupt:
        end_interrupted("before the spectrum was found; nothing was written")
