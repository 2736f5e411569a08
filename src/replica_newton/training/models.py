"""The reference network: the paper's five-layer convnet of about 16,000 parameters."""

from typing import Literal, get_args

from torch import nn

Activation = Literal["relu", "tanh"]
CHANNELS = (8, 16, 32)
HIDDEN = 20


def reference_convnet(
    input_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, *, activation: Activation = "relu"
) -> nn.Sequential:
    """Three 3×3 convolutions of stride 2 (8, 16, 32 channels) and two linear layers (20 and `classes` outputs).

    16,358 parameters for 1×28×28, 16,502 for 3×32×32, 6,758 for 1×8×8. The paper gives five layers and about
    16,000 parameters and nothing else; strides in place of pooling keep every operation smooth but the activation.

    Args:
        input_shape: (channels, height, width).
        classes: number of outputs, logits.
        activation: after every layer but the last.

    Returns:
        The network, initialised with torch's global random state.

    Raises:
        ValueError: if the activation is unknown.

    Source:
        Arnold and Wang (2017), arXiv 1709.05069, section 3.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"{activation=} must be one of {', '.join(get_args(Activation))}")
    nonlinearity = nn.ReLU if activation == "relu" else nn.Tanh
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for width_out in CHANNELS:
        layers += [nn.Conv2d(channels, width_out, 3, stride=2, padding=1), nonlinearity()]
        channels, height, width = width_out, (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(channels * height * width, HIDDEN),
        nonlinearity(),
        nn.Linear(HIDDEN, classes),
    )
