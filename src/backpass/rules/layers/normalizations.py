"""Calls of normalization functions, taken apart into what normalizes and the affine part z = x w + b."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NORMALIZATIONS", "Normalization", "normalization"]

aten = torch.ops.aten

NORMALIZATIONS: Mapping[Callable[..., Any], str] = {
    F.batch_norm: "batch_norm",
    F.instance_norm: "instance_norm",
    F.group_norm: "group_norm",
    F.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
}
"""The torch functions that normalize and then apply a weight, and the name of each."""

_STATISTICS = (("running_mean", None), ("running_var", None), ("weight", None), ("bias", None))
_PARAMETERS: dict[str, tuple[tuple[str, Any], ...]] = {
    "batch_norm": (*_STATISTICS, ("training", False), ("momentum", 0.1), ("eps", 1e-5)),
    "instance_norm": (*_STATISTICS, ("use_input_stats", True), ("momentum", 0.1), ("eps", 1e-5)),
    "group_norm": (("num_groups", None), ("weight", None), ("bias", None), ("eps", 1e-5)),
    "layer_norm": (("normalized_shape", None), ("weight", None), ("bias", None), ("eps", 1e-5)),
    "rms_norm": (("normalized_shape", None), ("weight", None), ("eps", None)),
}


@dataclass(frozen=True)
class Normalization:
    """A call z = normalized(x) w + b.

    Attributes:
        x: the input.
        weight: w, or None.
        bias: b, or None.
        last: whether the features are the last dimensions, as many as w has, and not dimension 1.
        compute: z from (x, w, b, whether running statistics are updated).
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    last: bool
    compute: Callable[[Tensor, Tensor | None, Tensor | None, bool], Tensor]


def normalization(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Normalization:
    """The call, taken apart."""
    name = NORMALIZATIONS[func]
    given = dict(_PARAMETERS[name]) | dict(zip(("input", *(key for key, _ in _PARAMETERS[name])), args, strict=False))
    given |= kwargs
    eps = given["eps"]

    def compute(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: bool) -> Tensor:
        z: Tensor
        if name in ("batch_norm", "instance_norm"):
            own = given["training" if name == "batch_norm" else "use_input_stats"]
            statistics = (given["running_mean"], given["running_var"]) if update or not own else (None, None)
            operator = aten.batch_norm if name == "batch_norm" else aten.instance_norm
            z = operator(x, weight, bias, *statistics, own, given["momentum"], eps, torch.backends.cudnn.enabled)
        elif name == "group_norm":
            z = aten.group_norm(x, given["num_groups"], weight, bias, eps, torch.backends.cudnn.enabled)
        elif name == "layer_norm":
            z = aten.layer_norm(x, given["normalized_shape"], weight, bias, eps, torch.backends.cudnn.enabled)
        else:
            z = aten.rms_norm(x, given["normalized_shape"], weight, eps)
        return z

    last = name in ("layer_norm", "rms_norm")
    return Normalization(given["input"], given["weight"], given.get("bias"), last, compute)
