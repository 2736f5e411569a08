"""Problems that nothing was chosen on: the default of ReplicaNewton beside tuned peers, at equal gradient evaluations.

Regression with targets in the hundreds, an LSTM, a residual network with batch normalisation, embeddings, tied weights,
inputs that nobody has scaled, wrong labels, batches of four: small data that come with scikit-learn or are made here.
Each peer has the best of at least five rates along a cosine, ours its default. Writes `other_problems.json` and a page.

    python benchmarks/other_problems.py                     # a quarter of an hour on one core; goes on where it was
    python benchmarks/other_problems.py --problem wine,sine # these alone, and prints
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, relu

from replica_newton.benchmark.optimizers import METHODS, OURS
from replica_newton.benchmark.run import whole_loss
from replica_newton.files import replace_file
from replica_newton.training.loop import batches
from replica_newton.training.rates import tune

FIRST_ORDER = ("momentum", "adam", "schedule-free", "prodigy")
PEERS = (*FIRST_ORDER, "muon", "soap")
SEEDS = (0, 1, 2)
EXTENSIONS = 6
Found = dict[str, dict[str, Any]]
"""What came out of one problem, by method."""
RESULTS, PAGE = Path("docs/results/other_problems.json"), Path("docs/other_problems.md")
RANDOM = Path("docs/results/random_problems.json")


@dataclass(frozen=True)
class Problem:
    """A network to train on data, in so many steps."""

    label: str
    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    steps: int


class ResNet(nn.Module):
    """Three residual blocks with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(*self._half(), nn.ReLU(), *self._half()) for _ in range(3))
        self.head = nn.Linear(16, 10)

    @staticmethod
    def _half() -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(images)
        for block in self.blocks:
            x = relu(x + block(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.lstm(images[:, 0])[0][:, -1])
        return logits


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(64, 16))
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels, rebuilt."""
        return torch.tanh(pixels @ self.weight) @ self.weight.T + self.bias


class Factors(nn.Module):
    """A table of two indices as products of embeddings, most of which a batch does not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(300, 8), nn.Embedding(200, 8)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, 0.0, 0.1)

    def forward(self, indices: Tensor) -> Tensor:
        """Entries."""
        products: Tensor = self.rows(indices[:, 0]) * self.columns(indices[:, 1])
        return products.sum(dim=1)


class Deep(nn.Module):
    """Eight residual blocks with layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(8)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits."""
        x = self.first(pixels)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.last(x)
        return logits


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, zero: bool = False) -> Callable[[], nn.Module]:
    """Maker of a multilayer perceptron; `zero` lets its last layer begin at zero."""

    def make() -> nn.Module:
        layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), activation())]
        if zero:
            for parameter in layers[-2].parameters():
                nn.init.zeros_(parameter)
        return nn.Sequential(*layers[:-1])

    return make


