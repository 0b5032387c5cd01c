"""Calls of torch functions that are linear in a weight, read as layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.errors import BackpassError
from backpass.rules.layers.linear_layer import LinearLayer
from backpass.rules.layers.linear_layers import Convolution, Embedding, Linear

__all__ = ["LINEAR", "OPAQUE", "LinearCall", "linear_call"]

aten = torch.ops.aten

_CONVOLUTIONS = {getattr(F, f"conv{dims}d"): dims for dims in (1, 2, 3)}
_TRANSPOSED = {getattr(F, f"conv_transpose{dims}d"): dims for dims in (1, 2, 3)}

LINEAR: Mapping[Callable[..., Any], str] = {
    F.linear: "linear",
    F.embedding: "embedding",
    **{function: f"conv{dims}d" for function, dims in _CONVOLUTIONS.items()},
    **{function: f"conv_transpose{dims}d" for function, dims in _TRANSPOSED.items()},
}
"""The torch functions that `linear_call` reads, and the name of each."""

OPAQUE: Mapping[Callable[..., Any], str] = {
    F.multi_head_attention_forward: "multi_head_attention_forward",
    F.embedding_bag: "embedding_bag",
    F.bilinear: "bilinear",
    **{getattr(torch, name): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{getattr(torch, f"{name}_cell"): f"{name}_cell" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
"""Torch functions that hold linear layers which cannot be reached."""

_PARAMETERS = {
    "linear": ("input", "weight", "bias"),
    "embedding": ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}


@dataclass(frozen=True)
class LinearCall:
    """A call z = f(x, weight, bias) that is linear in weight and bias.

    Attributes:
        x: the input; of a convolution with its batch dimension.
        weight: the weight.
        bias: the bias, or None.
        compute: z from (x, weight, bias, *rest), by the aten operator behind the torch function.
        rest: the other arguments of ``compute``.
        layer: the layer that the call is.
        batched: False if the caller's input was a convolution's without a batch dimension.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: Callable[..., Tensor]
    rest: tuple[Any, ...]
    layer: LinearLayer
    batched: bool = True


def linear_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall:
    """The call as a layer.

    Raises:
        BackpassError: an embedding's gradient is sparse or scaled by frequency.
    """
    name = LINEAR[func]
    kind = name.rstrip("123d") if name.startswith("conv") else name
    given = dict(zip(_PARAMETERS[kind], args, strict=False)) | kwargs
    if kind == "linear":
        weight = given["weight"]
        return LinearCall(given["input"], weight, given.get("bias"), aten.linear, (), Linear(tuple(weight.shape)))
    if kind == "embedding":
        return _embedding(given)
    return _convolution(given, getattr(aten, name), transposed=kind == "conv_transpose")


def _embedding(given: dict[str, Any]) -> LinearCall:
    x, weight = given["input"], given["weight"]
    for setting in ("sparse", "scale_grad_by_freq"):
        if given.get(setting):
            raise BackpassError(
                "ProxProp solves for an embedding's gradient densely and divides by the counts itself: set "
                f"{setting}=False."
            )
    padding = given.get("padding_idx")
    padding = -1 if padding is None else padding % weight.shape[0]
    if given.get("max_norm") is not None:
        with torch.no_grad():
            aten.embedding_renorm_(weight, x.contiguous(), given["max_norm"], given.get("norm_type", 2.0))
    return LinearCall(x, weight, None, _embed, (padding,), Embedding(tuple(weight.shape), padding))


def _embed(x: Tensor, weight: Tensor, bias: None, padding: int) -> Tensor:
    return aten.embedding(weight, x, padding)  # type: ignore[no-any-return]


def _convolution(given: dict[str, Any], compute: Callable[..., Tensor], transposed: bool) -> LinearCall:
    x, weight = given["input"], given["weight"]
    dims = weight.dim() - 2
    stride, dilation = _each(given.get("stride", 1), dims), _each(given.get("dilation", 1), dims)
    extra, groups = _each(given.get("output_padding", 0), dims), given.get("groups", 1)
    padding = given.get("padding", 0)
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
        before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    else:
        before = after = _each(0 if padding == "valid" else padding, dims)
    layer = Convolution(tuple(weight.shape), stride, before, after, dilation, extra, groups, int(transposed))
    settings = padding if isinstance(padding, str) else before
    rest = (stride, settings, extra, groups, dilation) if transposed else (stride, settings, dilation, groups)
    batched = x.dim() == weight.dim()
    return LinearCall(x if batched else x.unsqueeze(0), weight, given.get("bias"), compute, rest, layer, batched)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
