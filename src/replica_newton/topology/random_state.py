"""Random numbers that are drawn again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """The state of torch's random generators, of the CPU and of the CUDA devices that tensors are on.

    Args:
        tensors: where a computation may draw.

    Attributes:
        states: of the CPU and of every device, uint8 on the CPU; may be written to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._devices = sorted({one.device for one in tensors if one.device.type == "cuda"}, key=str)
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the numbers are drawn that were drawn from here on; afterwards, those that would be drawn now."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self._devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
