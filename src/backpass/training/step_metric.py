"""Diagonal metric in which an optimizer's path is a gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["largest_rate", "step_weights"]


def largest_rate(optimizer: Optimizer, rates: list[float]) -> float:
    """The largest effective rate of the groups, lr / (1 - momentum): a heavy ball takes that many gradients each.

    Args:
        optimizer: whose groups.
        rates: a learning rate for each.
    """
    return max(rate * _momentum(group) for rate, group in zip(rates, optimizer.param_groups, strict=True))


@torch.no_grad()
def step_weights(optimizer: Optimizer, rates: list[float]) -> list[Tensor] | None:
    """The w >= 0 with mean step -s w g, s the `largest_rate`: one tensor per parameter, of its shape or a number.

    w is the group's rate relative to s, and for Adam and its kin (a state ``exp_avg_sq``) and RMSprop
    (``square_avg``) also divided by their root mean square gradient. Other optimizers count as descent along g.

    Returns:
        The weights of all parameters in order; None before the first step of an optimizer that has yet to see
        gradients.
    """
    largest = largest_rate(optimizer, rates)
    weights = []
    for rate, group in zip(rates, optimizer.param_groups, strict=True):
        relative = rate * _momentum(group) / largest if largest > 0 else 1.0
        for parameter in group["params"]:
            root = _root_mean_square(optimizer.state.get(parameter, {}), group)
            if root is not None:
                weights.append(relative / (root + group["eps"]))
            elif "eps" in group and parameter.requires_grad and not optimizer.state.get(parameter):
                return None
            else:
                weights.append(parameter.new_tensor(relative))
    return weights


def _momentum(group: dict[str, Any]) -> float:
    momentum = float(group.get("momentum", 0.0))
    dampening = float(group.get("dampening", 0.0)) if momentum else 0.0
    return (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0


def _root_mean_square(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    if "exp_avg_sq" in state:
        squares: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        decay: float = group["betas"][1]
        unbiased: Tensor = squares / (1 - decay ** float(state["step"]))
        return unbiased.sqrt()
    if "square_avg" in state:
        squares = state["square_avg"]
        return squares.sqrt()
    return None
