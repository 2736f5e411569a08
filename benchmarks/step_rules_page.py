"""The page that `step_rules.py` writes."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from metric_cost import OPTIMIZERS, gradients_to_the_bar, over_bar
from step_rules_tried import Rule


@dataclass(frozen=True)
class Key:
    """What defines a run."""

    task: str
    rule: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Record:
    """What a run reached: final training loss, gradient evaluations, seconds, and the mean length of a step.

    `ratio` is that length in units of the distance to the minimum of the line, on fresh data, over the middle half.
    """

    key: Key
    loss: float
    evaluations: int
    seconds: float
    ratio: float | None


def best_rate(records: Mapping[Key, Record], task: str, rule: str) -> float | None:
    """The rate with the least loss at the first seed; a run that diverged counts as infinite."""
    of_rule = [r for key, r in records.items() if (key.task, key.rule, key.seed) == (task, rule, 0)]
    return min(of_rule, key=lambda r: r.loss if math.isfinite(r.loss) else math.inf).key.rate if of_rule else None


def write_page(
    records: Mapping[Key, Record],
    tasks: list[str],
    rules: Mapping[str, Rule],
    costs: Sequence[Mapping[str, Any]],
    benchmark: Mapping[str, Any],
) -> str:
    """The page, from all runs, from what `metric_cost.py` has found on some machines, and what the benchmark has."""
    seen = [task for task in tasks if any(key.task == task for key in records)]
    lines = [_INTRODUCTION, "| rule | " + " | ".join(seen) + " |", "|---" * (len(seen) + 1) + "|"]
    lines += [
        f"| {rule.description} | " + " | ".join(_cell(records, task, name) for task in seen) + " |"
        for name, rule in rules.items()
    ]
    lines += [_RATIOS, "| rule, rate | " + " | ".join(seen) + " |", "|---" * (len(seen) + 1) + "|"]
    for name in rules:
        for rate in sorted({key.rate for key in records if key.rule == name}):
            lines.append(
                f"| {name}, {rate:g} | " + " | ".join(_pair(records, task, name, rate) for task in seen) + " |"
            )
    lines += [_missed(costs, benchmark), _COSTS]
    for found in costs:
        lines += [f"On {found.get('card', 'one processor')}, torch {found['torch']}:", ""]
        lines += ["| network | N | " + " | ".join((*_TIMES, *_BARS)) + " |", "|---" * (2 + len(_TIMES + _BARS)) + "|"]
        lines += [*(_cost(name, one) for name, one in found["milliseconds"].items()), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _missed(costs: Sequence[Mapping[str, Any]], benchmark: Mapping[str, Any]) -> str:
    """What was aimed at and is not there, by how much, and what was tried."""
    identity = benchmark["identity"]
    behind = {task: ratio for task, ratio in identity["ratios"].items() if ratio > 1.0}
    steps = [one for found in costs for one in found["milliseconds"].values()]
    overs, batches = ([of(one) for one in steps] for of in (over_bar, gradients_to_the_bar))
    first, *further = benchmark["doublings"]
    text = _MISSED.format(
        over=f"{min(overs):.1f} to {max(overs):.1f}",
        batches=f"{min(batches):.1f} to {max(batches):.1f}",
        within=identity["within"],
        tasks=len(identity["ratios"]),
        behind=", ".join(
            f"{task} ({ratio:.2f} times its loss)" for task, ratio in sorted(behind.items(), key=lambda one: -one[1])
        ),
        first=f"{first['worst']:.3g}",
        further=f"{max(one['worst'] for one in further):.2f}",
    )
    wrap = partial(textwrap.fill, width=120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line) if line.startswith("- ") else line for line in text.replace("\n  ", " ").split("\n"))


def _cost(name: str, milliseconds: Mapping[str, float]) -> str:
    times = " | ".join(f"{milliseconds[key]:.3g}" for key in _TIMES)
    bars = f"{over_bar(milliseconds):.1f} | {gradients_to_the_bar(milliseconds):.1f}"
    return f"| {name} | {milliseconds['parameters']:,} | {times} | {bars} |"


def _cell(records: Mapping[Key, Record], task: str, rule: str) -> str:
    rate = best_rate(records, task, rule)
    losses = [r.loss for key, r in records.items() if (key.task, key.rule, key.rate) == (task, rule, rate)]
    if not losses:
        return "–"
    if not all(map(math.isfinite, losses)):
        return f"diverged ({rate:g})"
    return f"{statistics.median(losses):.4g} ({rate:g}; {min(losses):.3g}–{max(losses):.3g}, {len(losses)})"


def _pair(records: Mapping[Key, Record], task: str, rule: str, rate: float) -> str:
    record = records.get(Key(task, rule, rate, 0))
    if record is None:
        return "–"
    return f"{record.loss:.4g}" + (f" · {record.ratio:.2f}" if record.ratio is not None else "")


_INTRODUCTION = """\
# Rules for the step, side by side

