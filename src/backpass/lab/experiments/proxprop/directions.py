"""The directions of several rules at one place, beside the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules import Rule

__all__ = ["directions"]


def directions(model: nn.Module, x: Tensor, y: Tensor, rules: Mapping[str, Rule]) -> dict[str, dict[str, float]]:
    """Beside the gradient G and the first rule's direction D, the direction of each rule.

    Args:
        model: a ``Sequential`` whose last layer stays plain.
        x: (N, C, H, W), images in [0, 1].
        y: (N,), labels.
        rules: by name.

    Returns:
        By rule, ``cosine``, the least cosine with G of all layers (weight and bias as one vector), and ``error``, the
        greatest distance from D, relative to D.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][:-1]

    def vectors() -> list[Tensor]:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        return [
            torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]).double() for one in layers
        ]

    plain = vectors()
    found: dict[str, list[Tensor]] = {}
    for name, rule in rules.items():
        with rule.attach(model):
            found[name] = vectors()
    first = next(iter(found.values()))
    return {
        name: {
            "cosine": min(float(torch.cosine_similarity(d, g, dim=0)) for d, g in zip(own, plain, strict=True)),
            "error": max(float((d - e).norm() / e.norm()) for d, e in zip(own, first, strict=True)),
        }
        for name, own in found.items()
    }