def problems() -> dict[str, Problem]:
    """All problems by name."""
    generator = torch.Generator().manual_seed(0)
    sick, images = load_diabetes(), load_digits()
    X, y = _scaled(sick.data), torch.tensor(sick.target, dtype=torch.float32)[:, None]
    pixels, digits = torch.tensor(images.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(images.target)
    wrong = torch.rand(len(digits), generator=generator) < 0.3
    noisy = torch.where(wrong, torch.randint(10, digits.shape, generator=generator), digits)
    rows, columns = torch.randn(300, 5, generator=generator), torch.randn(200, 5, generator=generator)
    i, j = torch.randint(300, (6000,), generator=generator), torch.randint(200, (6000,), generator=generator)
    x = torch.linspace(-1, 1, 512)[:, None]
    wave = torch.sin(12 * x) + 0.5 * torch.sin(31 * x)

    def classes(data: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        found = data()
        return _scaled(found["data"]), torch.tensor(found["target"])

    square = pixels.view(-1, 1, 8, 8)
    on_digits = mlp(64, 64, 10)
    return {
        "diabetes": Problem("diabetes, targets 25 … 346, MLP", mlp(10, 64, 64, 1), X, y, mse_loss, 32, 400),
        "linear": Problem("diabetes, linear regression", mlp(10, 1), X, y, mse_loss, 64, 400),
        "cancer": Problem(
            "breast cancer, logistic regression", mlp(30, 2), *classes(load_breast_cancer), cross_entropy, 64, 300
        ),
        "wine": Problem(
            "wine, batch 4", mlp(13, 32, 3, activation=nn.Tanh), *classes(load_wine), cross_entropy, 4, 600
        ),
        "resnet": Problem("digits, ResNet, batch norm", ResNet, square, digits, cross_entropy, 64, 200),
        "lstm": Problem("digits row by row, LSTM", Recurrent, square, digits, cross_entropy, 64, 300),
        "tied": Problem("digits, autoencoder, tied weights", Tied, pixels, pixels, mse_loss, 64, 400),
        "factors": Problem(
            "matrix factorisation, embeddings",
            Factors,
            torch.stack((i, j), dim=1),
            (rows[i] * columns[j]).sum(dim=1),
            mse_loss,
            128,
            600,
        ),
        "deep": Problem("digits, 8 residual blocks, layer norm", Deep, pixels, digits, cross_entropy, 64, 200),
        "zero": Problem(
            "digits, last layer zero at first", mlp(64, 64, 10, zero=True), pixels, digits, cross_entropy, 64, 200
        ),
        "unscaled": Problem("digits, inputs 0 … 800", on_digits, 800 * pixels, digits, cross_entropy, 64, 200),
        "noisy": Problem("digits, 30 % wrong labels, batch 16", mlp(64, 32, 10), pixels, noisy, cross_entropy, 16, 800),
        "sine": Problem("sum of sines, MLP", mlp(1, 64, 64, 1, activation=nn.Tanh), x, wave, mse_loss, 128, 800),
    }


def _scaled(data: Tensor) -> Tensor:
    values = torch.as_tensor(data, dtype=torch.float32)
    return (values - values.mean(dim=0)) / values.std(dim=0)


def final_loss(problem: Problem, method: str, rate: float, seed: int) -> float:
    """Loss over all data after the last step; infinite if it is not finite."""
    torch.manual_seed(seed)
    module = problem.model()
    stepper = METHODS[method].make(module, problem.criterion, rate)
    step, epoch = 0, 0
    while step < problem.steps:
        for rows in batches(len(problem.inputs), problem.batch_size, seed, epoch):
            if step == problem.steps:
                break
            stepper.scale_rate(0.5 * (1.0 + math.cos(math.pi * step / problem.steps)))
            try:
                loss, _ = stepper.step(problem.inputs[rows], problem.targets[rows])
            except (FloatingPointError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                return math.inf
            if not math.isfinite(loss):
                return math.inf
            step += 1
        epoch += 1
    with stepper.evaluating():
        final = whole_loss(module, problem.criterion, problem.inputs, problem.targets)
    return final if math.isfinite(final) else math.inf


def applies(problem: Problem, method: str) -> bool:
    """Whether there is anything for the method to do: Muon is for hidden matrices."""
    matrices = [one for one in problem.model().modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    return method != "muon" or len(matrices) > 1


def compare(problem: Problem) -> Found:
    """Best rate and losses by seed, None for infinite, of ours and of every peer that applies."""
    found: Found = {}
    for method in (one for one in (OURS, *PEERS) if applies(problem, one)):
        known: dict[float, float] = {}

        def loss(rate: float, method: str = method, known: dict[float, float] = known) -> float:
            if rate not in known:
                known[rate] = final_loss(problem, method, rate, 0)
            return known[rate]

        while True:
            rates, _ = tune(METHODS[method].rates, loss, EXTENSIONS if METHODS[method].tuned else 0)
            best = min(rates, key=loss)
            finals = [loss(best), *(final_loss(problem, method, best, seed) for seed in SEEDS[1:])]
            if all(map(math.isfinite, finals)) or not math.isfinite(loss(best)):
                break
            known[best] = math.inf  # a rate at which another seed diverges is nobody's best
        edge = METHODS[method].tuned and best in {rates[0], rates[-1]}
        losses = [value if math.isfinite(value) else None for value in finals]
        found[method] = {"rate": best, "at_the_edge": edge, "losses": losses}
    return found


class Row:
    """Of the table: median losses of all, and ours over the best of two kinds."""

    def __init__(self, label: str, found: Found) -> None:
        self.label, self._found = label, found
        self.losses = {
            method: median(math.inf if value is None else value for value in entry["losses"])
            for method, entry in found.items()
        }
        self.best_first, self.best = (
            min((peer for peer in peers if peer in found), key=self.losses.__getitem__)
            for peers in (FIRST_ORDER, PEERS)
        )
        self.over_first, self.over = (self.losses[OURS] / self.losses[peer] for peer in (self.best_first, self.best))

    def cell(self, peer: str) -> str:
        """Loss and rate of a peer."""
        if peer not in self._found:
            return "–"
        mark = " †" if self._found[peer]["at_the_edge"] else ""
        return f"{self.losses[peer]:.3g} ({self._found[peer]['rate']:g}{mark})"


def page(rows: list[Row], diverged: int) -> str:
    """The page in Markdown."""
    head = ["problem", "**ReplicaNewton**", *(METHODS[peer].label for peer in PEERS), "÷ first-order", "÷ all"]
    body = [
        [row.label, f"{row.losses[OURS]:.3g}", *map(row.cell, PEERS), f"{row.over_first:.3f}", f"{row.over:.3f}"]
        for row in rows
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    first, every = (
        [sum(ratio <= limit for ratio in ratios) for limit in (1.0, 1.05)]
        for ratios in ([row.over_first for row in rows], [row.over for row in rows])
    )
    worst = max(rows, key=lambda row: row.over)
    return f"""# Problems that nothing was chosen on

<!-- Written by benchmarks/other_problems.py. -->

The default of the optimizer was chosen on the networks of [step_rules.md](step_rules.md). These are others, of kinds
that are not there; nothing has been changed for them.

```sh
python benchmarks/other_problems.py
```

Final training loss over all data, median of {len(SEEDS)} seeds; in brackets a peer's best rate, of five or more that
reach past it (†: the last one tried), along a cosine (Schedule-Free without). Ours has its default, no rate and no
schedule. Equal steps, equal batches. The last columns are ours over the best first-order peer (SGD with momentum, Adam,
Schedule-Free AdamW, Prodigy), and over the best of all; below 1 ours is better. A peer's rate is chosen by seed 0 of
what is then reported, the next best one if another seed diverges there.

{chr(10).join(lines)}

Ours is at or below the best first-order peer on {first[0]} of {len(rows)} problems, within 5 % on {first[1]}; at or
below the best of all on {every[0]}, within 5 % on {every[1]}, at worst {worst.over:.2f} × ({worst.label}). Of its
{len(SEEDS) * len(rows)} runs {diverged or "none"} diverged.

Raw results: [other_problems.json](results/other_problems.json).
{random_section()}"""


def random_section() -> str:
    """What random_problems.py has found, if it has been run."""
    if not RANDOM.exists():
        return ""
    found = json.loads(RANDOM.read_text())

    def over_adam(one: dict[str, Any]) -> float:
        return one["ours"] / max(one["adam"], 1e-300)  # type: ignore[no-any-return]

    def lower_is_better(few: bool) -> str:
        kind = [one for one in found if (one["batch"] <= 2) == few]
        return f"{sum(one['lower'] < one['ours'] for one in kind)} of {len(kind)}"

    shares = [(limit, sum(over_adam(one) <= limit for one in found)) for limit in (0.5, 1.0, 1.05, 2.0, 10.0)]
    rows = [
        f"| {one['problem']} | {one['before']:.3g} | {one['ours']:.3g} | {one['lower']:.3g} | "
        f"{one['adam']:.3g} ({one['adam_rate']:g}) |"
        for one in sorted(found, key=over_adam, reverse=True)[:6]
    ]
    return f"""
## Random problems

```sh
python benchmarks/random_problems.py
```

{len(found)} problems whose network, scales, batch, loss and data are drawn at random, many of them ill-posed on purpose
(inputs in the thousands, six layers three times too large, batches of one), 300 steps each. Beside ours the best of
three rates of Adam, along a cosine: no tuned peer, but a sign of what is possible. Ours ends within

| × Adam's loss | {" | ".join(f"{limit:g}" for limit, _ in shares)} |
|---|{"---|" * len(shares)}
| on so many | {" | ".join(str(count) for _, count in shares)} |

and above the loss that it began with on {sum(one["ours"] > one["before"] for one in found)}. A relative rate of 0.3
ends lower than the default on {lower_is_better(True)} with batches of one or two, and on
{lower_is_better(False)} with larger ones; where the default is farthest behind, its steps are mostly too long:

| problem | before | ours | ours, `lr=0.3` | Adam (rate) |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Raw results: [random_problems.json](results/random_problems.json).
"""


def main() -> None:
    """Run what is missing, write, and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", help="these alone, separated by commas; writes nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what has been run before")
    options = parser.parse_args()
    all_problems, console = problems(), Console()
    names = options.problem.split(",") if options.problem else list(all_problems)
    unknown = [name for name in names if name not in all_problems]
    if unknown:
        parser.error(f"problem must be of {', '.join(all_problems)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh and not options.problem else {}
    results = {name: kept[name] for name in names if name in kept}
    for name in track([name for name in names if name not in results], "problems", console=console):
        results[name] = compare(all_problems[name])
        if not options.problem:
            replace_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    rows = [Row(all_problems[name].label, results[name]) for name in names]
    if not options.problem:
        diverged = sum(value is None for found in results.values() for value in found[OURS]["losses"])
        replace_file(PAGE, page(rows, diverged).encode())
    shown = Table("problem", "ours", "best first-order peer", "÷", "best of all peers", "÷")
    for row in rows:
        cells = [
            cell
            for peer, ratio in ((row.best_first, row.over_first), (row.best, row.over))
            for cell in (f"{METHODS[peer].label}, {row.cell(peer)}", f"{ratio:.3f}")
        ]
        shown.add_row(row.label, f"{row.losses[OURS]:.3g}", *cells)
    console.print(shown)


if __name__ == "__main__":
    main()
