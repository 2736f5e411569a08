"""What the command `spectrum` does, from its options to its files."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from replica_newton.report.spectrum import first_values, write_spectrum
from replica_newton.report.spectrum_progress import SpectrumProgress
from replica_newton.report.summary import dataset_name
from replica_newton.spectrum.density import MISSING_LIBRARY, PROBES, STEPS, SpectralDensity, spectral_density
from replica_newton.spectrum.eigenpairs import Spectrum, hessian_spectrum
from replica_newton.spectrum.products import ExactProducts, HessianProducts, ProbedProducts
from replica_newton.training.datasets import Dataset
from replica_newton.training.run import RunError


@dataclass(frozen=True)
class SpectrumOptions:
    """Options of the command.

    Attributes:
        top: eigenpairs wanted.
        replicas: M, directions in a sweep.
        exact: exact products in place of paired probes.
        density: whether to estimate the density of all eigenvalues.
        tolerance: relative residual at which a pair has converged.
        sweeps: at most so many.
        batch_size: samples evaluated at a time.
        seed: of the random directions.

    Raises:
        RunError: if an option is out of range, or a density is asked for without the library for it.
    """

    top: int = 20
    replicas: int = 8
    exact: bool = False
    density: bool = False
    tolerance: float = 1e-2
    sweeps: int = 50
    batch_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top", "replicas", "sweeps", "batch_size"):
            if getattr(self, name) < 1:
                raise RunError(f"{name.replace('_', ' ')} must be >= 1, got {getattr(self, name)}")
        if not 0.0 < self.tolerance < 1.0:
            raise RunError(f"tolerance must be in (0, 1), got {self.tolerance}")
        if self.density and importlib.util.find_spec("hessian_eigenthings") is None:
            raise RunError(MISSING_LIBRARY)

    def check_fits(self, model: nn.Module) -> None:
        """Check that the network has as many parameters as pairs and directions are asked for.

        Args:
            model: the network.

        Raises:
            RunError: if it has fewer.
        """
        size = sum(parameter.numel() for parameter in model.parameters())
        for name in ("top", "replicas"):
            if getattr(self, name) > size:
                raise RunError(f"{name} must be at most the {size} parameters, got {getattr(self, name)}")


def compute_and_write(
    model: nn.Module, dataset: Dataset, options: SpectrumOptions, folder: Path, console: Console, source: Path
) -> None:
    """Find the spectrum of a network over the training set, show it as it comes, and write it.

    Args:
        model: the network, in evaluation mode.
        dataset: its data.
        options: what to compute.
        folder: where the files go.
        console: where to show it.
        source: the checkpoint, to be named in the files.

    Raises:
        RunError: if a product with the Hessian is not finite.
    """
    task = f"{dataset_name(dataset.name)}, {len(dataset.train_labels):,} training samples"
    with SpectrumProgress(console, f"Hessian of {source} on {task}", options.top, options.sweeps) as progress:
        try:
            products = _products(model, dataset, options)
            spectrum = hessian_spectrum(
                products,
                options.top,
                replicas=options.replicas,
                tolerance=options.tolerance,
                sweeps=options.sweeps,
                seed=options.seed,
                advance=progress.advance,
                report=progress.finish_sweep,
            )
            density = _density(products, options, progress)
        except FloatingPointError as error:
            raise RunError(f"{source}: {error}") from error
    settings = _settings(dataset, options, source, products)
    write_spectrum(folder, spectrum, settings, f"{task}: {products.size:,} parameters", density)
    console.print(_outcome(spectrum, options), highlight=False, soft_wrap=True)
    console.print(f"Files: {folder / 'spectrum.json'}, .npz, .png, .svg", highlight=False, soft_wrap=True)


def _products(model: nn.Module, dataset: Dataset, options: SpectrumOptions) -> HessianProducts:
    kind = ExactProducts if options.exact else ProbedProducts
    return kind(
        model,
        nn.functional.cross_entropy,
        dataset.train_inputs,
        dataset.train_labels,
        batch_size=options.batch_size,
    )


def _density(products: HessianProducts, options: SpectrumOptions, progress: SpectrumProgress) -> SpectralDensity | None:
    if not options.density:
        return None
    progress.start_density(PROBES * min(STEPS, products.size))
    return spectral_density(products, seed=options.seed, advance=progress.advance)


def _settings(dataset: Dataset, options: SpectrumOptions, source: Path, products: HessianProducts) -> dict[str, Any]:
    return {
        "checkpoint": str(source),
        "dataset": dataset.name,
        "samples": len(dataset.train_labels),
        "parameters": products.size,
        "replicas": options.replicas,
        "products": "exact" if options.exact else "paired probes",
        "seed": options.seed,
        "gradients": products.gradients,
        "torch": torch.__version__,
    }


def _outcome(spectrum: Spectrum, options: SpectrumOptions) -> str:
    last = spectrum.sweeps[-1]
    if spectrum.converged:
        return f"{first_values(spectrum)}. Converged after {last.gradients} gradients over the data set."
    return (
        f"{first_values(spectrum)}. Not converged: {last.converged} of {options.top} pairs are within the tolerance "
        f"after {last.sweep} sweeps; go further by --sweeps."
    )
