"""A model that is evaluated elsewhere and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Restore parameters, buffers and random state afterwards, bit for bit.

    Yields:
        The values of the parameters, which are not to be changed.
    """
    buffers = [(module, *item) for module in model.modules() for item in module.named_buffers(recurse=False)]
    # What `expand` made cannot be written to, neither by the model.
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if not _is_expanded(buffer))]
    with torch.no_grad():
        saved = {tensor: tensor.clone() for tensor in tensors}
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    torch.clear_autocast_cache()  # casts of the parameters would not see their displacement, or outlive it
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield saved
    finally:
        torch.clear_autocast_cache()
        with torch.no_grad():
            for tensor, value in saved.items():
                tensor.copy_(value)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)  # a forward pass may have put another tensor in its place


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
