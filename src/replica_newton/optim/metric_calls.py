"""Steps of the rule "metric", in one process and over several."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.closures import given_gradients
from replica_newton.optim.evaluation import Evaluation, Report
from replica_newton.optim.metric_step import MetricStep, Moved, evaluated
from replica_newton.optim.probe_calls import ProbeCalls
from replica_newton.topology import TreeReduction
from replica_newton.topology.dealing import Dealing, deal
from replica_newton.topology.processes import LocalClosure
from replica_newton.topology.random_state import RandomState
from replica_newton.topology.simulated import Data, ReplicaClosure


class MetricCalls(ProbeCalls):
    """Evaluations by the replicas, and the step that needs no more than their mean gradient; see `Calls`."""

    max_norm: float | None = None
    metric_step: MetricStep | None = None

    def _take_metric_step(
        self, metric_step: MetricStep, closure: Callable[[], Tensor] | None, parameters: list[Tensor]
    ) -> None:
        """A step of the rule "metric", on the gradient of a closure or on what is in `.grad`."""
        if metric_step.probes is not None and not isinstance(closure, ReplicaClosure | LocalClosure | None):
            raise TypeError(
                "spread=PairedProbes() needs a closure of topology.closure(module, criterion, inputs, targets)"
            )
        if isinstance(self.topology, TreeReduction):
            self._take_metric_step_over(self.topology, metric_step, closure or given_gradients(parameters), parameters)
            return
        if metric_step.probes is not None:
            metric_step.probes.attach(self._held(metric_step.probes))
        gradients: list[Tensor | None]
        if isinstance(closure, ReplicaClosure):
            evaluation = self._evaluate(closure, parameters, self._displacements(parameters), "own")
            evaluation.report.settle()
            self._outcome = evaluation.report.losses.mean().to(parameters[0])
            self._probe(metric_step, closure, parameters, evaluation.gradients)
            pieces = torch.split(evaluation.mean, [p.numel() for p in parameters])
            gradients = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        else:
            if closure is not None:
                self._outcome = evaluated(closure)
            if any(p.grad is not None and p.grad.layout != torch.strided for p in parameters):
                raise ValueError("sparse gradients are not supported")
            signs = {id(p): -1 if group["maximize"] else 1 for group in self.param_groups for p in group["params"]}
            gradients = [None if p.grad is None else signs[id(p)] * p.grad for p in parameters]
        rates = self._rates()
        given = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        moved = [Moved(p, g, *rates[id(p)], self.state[p]) for p, g in given]
        metric_step.take(moved, max(rates.values())[0], self.topology.total)
        self.topology.prepared(stepped=True)
        self._settled()

    def _take_metric_step_over(
        self, topology: TreeReduction, metric_step: MetricStep, closure: Callable[[], Tensor], parameters: list[Tensor]
    ) -> None:
        """The same over processes, each of which moves the parameters that are dealt to it."""
        topology.lay_out(parameters)
        if not self._together:
            topology.spread_from_first(parameters, "first parameters")
            self._together = True
        nowhere = torch.empty(topology.replicas, 0, dtype=working_dtype(*parameters))
        random_state = RandomState(parameters)
        evaluation = self._evaluate(closure, parameters, nowhere, "own")
        dealing = self._dealing(topology, metric_step)
        if metric_step.probes is not None:
            metric_step.probes.attach(self._held(metric_step.probes, dealing))
            self._probe_over(metric_step, dealing, closure, parameters, random_state, evaluation.report.total)
        rates, moved = self._rates(), []
        for place, gradient in zip(dealing.mine, dealing.collect(evaluation.mean), strict=True):
            parameter = parameters[place]
            moved.append(Moved(parameter, gradient.view(parameter.shape), *rates[id(parameter)], self.state[parameter]))
        metric_step.take(moved, max(rates.values())[0], evaluation.report.total)
        self._outcome = evaluation.report.losses.mean().to(parameters[0])
        for place in set(range(len(parameters))).difference(dealing.mine):
            self.state.pop(parameters[place], None)  # of a checkpoint that other processes saved
        topology.prepared(stepped=True)
        self._settled()
        dealing.share(parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered, the module stands where it is best evaluated and saved; called by all processes.

            with optimizer.averaged():
                accuracy = evaluate(model)

        For the rule "metric" that is the average of the parameters over about the last ninth of all steps, in which the
        noise of single steps is gone: what otherwise a rate that falls to zero is for. For other rules it is where
        `synchronise` puts the module. Batch-norm statistics stay those of training. Save the model in here to use it,
        and by `save_checkpoint` outside to train on.

        Yields:
            Nothing.

        Raises:
            RuntimeError: by `step` and `checkpoint`, if they are called inside.
        """
        self.synchronise()
        if self.metric_step is None:
            yield
            return
        parameters = self._trained()
        before = [p.detach().clone() for p in parameters]
        self._averaging = True
        try:
            self._move_to_average(self.metric_step, parameters)
            yield
        finally:
            self._averaging = False
            with torch.no_grad():
                for parameter, values in zip(parameters, before, strict=True):
                    parameter.copy_(values)

    @torch.no_grad()
    def _move_to_average(self, metric_step: MetricStep, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            average = self.state.get(parameter, {}).get("average")
            if average is not None:
                parameter.copy_(average)
        if isinstance(self.topology, TreeReduction):
            self.topology.lay_out(parameters)
            self._dealing(self.topology, metric_step).share(parameters)

    def _dealing(self, topology: TreeReduction, metric_step: MetricStep) -> Dealing:
        """Who moves which of the parameters that are trained."""
        # Of all, frozen ones too, or the state of one would be in other hands when another thaws.
        everything = [p for group in self.param_groups for p in group["params"]]
        hands = deal([metric_step.metric.work(p.shape) for p in everything], topology.replicas)
        return topology.dealing([hand for hand, p in zip(hands, everything, strict=True) if p.requires_grad])

    def _rates(self) -> dict[int, tuple[float, float]]:
        """Rate and weight decay of the parameters that are trained, by their id."""
        return {
            id(p): (float(group["lr"]), group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        }

    def _evaluate(self, closure: Callable[[], Tensor], parameters: list[Tensor], W: Tensor, data: Data) -> Evaluation:
        """Losses and gradients of what is minimised: negated if a group maximizes."""
        self._evaluated = True
        losses, gradients = self.topology.gradients(closure, parameters, W, data)
        gradients = self._signed(gradients.to(W.dtype), parameters)
        mean = gradients.mean(dim=0)
        with_norm = self.max_norm is not None and data == "own"
        return Evaluation(gradients, mean, Report(self.topology.total, losses, gradients, mean, with_norm=with_norm))

    def _displacements(self, parameters: list[Tensor]) -> Tensor:
        """Rows d_m, `(M, N)`; zero as long as the replicas have not parted."""
        M = self.topology.replicas
        dtype = working_dtype(*parameters)
        pieces = []
        for parameter in parameters:
            rows = self.state.get(parameter, {}).get("displacements")
            if rows is None or len(rows) != M:
                rows = torch.zeros(M, *parameter.shape, dtype=dtype, device=parameter.device)
            pieces.append(rows.flatten(start_dim=1) if parameter.dim() else rows[:, None])
        return torch.cat(pieces, dim=1).to(dtype)
