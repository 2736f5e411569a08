"""The reference network: size, layers, activations, and that its replicas can be evaluated in one batched pass."""

import pytest
import torch
from torch import nn

from replica_newton.topology import Simulated
from replica_newton.training.models import reference_convnet

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("input_shape", "expected"), [((1, 28, 28), 16_358), ((3, 32, 32), 16_502), ((1, 8, 8), 6_758)]
)
def test_number_of_parameters_is_the_documented_one(input_shape, expected):
    assert parameter_count(reference_convnet(input_shape)) == expected


@pytest.mark.parametrize("input_shape", [(1, 28, 28), (3, 32, 32)])
def test_large_images_get_about_sixteen_thousand_parameters(input_shape):
    assert abs(parameter_count(reference_convnet(input_shape)) - 16_000) < 0.05 * 16_000


@pytest.mark.parametrize("input_shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 5, 9)])
@pytest.mark.parametrize("classes", [10, 3])
def test_every_image_gets_one_logit_a_class(input_shape, classes):
    model = reference_convnet(input_shape, classes)
    assert model(torch.zeros(4, *input_shape)).shape == (4, classes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_has_three_convolutions_and_two_linear_layers_with_an_activation_after_all_but_the_last(activation):
    layers = [layer for layer in reference_convnet(activation=activation) if not isinstance(layer, nn.Flatten)]
    weighted, between = layers[::2], layers[1::2]
    assert [type(layer) for layer in weighted] == [nn.Conv2d] * 3 + [nn.Linear] * 2
    assert [type(layer) for layer in between] == [ACTIVATIONS[activation]] * 4
    assert all(layer.weight.requires_grad and layer.bias.requires_grad for layer in weighted)


def test_activations_differ_in_nothing_but_the_function():
    models = []
    for activation in ACTIVATIONS:
        torch.manual_seed(3)
        models.append(reference_convnet((1, 8, 8), activation=activation))
    relu, tanh = (list(model.parameters()) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(relu, tanh, strict=True))
    image = torch.ones(1, 1, 8, 8)
    assert not torch.allclose(models[0](image), models[1](image))


@pytest.mark.parametrize("activation", ["sigmoid", "", "ReLU", None])
def test_unknown_activation_is_refused_with_the_rule_and_the_value(activation):
    with pytest.raises(ValueError, match="must be one of relu, tanh") as caught:
        reference_convnet(activation=activation)
    assert repr(activation) in str(caught.value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_replicas_are_evaluated_in_one_batched_pass_and_reach_every_parameter(activation):
    torch.manual_seed(0)
    model = reference_convnet((1, 8, 8), activation=activation)
    inputs, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    closure = Simulated(2, batched=True).closure(model, nn.functional.cross_entropy, inputs, labels)
    parameters = list(model.parameters())
    points = torch.cat([parameter.detach().flatten() for parameter in parameters]).expand(2, -1)
    gradients = closure.gradients(parameters, points).gradients
    pieces = torch.split(gradients, [parameter.numel() for parameter in parameters], dim=1)
    assert all(bool(piece.any(dim=1).all()) for piece in pieces)
