"""One probe: the gradient of a loss, and the product of its Hessian with a direction."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from replica_newton.curvature.gram import working_dtype
from replica_newton.monitor.untouched import untouched

Loss = Callable[[], Tensor]


def exact_products(
    model: nn.Module, parameters: Sequence[Tensor], losses: Sequence[Loss], directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients, and Hessian products by differentiating twice; leaves no trace in the model.

    Kinks (ReLU, max-pooling) contribute nothing, as in every Hessian of autograd.

    Args:
        model: that the losses evaluate.
        parameters: of N elements together.
        losses: k of them.
        directions: `(k, N)`, one a loss.

    Returns:
        Gradients and products, `(k, N)` each.

    Raises:
        RuntimeError: if an operation of the model cannot be differentiated twice.
    """
    sizes = [parameter.numel() for parameter in parameters]
    gradients, products = _rows(losses, parameters), _rows(losses, parameters)
    with untouched(model), torch.enable_grad():
        for gradient, product, loss, direction in zip(gradients, products, losses, directions, strict=True):
            pieces = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
            along = [q.reshape(piece.shape).to(piece) for q, piece in zip(direction.split(sizes), pieces, strict=True)]
            curved = [(piece, q) for piece, q in zip(pieces, along, strict=True) if piece.requires_grad]
            _flat(pieces, into=gradient)
            _multiply(curved, parameters, into=product)
    return gradients, products


def differences(
    model: nn.Module,
    parameters: Sequence[Tensor],
    losses: Sequence[Loss],
    directions: Tensor,
    *,
    relative_step: float,
    gradients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients, and Hessian products from the gradients on the same data a step h away, `(g(w + h q̂) − g(w)) ‖q‖/h`.

    Both gradients of a loss see the same random numbers; nothing leaves a trace in the model.

    Args:
        model: that the losses evaluate.
        parameters: of N elements together.
        losses: k of them.
        directions: `(k, N)`, one a loss.
        relative_step: h over `max(‖w‖, 1)`.
        gradients: `(k, N)` at w; evaluated if None.

    Returns:
        Gradients and products, `(k, N)` each.
    """
    scales = step_scales(_flat(parameters), directions, relative_step)
    if gradients is None:
        gradients = _gradients_at(model, parameters, losses)
    displaced = _gradients_at(model, parameters, losses, (directions, scales))
    return gradients, displaced.sub_(gradients).mul_(scales)


def step_scales(point: Tensor, directions: Tensor, relative_step: float) -> Tensor:
    """`‖q‖/h` of every direction q, by which it is divided for a step of length h, and a difference multiplied.

    Args:
        point: w, `(N,)`.
        directions: `(k, N)`.
        relative_step: h over `max(‖w‖, 1)`.

    Returns:
        `(k, 1)`.
    """
    length = relative_step * max(float(torch.linalg.vector_norm(point)), 1.0)
    lengths: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return lengths / length


def require_precision(parameters: Sequence[Tensor]) -> None:
    """Curvature from gradients in half precision is rounding.

    Args:
        parameters: to be probed.

    Raises:
        TypeError: if one is neither fp32 nor fp64.
    """
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"parameters must be fp32 or fp64 to be probed, got {parameter.dtype}")


def gradient_of(model: nn.Module, parameters: Sequence[Tensor], loss: Loss) -> Tensor:
    """Gradient of a loss where the model stands, `(N,)`; leaves no trace in the model."""
    return _gradients_at(model, parameters, [loss])[0]


def _gradients_at(
    model: nn.Module,
    parameters: Sequence[Tensor],
    losses: Sequence[Loss],
    away: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradients where the model stands, or, one a loss, away from there by directions over their scales."""
    rows = _rows(losses, parameters)
    with untouched(model) as values:
        for number, (row, loss) in enumerate(zip(rows, losses, strict=True)):
            if away is not None:
                _displace(parameters, values, *(one[number] for one in away))
            with torch.enable_grad():
                _flat(torch.autograd.grad(loss(), parameters, materialize_grads=True), into=row)
    return rows


@torch.no_grad()
def _displace(parameters: Sequence[Tensor], values: dict[Tensor, Tensor], direction: Tensor, scale: Tensor) -> None:
    """Move parameters from their values by a direction over its scale."""
    pieces = torch.split(direction, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(values[parameter] + (piece / scale).reshape(parameter.shape))
    torch.clear_autocast_cache()


def refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Find operations that autograd would pass over in silence, as if their gradients were constant.

    Functions marked with `once_differentiable` leave a node that raises, but without a way on from it; so nothing ever
    comes there when only the gradients of parameters are asked for.

    Args:
        gradients: made with `create_graph=True`.

    Raises:
        RuntimeError: if there is one.
    """
    waiting = [gradient.grad_fn for gradient in gradients if gradient.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith("::Error"):
            raise RuntimeError("a function is marked as once_differentiable")
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting.extend(new)


def _multiply(curved: list[tuple[Tensor, Tensor]], parameters: Sequence[Tensor], *, into: Tensor) -> None:
    if not curved:  # a loss that is linear in its parameters
        into.zero_()
        return
    pieces, along = zip(*curved, strict=True)
    try:
        refuse_once_differentiable(pieces)
        _flat(torch.autograd.grad(pieces, parameters, along, materialize_grads=True), into=into)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"the model cannot be differentiated twice, relative_step=1e-3 takes differences ({reason})"
        ) from error


def _rows(losses: Sequence[Loss], parameters: Sequence[Tensor]) -> Tensor:
    """Memory for `(k, N)`."""
    N = sum(parameter.numel() for parameter in parameters)
    return torch.empty(len(losses), N, dtype=working_dtype(*parameters), device=parameters[0].device)


def _flat(tensors: Sequence[Tensor], *, into: Tensor | None = None) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors], out=into)
