"""Paired probes of an optimizer's replicas, in one process and over several."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.monitor.probes import differences, exact_products, require_precision, step_scales
from replica_newton.optim.calls import Calls, flat
from replica_newton.optim.metric_step import MetricStep
from replica_newton.optim.paired_probes import Held, PairedProbes
from replica_newton.topology.buckets import local
from replica_newton.topology.dealing import Dealing
from replica_newton.topology.local_closure import LocalClosure
from replica_newton.topology.random_state import RandomState
from replica_newton.topology.simulated import ReplicaClosure


@dataclass(frozen=True)
class _Block:
    """Parameters that share a space, of which this process holds whole ones: its columns."""

    sizes: list[int]
    held: list[bool]
    total: Callable[[Tensor], Tensor]

    @property
    def size(self) -> int:
        """Elements."""
        return sum(self.sizes)

    @property
    def here(self) -> int:
        """Elements that are held here."""
        return sum(compress(self.sizes, self.held))

    def part(self, vector: Tensor) -> Tensor:
        """See `Columns`."""
        return torch.cat([vector[:0], *compress(torch.split(vector, self.sizes), self.held)])


class ProbeCalls(Calls):
    """What replicas do when a probe is due; see `Calls`."""

    def _probe(
        self, metric_step: MetricStep, closure: ReplicaClosure, parameters: list[Tensor], gradients: Tensor
    ) -> None:
        """Have the replicas answer one direction each: all on the batch whose gradients are given."""
        metric, probes = metric_step.metric, self._due_probes(metric_step, parameters, self.topology.total)
        if probes is None:
            return
        states = [self.state[p] for p in parameters]
        directions = probes.directions(metric, states, closure.replicas)
        if probes.relative_step is None:
            _, products = exact_products(closure.module, parameters, closure.losses(), directions)
            products = self._signed(products, parameters)
            closure.samples_evaluated += 2 * closure.samples
        else:
            shared = flat(parameters).to(gradients.dtype)
            scales = step_scales(shared, directions, probes.relative_step)
            displaced = closure.gradients_again(parameters, shared + directions / scales)
            products = (self._signed(displaced.to(gradients.dtype), parameters) - gradients) * scales
        probes.observe(metric, states, products)

    def _probe_over(
        self,
        metric_step: MetricStep,
        dealing: Dealing,
        closure: Callable[[], Tensor],
        parameters: list[Tensor],
        random_state: RandomState,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """The same over processes, each with the gradient of its own shard in `.grad`."""
        mine = [parameters[place] for place in dealing.mine]
        metric, probes = metric_step.metric, self._due_probes(metric_step, mine, total)
        if probes is None or not isinstance(closure, LocalClosure):
            return
        states = [self.state[p] for p in mine]
        direction = dealing.row(probes.directions(metric, states, closure.replicas))[None]
        what = closure.module, parameters, closure.losses(), direction
        with random_state.again():
            if probes.relative_step is None:
                _, products = exact_products(*what)
                closure.samples_evaluated += 2 * closure.samples
            else:
                given = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
                _, products = differences(*what, relative_step=probes.relative_step, gradients=given[None])
                closure.samples_evaluated += closure.samples
        probes.observe(metric, states, dealing.elements(self._signed_row(products[0], parameters)))

    def _due_probes(
        self, metric_step: MetricStep, held: list[Tensor], total: Callable[[Tensor], Tensor]
    ) -> PairedProbes | None:
        """The probes, if one is to be taken now; the same in all processes, whose gradients are finite."""
        probes = metric_step.probes
        if probes is None or not probes.is_due(metric_step.rate.steps):
            return None
        begun = sum("second_moment" not in self.state[p] for p in held)
        return probes if not float(total(torch.tensor([begun], dtype=torch.float64))) else None

    def _held(self, probes: PairedProbes, dealing: Dealing | None = None) -> Held:
        """How much of what is trained is here, by block."""
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        trained = [p for group in groups for p in group]
        require_precision(trained)
        match probes.blocks:
            case "all":
                ends = [len(trained)]
            case "group":
                ends = list(accumulate(len(group) for group in groups))
            case "tensor":
                ends = list(range(1, len(trained) + 1))
        mine = set(range(len(trained)) if dealing is None else dealing.mine)
        ranges = [range(first, end) for first, end in pairwise([0, *ends])]
        blocks = [
            _Block([trained[place].numel() for place in one], [place in mine for place in one], self.topology.total)
            for one in ranges
        ]
        blocks = [block for block in blocks if block.size]
        return Held(
            [block.size for block in blocks],
            [block.here for block in blocks],
            [None if dealing is None else block for block in blocks],
            self.topology.replicas,
            self.topology.total,
            trained[0].device,
        )

    def _signed(
        self, gradients: Tensor, parameters: list[Tensor], part: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Gradients of what is minimised, in place."""
        signs = [-1.0 if group["maximize"] else 1.0 for group in self.param_groups]
        return gradients if set(signs) == {1.0} else gradients.mul_(self._by_element(parameters, signs, part))

    def _signed_row(self, row: Tensor, parameters: list[Tensor]) -> Tensor:
        """A whole row of what is minimised, also where columns are held."""
        signs = [
            -1.0 if group["maximize"] else 1.0
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        pieces = torch.split(row, [p.numel() for p in parameters])
        return torch.cat([piece * sign for piece, sign in zip(pieces, signs, strict=True)])

    def _by_element(
        self, parameters: list[Tensor], by_group: list[float], part: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor | float:
        """A number of every group: one for all, or for every column or element held here, where groups differ."""
        if len(set(by_group)) == 1:
            return by_group[0]
        elements = torch.cat(
            [
                torch.full((local(p).numel(),), value, dtype=working_dtype(*parameters), device=p.device)
                for value, group in zip(by_group, self.param_groups, strict=True)
                for p in group["params"]
                if p.requires_grad
            ]
        )
        return (part or self.topology.part)(elements)
