"""The spectrum as table, figure and files."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from replica_newton.report.spectrum import spectrum_figure, sweeps_table, write_spectrum
from replica_newton.report.spectrum_progress import SpectrumProgress
from replica_newton.spectrum import Spectrum, Sweep
from replica_newton.spectrum.density import SpectralDensity

SWEEPS = (
    Sweep(1, 9, (4.0, -2.0), 0.5, 0),
    Sweep(2, 17, (5.25, -3.0, 1.0), 0.004, 3),
)


@pytest.fixture
def spectrum() -> Spectrum:
    values = torch.tensor([5.25, -3.0, 1.0], dtype=torch.float64)
    vectors = torch.eye(3, 4, dtype=torch.float64)
    return Spectrum(values, vectors, 0.004 * values.abs(), 0.01, SWEEPS, converged=True)


@pytest.fixture
def density() -> SpectralDensity:
    grid = torch.linspace(-4.0, 6.0, 50, dtype=torch.float64)
    height = torch.exp(-(grid**2))
    nodes = torch.tensor([[-3.0, 0.0, float("nan")]], dtype=torch.float64)
    return SpectralDensity(grid, height, 0.3, nodes, torch.tensor([[0.1, 0.9, 0.0]], dtype=torch.float64))


def test_the_table_has_a_row_a_sweep_and_fits_80_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(sweeps_table(SWEEPS, 3))
    lines = console.file.getvalue().splitlines()
    assert lines[2].split() == ["1", "9", "4", "4", "-2", "5.0e-01", "0/3"]
    assert lines[3].split() == ["2", "17", "5.25", "5.25", "-3", "1", "4.0e-03", "3/3"]
    assert "…" not in console.file.getvalue()


def values_drawn(figure: Figure, panel: int) -> list[list[float]]:
    return [list(line.get_ydata()) for line in figure.axes[panel].get_lines()]


def test_the_figure_shows_magnitudes_by_sign_residuals_and_the_way_there(spectrum: Spectrum):
    figure = spectrum_figure(spectrum, "a task")
    positive, negative, residuals = values_drawn(figure, 0)
    assert (positive, negative) == ([5.25, 1.0], [3.0])
    assert residuals == pytest.approx([0.021, 0.012, 0.004])
    assert values_drawn(figure, 1)[0] == [0.5, 0.004]
    assert len(figure.axes) == 2


def test_the_density_has_a_panel_of_its_own(spectrum: Spectrum, density: SpectralDensity):
    figure = spectrum_figure(spectrum, "a task", density)
    assert len(figure.axes) == 3
    assert values_drawn(figure, 2)[0] == pytest.approx(density.density.tolist())


@pytest.mark.parametrize("with_density", [False, True])
def test_the_files_hold_everything(tmp_path: Path, spectrum: Spectrum, density: SpectralDensity, with_density: bool):
    write_spectrum(tmp_path / "new", spectrum, {"dataset": "digits"}, "a task", density if with_density else None)
    names = {"spectrum.json", "spectrum.npz", "spectrum.png", "spectrum.svg"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    summary = json.loads((tmp_path / "new/spectrum.json").read_text())
    assert summary["dataset"] == "digits"
    assert summary["eigenvalues"] == [5.25, -3.0, 1.0]
    assert summary["sharpness"] == 5.25
    assert [entry["gradients"] for entry in summary["sweeps"]] == [9, 17]
    assert summary["density_sigma"] == (0.3 if with_density else None)
    with np.load(tmp_path / "new/spectrum.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["eigenvectors"], np.eye(3, 4))
        assert ("density_nodes" in arrays) == with_density
        assert {"eigenvalues", "residuals"} < set(arrays)


def test_a_pipe_gets_one_line_a_sweep():
    console = Console(file=io.StringIO(), width=40)
    with SpectrumProgress(console, "Hessian of [x]", 3, 50) as progress:
        for sweep in SWEEPS:
            progress.advance(1.0)
            progress.finish_sweep(sweep)
        progress.start_density(256)
    assert console.file.getvalue().splitlines() == [
        "Hessian of [x]",
        "sweep 1: 9 gradients, sharpness 4, residual 5.0e-01, 0/3 converged",
        "sweep 2: 17 gradients, sharpness 5.25, residual 4.0e-03, 3/3 converged",
        "density: 256 products",
    ]


def test_a_terminal_shows_the_table_grow_and_keeps_it(monkeypatch: pytest.MonkeyPatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, color_system=None, _environ={})
    clock = [100.0]
    monkeypatch.setattr("replica_newton.report.spectrum_progress.time.monotonic", lambda: clock[0])
    progress = SpectrumProgress(console, "Hessian", 3, 10)
    progress.finish_sweep(SWEEPS[0])
    progress.advance(0.5)
    progress.advance(0.5)

    def now() -> list[str]:
        shown = Console(file=io.StringIO(), width=80)
        shown.print(progress._render())
        return [line.rstrip() for line in shown.file.getvalue().splitlines()]

    clock[0] = 110.0
    assert now()[-1].startswith("sweep 2/10")
    assert now()[-1].split()[-4:] == ["10%", "≤", "1:30", "left"]
    progress.start_density(4)
    progress.advance(3.0)
    clock[0] = 140.0
    last = now()[-1]
    assert last.startswith("density 4/4")
    assert last.split()[-3:] == ["75%", "0:10", "left"]
    monkeypatch.undo()
    with progress:
        progress.finish_sweep(SWEEPS[1])
    assert console.file.getvalue().rstrip().endswith("pairs: converged")