Written by `python benchmarks/step_rules.py --data FOLDER`, from `results/step_rules.jsonl`. Small tasks and short
budgets in gradient evaluations, probes included: three epochs of 20,480 images (eight at batch 2048, 40 of digits; five
of 60,000 where it is "long"). Rates of peers fall along half a cosine of the budget, but where their line says else.

The rule is `ReplicaNewton(parameters)`: momentum and second moments in the eigenbasis of a Kronecker metric, as SOAP
has them, but that second moments are fitted to a basis that has just turned (`optim/metric.py`); times a rate that
nobody gives (`optim/rate.py`):

- it is half of the root mean square of the first weights at step 20, rises to that and falls like 1/√t from it;
- it is raised where slopes along past steps show that steps are far too short, and cut while the loss that a closure
  tells stands at twice what it was (never on these tasks; see [other_problems.md](other_problems.md));
- the network is evaluated at the average over the last ninth of all steps (`ReplicaNewton.averaged`).

So it knows neither the budget nor the batch, which a schedule and a tuned rate do. It needs no gradient beside the
step's own. **Its replicas bring no curvature to it**, unless `spread=PairedProbes()` asks for some.

What the table can and cannot say:

- **Part of the gain over SOAP at its best rate is that of the fall and of the average**: given both ("rising and
  falling as ours does, averaged") and a tuned rate, SOAP ends 5 to 100 % above ours on five tasks, and at 0.28 of ours
  on digits, where ours would want twice its share. Adam, given the same, stays far behind.
- Fitting second moments to a basis that has turned ("second moments as they are" is without) takes a loss to between
  half and all of what it is without, at one seed (on three of the nine tasks of [benchmarks.md](benchmarks.md) it ends
  2 to 10 % above it); so does momentum 0.9 in place of SOAP's 0.95, but on digits, where it is three times worse.
- **Curvature from replicas wins nothing in this step.** `PairedProbes` follows the top eigenpairs (θ, x) of the Hessian
  in the metric's own coordinates, by second gradients of 8 shards of the batch along 8 directions, and takes `1/|θ|`
  for the rate along x, up to four times the metric's. On four tasks it ends within 5 % of where the same with random
  directions does (the placebo), on digits far above it; and above the step without, but on CIFAR-10 at batch 256, where
  it is level. What both pay is the price, a gradient a look (exact products: two). So the more often it looks, the
  worse; a space of 16, one for every tensor, or rates that are only lowered, change nothing.
- **In the identity metric it sees something, and does not earn its price**: it ends below the placebo on every task (on
  digits at two thirds of it), and at 1.00 to 1.39 of the step without, 1.01 to 1.49 with a space for every tensor. In
  the diagonal metric it loses, too. One seed each, not on the long task. On a stiff least-squares problem with all of
  its data it takes both metrics to less than half of the loss (`tests/optim/test_paired_probes.py`), so it is there as
  an option.
- 1/2, 20, 1/√t, the ninth and momentum 0.9 were chosen on these tasks with the first seed, which the medians of three
  hold, and on the autoencoder and the transformer of the benchmark in short runs: the transformer wanted a share of no
  more than a half, digits and batch 2048 want more. Larger tasks, other networks and longer runs are no part of it.
  "Half or twice the share" says how much it matters.
- "Steered" and "signal" are one setting each, at one seed, along a cosine: that one is not ahead shows that it is no
  easy gain, not that the idea is wrong. "Signal" takes twice the share, so it is to be compared with "share" at 0.6.
- Runs of SOAP, Adam, momentum and Prodigy are those of peers alone, and were not repeated when ours changed.
- SOAP is another implementation (pytorch-optimizer's). Its best rates for digits are the largest of those tried with a
  cosine, and so are Adam's and momentum's. The growth of the distance has not been switched off by itself.
- A network that begins a thousand times too small takes hundreds of steps to grow.

Replicas live in one process or in several; over processes, the metric works on whole matrices, so parameters are dealt
out, as Distributed Shampoo deals them ([topologies.md](topologies.md#the-rule-metric-whole-parameters)).

Final training loss over the whole training set: median over seeds (rate; least–largest, number of seeds).
"""

_RATIOS = """
## Rates, and how long a step is

First seed: final training loss · mean length of a step in units of the distance to the line's minimum, measured on
batches that the step has not seen, over the middle half of the run: 1 is the minimum, at 2 the loss is what it was. The
best rates of all methods stand between about 0.5 and a few units. Where slopes are mostly noise the quotient means
little.
"""

_MISSED = """
## Aims that are missed

Of what the optimizer was to be, on the nine tasks of [benchmarks.md](benchmarks.md) and elsewhere:

- **Its own arithmetic within 1.1 times Adam's and a tenth of a gradient.** It takes {over} times that at the batches
  below, and would be there with {batches} times the batch. Tried: bases by orthogonal iteration, every fifth step; list
  operations; on a GPU Cholesky factors for QR decompositions.
- **Without a metric, untuned, below SGD with momentum at its best rate on every task.** It is on {within} of {tasks};
  not on {behind}. Tried: curvature along 8 directions of the replicas (`PairedProbes`), also with a
  space for every tensor, which ends above the step without; more of it loses more.
- **Every doubling of the replicas helps, or is neutral.** From 2 to 8 replicas the rule "saddle-free" is neutral (at
  most {further} times the loss); from 1 to 2, on common data, it is not, up to {first} times: secants that are no noise
  cost a second gradient of every sample, so half of the steps. Tried: own data, where the secants are mostly noise and
  the paper's step ends at SGD's loss or above; random directions (the placebo), which do as well; the paper's step.
- **Never far behind any peer.** On the nine tasks it is not. Of thirteen other problems it is on two behind the best
  first-order method by more than 5 %, and on five behind the best of all ([other_problems.md](other_problems.md)).
  Cutting the rate where the loss rises came out of these. For those left nothing was tried yet: the default is one and
  the same in all that is reported here.
- **Curvature from replicas in the default step.** It brings nothing there, as the table above says."""

_TIMES = ("gradient", *OPTIMIZERS)
_BARS = ("over the bar", "bar met at so many times the batch")
_COSTS = """
## What a step costs

Milliseconds for the gradient and for every optimizer's own arithmetic, taken in turn (`python
benchmarks/metric_cost.py`, `--device cuda`; [metric_cost.json](results/metric_cost.json),
[metric_cost_cuda.json](results/metric_cost_cuda.json)). Gradients are of 256 images, or of 1,024 characters (12,288 on
the GPU), in fp32; SOAP has bases anew every 5 steps and rotates sides up to 1,024, as ours does. The bar is 1.1 times
Adam and a tenth of a gradient.

**The bar is missed throughout, at these batches.** Along a side of length a the metric multiplies N elements four times
by an a × a matrix in every step, `8 N a` operations, while a gradient takes `6 N` a sample: next to it the metric is
cheap only where a batch has many more samples, or characters, than matrices have rows. The last column says by how many
times a batch, and with it the gradient, must be longer for the bar to hold. The rest is overhead of many small
operations, which list operations (`torch._foreach_*`) have brought down, and on a GPU bases by Cholesky factors of all
matrices of a size at once: a QR decomposition there waits for itself, and took half of the step. What remains above the
metric "diagonal" are the rotations; above Adam's arithmetic, "diagonal" has an average, two slopes and two norms more,
and a floor and a cut of every tensor by itself.
"""
