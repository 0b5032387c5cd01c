"""Activation functions of torch, and their out-of-place computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import UnknownNameError
from backpass.rules.torch_internals import transforms

__all__ = [
    "ACTIVATIONS",
    "FUSED_ACTIVATIONS",
    "SIMPLE",
    "WITHOUT_ACTIVATION",
    "Activation",
    "activations",
    "copied",
    "is_relu",
    "learned_value",
    "read_call",
    "writes_in_place",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise activation function.

    Attributes:
        name: name in a site table.
        compute: computes the output from input and parameters with aten operators, which an outer mode does not count
            as a call of the activation.
        parameters: names and defaults of the arguments between the input and ``inplace``.
    """

    name: str
    compute: Callable[..., Tensor]
    parameters: tuple[tuple[str, Any], ...] = ()


_TANH_OR_ERF = (("approximate", "none"),)
_RANGE = (("min_val", -1.0), ("max_val", 1.0))


def _gelu(x: Tensor, approximate: str) -> Any:
    return aten.gelu(x, approximate=approximate)


def _relu6(x: Tensor) -> Any:
    return aten.hardtanh(x, 0.0, 6.0)


def _softsign(x: Tensor) -> Any:
    return aten.div(x, aten.add(aten.abs(x), 1))


def _tanhshrink(x: Tensor) -> Any:
    return aten.sub(x, aten.tanh(x))


_NAMED: tuple[Activation, ...] = (
    Activation("relu", aten.relu),
    Activation("relu6", _relu6),
    Activation("leaky_relu", aten.leaky_relu, (("negative_slope", 0.01),)),
    Activation("prelu", aten.prelu, (("weight", None),)),
    Activation("elu", aten.elu, (("alpha", 1.0),)),
    Activation("celu", aten.celu, (("alpha", 1.0),)),
    Activation("selu", aten.selu),
    Activation("silu", aten.silu),
    Activation("gelu", _gelu, _TANH_OR_ERF),
    Activation("mish", aten.mish),
    Activation("softplus", aten.softplus, (("beta", 1.0), ("threshold", 20.0))),
    Activation("hardswish", aten.hardswish),
    Activation("hardtanh", aten.hardtanh, _RANGE),
    Activation("hardsigmoid", aten.hardsigmoid),
    Activation("threshold", aten.threshold, (("threshold", 0.0), ("value", 0.0))),
    Activation("tanh", aten.tanh),
    Activation("sigmoid", aten.sigmoid),
    Activation("logsigmoid", aten.log_sigmoid),
    Activation("softsign", _softsign),
    Activation("tanhshrink", _tanhshrink),
    Activation("hardshrink", aten.hardshrink, (("lambd", 0.5),)),
    Activation("softshrink", aten.softshrink, (("lambd", 0.5),)),
    Activation("rrelu", aten.rrelu, (("lower", 1 / 8), ("upper", 1 / 3), ("training", False))),
)


def _everywhere(activation: Activation) -> dict[Callable[..., Any], Activation]:
    """Return every torch function that computes the activation: functional, builtin, method and in-place."""
    places = (F, torch, torch.Tensor, torch.special, torch._C._nn)
    names = [activation.name, activation.name + "_"]
    if activation.name == "sigmoid":
        names.append("expit")
    found = (getattr(place, name, None) for place in places for name in names)
    return {function: activation for function in found if callable(function)}


_BY_FUNCTION = {function: activation for named in _NAMED for function, activation in _everywhere(named).items()}

ACTIVATIONS: Mapping[Callable[..., Any], str] = {
    function: activation.name for function, activation in _BY_FUNCTION.items()
}
"""Activation functions of torch, with their names."""


def activations(*names: str) -> dict[Callable[..., Any], str]:
    """Return the torch functions of the named activations, as in ``activations("relu", "relu6")``; default: all.

    Raises:
        UnknownNameError: a name is unknown.
    """
    known = {activation.name for activation in _NAMED}
    for name in names:
        if name not in known:
            raise UnknownNameError("activation", name, known)
    return {function: name for function, name in ACTIVATIONS.items() if name in (names or known)}


WITHOUT_ACTIVATION: frozenset[type[nn.Module]] = frozenset(
    (
        *(nn.Linear, nn.Embedding, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d, nn.Upsample, nn.PixelShuffle),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        *(nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Softmax, nn.LogSoftmax),
    )
)
"""Modules of torch that call no activation and need no hooks."""

FUSED_ACTIVATIONS: Mapping[Callable[..., Any], str] = {
    getattr(torch, name): name
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for name in (kind, f"{kind}_cell")
    if name != "rnn"
}
"""Torch functions that compute activations internally, where no rule can reach them, with their names."""

_IN_PLACE = frozenset(function for function in _BY_FUNCTION if function.__name__.endswith("_"))

SIMPLE = frozenset(
    function
    for function, activation in _BY_FUNCTION.items()
    if function not in _IN_PLACE and activation.name not in ("prelu", "rrelu")
)
"""Functions that compute a deterministic activation of their first argument only."""


def read_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Activation, Tensor, tuple[Any, ...], bool]:
    """Return the activation of a call, its input, its parameters in order, and whether it writes in place."""
    activation = _BY_FUNCTION[func]
    x, given = (args[0], args[1:]) if args else (kwargs["input"], ())
    n = len(activation.parameters)
    parameters = given[:n]
    if len(parameters) < n:
        missing = activation.parameters[len(parameters) :]
        parameters += tuple(kwargs.get(name, default) for name, default in missing)
    in_place = func in _IN_PLACE or (given[n] if len(given) > n else kwargs.get("inplace", False))
    return activation, x, parameters, bool(in_place)


def is_relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a call is a ReLU or a ReLU with an upper limit, such as ReLU6."""
    activation, _, parameters, _ = read_call(func, args, kwargs)
    name = activation.name
    return name in ("relu", "relu6") or (name == "hardtanh" and parameters[0] == 0 and parameters[1] > 0)


def copied(x: Tensor) -> Tensor:
    """Return a copy of x with its strides: torch rounds differently on a tensor with gaps and on one without."""
    copy = x.clone()
    if is_dynamo_compiling() or copy.stride() == x.stride() or transforms():
        return copy
    whole = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    try:
        return whole.new_empty_strided(whole.shape, whole.stride()).copy_(whole).expand(x.shape)
    except RuntimeError:  # elements that overlap
        return copy


def writes_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if an elementwise call overwrites its first argument."""
    if func in _BY_FUNCTION:
        return read_call(func, args, kwargs)[3]
    return func.__name__.endswith("_") and not func.__name__.endswith("__")


def learned_value(func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the output as a function of the learned parameters with x detached; None without such parameters."""
    activation, _, parameters, _ = read_call(func, args, kwargs)
    if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
        return activation.compute(x.detach(), *parameters)
    return None
