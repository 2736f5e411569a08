"""Steps of the rule "metric", in one process and over several."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from replica_newton.curvature.gram import working_dtype
from replica_newton.optim.calls import Call, flat
from replica_newton.optim.closures import given_gradients
from replica_newton.optim.evaluation import NO_MEMORY, Evaluation, Report, StepMemory
from replica_newton.optim.metric import Metric
from replica_newton.optim.metric_step import MetricStep, Moved, evaluated
from replica_newton.optim.probe_calls import ProbeCalls
from replica_newton.topology.buckets import local
from replica_newton.topology.dealing import Dealing, deal
from replica_newton.topology.local_closure import LocalClosure
from replica_newton.topology.processes import Processes
from replica_newton.topology.random_state import RandomState
from replica_newton.topology.simulated import Data, ReplicaClosure


class MetricCalls(ProbeCalls):
    """Evaluations by the replicas, and the step that needs no more than their mean gradient; see `Calls`."""

    max_norm: float | None = None
    metric_step: MetricStep | None = None
    _at_average = False
    _dealing_of_wholes: Dealing | None = None

    def _take_metric_step(
        self, metric_step: MetricStep, closure: Callable[[], Tensor] | None, parameters: list[Tensor]
    ) -> None:
        """A step of the rule "metric", on the gradient of a closure or on what is in `.grad`."""
        if metric_step.probes is not None and not isinstance(closure, ReplicaClosure | LocalClosure | None):
            raise TypeError(
                "spread=PairedProbes() needs a closure of topology.closure(module, criterion, inputs, targets)"
            )
        if isinstance(self.topology, Processes):
            self._take_metric_step_over(self.topology, metric_step, closure, parameters)
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
            rising = {id(p) for group in self.param_groups if group["maximize"] for p in group["params"]}
            gradients = [-p.grad if id(p) in rising and p.grad is not None else p.grad for p in parameters]
        rates = self._rates()
        given = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        moved = [Moved(p, g, *rates[id(p)], self.state[p]) for p, g in given]
        take = metric_step.prepare(moved, max(rates.values())[0], self.topology.total)
        self._tell_loss(metric_step)
        take()
        self.topology.prepared(stepped=True)
        self._settled()

    def _take_metric_step_over(
        self,
        topology: Processes,
        metric_step: MetricStep,
        closure: Callable[[], Tensor] | None,
        parameters: list[Tensor],
    ) -> None:
        """The same over processes, some or all of which move the parameters that are dealt to them."""
        self._at_average = False
        topology.lay_out(parameters)
        if not self._together:
            topology.spread_from_first([local(parameter) for parameter in parameters], "first parameters")
            self._together = True
        dealing = self._dealing(topology, metric_step, parameters)
        mine = self._wholes(topology, dealing, parameters)
        nowhere = local(parameters[0]).new_empty(topology.replicas, 0, dtype=working_dtype(*parameters))
        random_state = None if metric_step.probes is None else RandomState(parameters)
        evaluate = closure or given_gradients(parameters)
        evaluation = self._evaluate(evaluate, parameters, nowhere, "own", dealing=dealing)
        if metric_step.probes is not None and random_state is not None:
            metric_step.probes.attach(self._held(metric_step.probes, dealing))
            self._probe_over(metric_step, dealing, evaluate, parameters, random_state, evaluation.report.total)
        rates, moved = self._rates(), []
        for place, whole, gradient in zip(dealing.mine, mine, dealing.collect(evaluation.mean), strict=True):
            parameter = parameters[place]
            moved.append(Moved(whole, gradient.view(whole.shape), *rates[id(parameter)], self.state[parameter]))
        take = metric_step.prepare(moved, max(rates.values())[0], evaluation.report.total)
        self._outcome = evaluation.report.losses.mean().to(local(parameters[0]))
        for place in set(range(len(parameters))).difference(dealing.mine):
            self.state.pop(parameters[place], None)  # of a checkpoint that other processes saved

        def finish() -> None:
            if closure is not None:
                self._tell_loss(metric_step)
            take()
            self._settled()

        # States change in place and cannot go back: no hand moves anything before all are prepared to.
        topology.prepared(self._undo([]), stepped=True)
        self._unfinished = finish
        topology.all_prepared()
        self._finish()
        dealing.share(mine, parameters)

    def _tell_loss(self, metric_step: MetricStep) -> None:
        """Have the rate know the loss of this step, if there is one, and only one way is down."""
        ascending = {bool(group["maximize"]) for group in self.param_groups}
        if isinstance(self._outcome, Tensor) and len(ascending) == 1:
            metric_step.rate.observe_loss(float(self._outcome) * (-1.0 if True in ascending else 1.0))

    def in_hand(self) -> list[tuple[int, Tensor]]:
        """What this process moves with the rule "metric"; called by all processes.

        Returns:
            Numbers of the parameters, over all groups, and the parameters.
        """
        numbered = enumerate(p for group in self.param_groups for p in group["params"])
        trained = [(i, p) for i, p in numbered if p.requires_grad]
        if not isinstance(self.topology, Processes) or self.metric_step is None:
            return trained
        parameters = [p for _, p in trained]
        self.topology.lay_out(parameters)
        return [trained[place] for place in self._dealing(self.topology, self.metric_step, parameters).mine]

    def _wholes(self, topology: Processes, dealing: Dealing, parameters: list[Tensor]) -> list[Tensor]:
        """The parameters in this process's hands, whole: those of the module, or what is kept beside its shards."""
        if topology.shards == 1:
            return [parameters[place] for place in dealing.mine]
        if self._dealing_of_wholes is not dealing:
            dtype = working_dtype(*parameters)
            collected = dealing.collect(topology.part(flat(parameters).to(dtype)))
            for place, values in zip(dealing.mine, collected, strict=True):
                parameter, values = parameters[place], values.view(parameters[place].shape)
                kept = self.state[parameter].get("whole")
                # What is kept may be more precise than the module is.
                if kept is None or not torch.equal(kept.to(parameter.dtype), values.to(parameter.dtype)):
                    self.state[parameter]["whole"] = values
            self._dealing_of_wholes = dealing
        return [self.state[parameters[place]]["whole"] for place in dealing.mine]

    def _meet(self) -> None:
        """After a change of members: workers at the servers' parameters; see `Calls`."""
        metric_step, topology = self.metric_step, self.topology
        if metric_step is None or not isinstance(topology, Processes):
            super()._meet()
            return
        if topology.is_worker:
            self._unfinished = None
        self._finish()  # all servers were prepared to
        rate, loss = metric_step.rate, float(self._outcome) if isinstance(self._outcome, Tensor) else math.nan
        own = [topology.steps, *self._counts(), self._at_average, loss, *rate.numbers()]
        said = topology.said_by_server(torch.tensor(own, dtype=torch.float64)).tolist()
        topology.steps, self.fallbacks, self.skipped, self._skipped_in_a_row = map(int, said[:4])
        self._at_average = bool(said[4])
        rate.load_numbers(said[6:])
        # Whoever was interrupted before it knew the loss of a step that has ended.
        parameters = self._trained()
        if self._outcome is None:
            self._outcome = torch.tensor(said[5], dtype=parameters[0].dtype)
        self._together = rate.steps > 0
        if self._together:
            topology.lay_out(parameters)
            dealing = self._dealing(topology, metric_step, parameters)
            dealing.share(self._wholes(topology, dealing, parameters), parameters)
            if self._at_average:
                # Who is inside `averaged` stands there; all must take part.
                with nullcontext() if self._averaging else _put_back(parameters):
                    self._average()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered, the module stands where it is best evaluated and saved; called by all processes.

            with optimizer.averaged():
                accuracy = evaluate(model)

        For the rule "metric" that is the average of the parameters over about the last ninth of all steps, in which the
        noise of single steps is gone: what otherwise a rate that falls to zero is for. For other rules it is where
        `synchronise` puts the module. Batch-norm statistics stay those of training, which lag behind weights that move
        fast: `torch.optim.swa_utils.update_bn(loader, model)` in here makes new ones. Save the model in here to use it,
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
        with _put_back(self._trained()):
            self._averaging = True
            try:
                with torch.no_grad():
                    self._call(Call.AVERAGE)
                yield
            finally:
                self._averaging = False

    def _average(self) -> None:
        """Put the module at the average. Servers, whose module is what training goes on from, only send it."""
        if self.metric_step is None:
            return
        self._at_average = True
        parameters = self._trained()
        if isinstance(self.topology, Processes):
            self.topology.lay_out(parameters)
            dealing = self._dealing(self.topology, self.metric_step, parameters)
            mine = self._wholes(self.topology, dealing, parameters)
            averages = [
                self.state.get(parameters[place], {}).get("average", whole)
                for place, whole in zip(dealing.mine, mine, strict=True)
            ]
            dealing.share(averages, parameters)
            return
        for parameter in parameters:
            average = self.state.get(parameter, {}).get("average")
            if average is not None:
                parameter.copy_(average)

    def _dealing(self, topology: Processes, metric_step: MetricStep, parameters: list[Tensor]) -> Dealing:
        """Who moves which of the parameters that are trained."""
        # Of all, frozen ones too, or the state of one would be in other hands when another thaws.
        everything = [p for group in self.param_groups for p in group["params"]]
        dealt = _dealt(metric_step.metric, tuple(p.shape for p in everything), len(topology.hands))
        hands = [hand for hand, p in zip(dealt, everything, strict=True) if p.requires_grad]
        return topology.dealing(parameters, hands)

    def _rates(self) -> dict[int, tuple[float, float]]:
        """Rate and weight decay of the parameters that are trained, by their id."""
        return {
            id(p): (float(group["lr"]), group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        }

    def _evaluate(
        self,
        closure: Callable[[], Tensor],
        parameters: list[Tensor],
        W: Tensor,
        data: Data,
        memory: StepMemory = NO_MEMORY,
        dealing: Dealing | None = None,
    ) -> Evaluation:
        """Losses and gradients of what is minimised: negated if a group maximizes."""
        self._evaluated = True
        if isinstance(self.topology, Processes):
            losses, gradients = self.topology.gradients(closure, parameters, W, data, dealing, memory.gradients)
        else:
            losses, gradients = self.topology.gradients(closure, parameters, W, data)
        part = dealing.part if dealing is not None and dealing.direct else None
        gradients = self._signed(gradients.to(W.dtype), parameters, part)
        mean = torch.mean(gradients, dim=0, out=memory.mean)
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


@lru_cache(maxsize=8)
def _dealt(metric: Metric, shapes: tuple[torch.Size, ...], hands: int) -> tuple[int, ...]:
    """Hands of parameters of these shapes."""
    return tuple(deal([metric.work(shape) for shape in shapes], hands))


@contextmanager
def _put_back(parameters: list[Tensor]) -> Iterator[None]:
    """Put the module back to where it is now."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
