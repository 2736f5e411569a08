"""Up to which sharpness an optimizer descends: its metric and its limit, read from its options and state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


def is_known(optimizer: Optimizer) -> bool:
    """Whether metric and limit are known: for `torch.optim`'s SGD, Adam and AdamW, themselves, that minimise."""
    # A subclass may step otherwise.
    return type(optimizer) in (SGD, Adam, AdamW) and not any(group["maximize"] for group in optimizer.param_groups)


def has_metric(optimizer: Optimizer) -> bool:
    """Whether a known optimizer descends in a metric of its own, which changes: Adam and AdamW."""
    return isinstance(optimizer, Adam)


def stable_sharpness(optimizer: Optimizer) -> float | None:
    """Largest curvature on which a known optimizer is stable at its present rate, in its metric.

    With g the gradient of a quadratic of curvature λ, a step is stable as long as the roots of its characteristic
    polynomial lie in the unit circle; the first leaves it at −1:

    - SGD, momentum β, dampening d: `lr (1 − d) λ ≤ 2 (1 + β)`; Nesterov's momentum: `lr λ ≤ 2 (1 + β)/(1 + 2β)`;
    - Adam, its metric P held fixed: `lr λ ≤ 2 (1 + β₁)/(1 − β₁)`; AdamW, decay w: `lr λ ≤ (2 − lr w)(1 + β₁)/(1 − β₁)`.

    Args:
        optimizer: one that `is_known`.

    Returns:
        The largest such λ, inf at a rate of 0; None if the groups differ in rate or momentum.

    Source:
        Cohen et al. (2021), arXiv 2103.00065, and (2022), "Adaptive gradient methods at the edge of stability",
        arXiv 2207.14484; AdamW's decay by the same argument.
    """
    groups = optimizer.param_groups
    lr = _common(groups, "lr")
    if isinstance(optimizer, SGD):
        beta, dampening, nesterov = (_common(groups, name) for name in ("momentum", "dampening", "nesterov"))
        if lr is None or beta is None or dampening is None or nesterov is None:
            return None
        # Without momentum there is nothing that SGD would dampen.
        rate, limit = float(lr) * (1.0 - dampening * bool(beta)), 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta * nesterov)
    else:
        betas = _common(groups, "betas")
        if lr is None or betas is None:
            return None
        # Decays may differ: what is stable under the largest is so under the others.
        decay = max(group["weight_decay"] for group in groups) if isinstance(optimizer, AdamW) else 0.0
        rate, limit = float(lr), (2.0 - float(lr) * decay) * (1.0 + float(betas[0])) / (1.0 - float(betas[0]))
    return limit / rate if rate > 0.0 else float("inf")


def added_weight_decay(optimizer: Optimizer) -> float | None:
    """λ of the decay λw that a known optimizer adds to the gradient, hence λI to H; None if the groups differ."""
    return 0.0 if isinstance(optimizer, AdamW) else _common(optimizer.param_groups, "weight_decay")


def metric_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """Diagonal of the metric P in which Adam or AdamW descends, as it stands.

    `(1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε)` after t steps.

    Args:
        optimizer: one that `has_metric`.
        parameters: of the model, all held by the optimizer.

    Returns:
        `(N,)`, the parameters flattened one after the other; inf where one has yet had no gradient and stays where it
        is; None before the first step.
    """
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    pieces = []
    for parameter in parameters:
        state, group = optimizer.state.get(parameter, {}), group_of[id(parameter)]
        v = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
        if v is None:
            pieces.append(torch.full((parameter.numel(),), torch.inf, device=parameter.device))
            continue
        step, (beta1, beta2) = float(state["step"]), (float(beta) for beta in group["betas"])
        root = (v.detach().float() / (1.0 - beta2**step)).sqrt()
        pieces.append(((1.0 - beta1**step) * (root + group["eps"])).flatten())
    metric = torch.cat(pieces)
    return metric if bool(torch.isfinite(metric).any()) else None


def _common(groups: list[dict[str, Any]], name: str) -> Any:
    """The option that all groups share, else None."""
    first = groups[0][name]
    return first if all(group[name] == first for group in groups) else None
