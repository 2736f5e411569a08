"""LocalClosure: one replica's shard of a global batch, of which the other processes have the others."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from replica_newton.topology.random_state import RandomState
from replica_newton.topology.simulated import BatchClosure, backward, snapshot, write_back

if TYPE_CHECKING:
    from replica_newton.topology.processes import Processes


class LocalClosure(BatchClosure):
    """One replica's shard of a global batch. Made by `Processes.closure`.

    Called without arguments it leaves the gradient of the shard in `.grad` and returns the loss.
    """

    _topology: "Processes"

    @property
    def samples(self) -> int:
        """Number of samples in the global batch."""
        return self.replicas * len(self._samples[-1])

    @property
    def module(self) -> nn.Module:
        """The model; of one in `DistributedDataParallel`, the one inside."""
        return self._module.module if isinstance(self._module, DistributedDataParallel) else self._module

    def losses(self) -> list[Callable[[], Tensor]]:
        """A function that returns the loss of this replica's shard, as the module stands."""

        def loss() -> Tensor:
            *inputs, targets = self._samples
            return self._criterion(self.module(*inputs), targets)

        return [loss]

    def __call__(self) -> Tensor:
        """Gradient of the shard; buffers (batch-norm statistics) become the mean over replicas."""
        self._topology.align(list(self._module.buffers()))
        self._before = snapshot(self._module)
        loss = self._backward(self._samples)
        for buffer in self._module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._topology.mean_of_workers(buffer.double().cpu()).to(buffer))
        return loss

    def common(self) -> Tensor:
        """Gradient on the shard of the first replica, with its random numbers; buffers stay."""
        samples = tuple(rows.clone() for rows in self._samples)
        random_state = RandomState([*self._module.parameters()])
        self._topology.common_to_workers((*samples, *random_state.states))
        before = snapshot(self._module)
        with random_state.again():
            loss = self._backward(samples)
        write_back(before)
        return loss

    def _backward(self, samples: tuple[Tensor, ...]) -> Tensor:
        # A DistributedDataParallel module would average the gradients, and with them the differences away.
        with self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext():
            loss = backward(self._module, self._criterion, samples)
        self.samples_evaluated += self.replicas * len(samples[-1])
        return loss
