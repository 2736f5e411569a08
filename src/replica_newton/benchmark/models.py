"""Networks of the benchmark beside the reference convnet: an MLP, a deep autoencoder, a causal transformer."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

AUTOENCODER_WIDTHS = (250, 120, 60, 30)
"""Of Hinton and Salakhutdinov's 1000-500-250-30 a quarter, but for the code: it has to fit two processors."""


def mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with tanh between them.

    Args:
        inputs: numbers in a sample, whatever its shape.
        widths: of the hidden layers.
        outputs: numbers that it returns.

    Returns:
        The network, initialised with torch's global random state.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def autoencoder(pixels: int, widths: Sequence[int] = AUTOENCODER_WIDTHS) -> nn.Sequential:
    """A deep autoencoder: logistic units, a linear code, and the encoder mirrored as the decoder.

    471,674 parameters for 784 pixels. Weights are Xavier-normal, so that signals pass eight layers.

    Args:
        pixels: numbers in a sample.
        widths: of the encoder's layers; the last is the code.

    Returns:
        The network, whose outputs are logits; initialised with torch's global random state.

    Source:
        Hinton and Salakhutdinov (2006), Science 313; Martens (2010) made it the test of second-order methods.
    """
    sizes = (pixels, *widths, *reversed(widths[:-1]), pixels)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if number not in {len(widths), len(sizes) - 1}:
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


class CausalTransformer(nn.Module):
    """A decoder-only transformer on characters: layer norm before attention and before the MLP, learnt positions.

    Args:
        characters: size of the alphabet.
        context: characters in a sample.
        width: of the residual stream; divisible by `heads`.
        heads: of the attention.
        depth: number of blocks.

    Source:
        Radford et al. (2019), in small.
    """

    def __init__(self, characters: int, context: int, *, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters, bias=False))
        for table in (self.characters.weight, self.positions):
            nn.init.normal_(table, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next character.

        Args:
            text: `(samples, context)` characters.

        Returns:
            `(samples, context, characters)`.
        """
        logits: Tensor = self.head(self.blocks(self.characters(text) + self.positions))
        return logits


class Block(nn.Module):
    """A block of the transformer: causal attention, then an MLP four times as wide, both added to the stream.

    Args:
        width: of the residual stream.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, stream: Tensor) -> Tensor:
        """The stream after the block.

        Args:
            stream: `(samples, context, width)`.

        Returns:
            The same shape.
        """
        samples, context, width = stream.shape
        parts = self.attention_in(self.before_attention(stream)).view(samples, context, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # Written out: the fused kernel has no second derivative, which some of the methods need.
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        future = torch.ones(context, context, dtype=torch.bool, device=stream.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(samples, context, width)
        stream = stream + self.attention_out(mixed)
        out: Tensor = stream + self.mlp(stream)
        return out
