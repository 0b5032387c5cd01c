"""Calls of torch functions that are linear in a weight, read as layers."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError

__all__ = [
    "COMPUTED",
    "LINEAR",
    "NORMALIZATIONS",
    "OPAQUE",
    "PRODUCTS",
    "LinearCall",
    "learns",
    "linear_call",
    "read_call",
]

aten: Any = torch.ops.aten

_CONVOLUTIONS = {getattr(F, f"conv{dims}d"): f"conv{dims}d" for dims in (1, 2, 3)}
_TRANSPOSED = {getattr(F, f"conv_transpose{dims}d"): f"conv_transpose{dims}d" for dims in (1, 2, 3)}

LINEAR: Mapping[Callable[..., Any], str] = {
    F.linear: "linear",
    F.embedding: "embedding",
    **_CONVOLUTIONS,
    **_TRANSPOSED,
}
"""Torch functions with a weight, and the name of each."""

_MULTIPLICATIONS = ("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "mv")
_UNREAD = (
    *("addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "addmv", "addmv_", "tensordot", "inner", "dot", "vdot"),
    *("chain_matmul", "multi_dot", "vecdot"),
)
_PLACES = (torch, Tensor, torch.linalg)


def _functions(*names: str) -> list[Callable[..., Any]]:
    return [f for place in _PLACES for name in names if (f := getattr(place, name, None)) is not None]


PRODUCTS: Mapping[Callable[..., Any], str] = {
    torch.einsum: "einsum",
    **dict.fromkeys(_functions("addmm"), "addmm"),
    **dict.fromkeys(_functions(*_MULTIPLICATIONS), "matmul"),
    **{function: name for name in _UNREAD for function in _functions(name)},
}
"""Torch functions that may be layers where one of their arguments is a parameter, and the name of each."""

NORMALIZATIONS: Mapping[Callable[..., Any], str] = {
    getattr(F, name): name for name in ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
}
"""Torch functions that normalize and then apply a weight, and the name of each."""

OPAQUE: Mapping[Callable[..., Any], str] = {
    F.multi_head_attention_forward: "multi_head_attention_forward",
    F.embedding_bag: "embedding_bag",
    F.bilinear: "bilinear",
    **{getattr(torch, name): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{getattr(torch, f"{name}_cell"): f"{name}_cell" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
"""Torch functions that hold linear layers which cannot be reached."""

COMPUTED = (
    "An implicit step for it would not be the step of the parameters that it comes from (weight_norm, spectral_norm, a "
    "parametrization, pruning, a merged adapter, a copy in another dtype): leave the layer out by `where`, or remove "
    "the parametrization."
)


def _signature(text: str) -> dict[str, Any]:
    pairs = (part.partition("=") for part in text.split())
    return {name: literal_eval(default or "None") for name, _, default in pairs}


_STATISTICS = "input running_mean running_var weight bias"
_SETTINGS = {
    "linear": _signature("input weight bias"),
    "addmm": _signature("input mat1 mat2 beta=1 alpha=1"),
    "embedding": _signature("input weight padding_idx max_norm norm_type=2.0 scale_grad_by_freq=False sparse=False"),
    "conv": _signature("input weight bias stride=1 padding=0 dilation=1 groups=1"),
    "conv_transpose": _signature("input weight bias stride=1 padding=0 output_padding=0 groups=1 dilation=1"),
    "batch_norm": _signature(f"{_STATISTICS} training=False momentum=0.1 eps=1e-5"),
    "instance_norm": _signature(f"{_STATISTICS} use_input_stats=True momentum=0.1 eps=1e-5"),
    "group_norm": _signature("input num_groups weight bias eps=1e-5"),
    "layer_norm": _signature("input normalized_shape weight bias eps=1e-5"),
    "rms_norm": _signature("input normalized_shape weight eps"),
}


def _settings(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    defaults = _SETTINGS[kind]
    return defaults | dict(zip([*defaults][: len(args)], args, strict=True)) | kwargs


class LinearCall(NamedTuple):
    """A call z = f(x, weight, bias) that is linear in weight and bias.

    Attributes:
        x: the input; of a convolution with its batch dimension.
        weight: the weight, a leaf of the graph, or a view of one.
        bias: the bias, or None.
        compute: z from (x, weight, bias), by the aten operator behind the torch function.
        text: the layer (see `layers.layer_of`).
        z: the value where it is computed already, of a normalization; ``x`` is then normalized.
        batched: False if the caller's input was a convolution's without a batch dimension.
        before: what to do first where the rule acts; it returns the call to go on with.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: Callable[..., Tensor]
    text: str
    z: Tensor | None = None
    batched: bool = True
    before: Callable[[], LinearCall] | None = None


def learns(call: LinearCall) -> bool:
    """Return whether weight or bias of a layer requires a gradient."""
    return call.weight.requires_grad or (call.bias is not None and call.bias.requires_grad)


def linear_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall | None:
    """Return a call of `LINEAR` or `NORMALIZATIONS` as a layer; None for a normalization without weights.

    Raises:
        BackpassError: the input or an embedding's gradient is sparse, or that scaled by frequency; the weight is
            complex or computed.
    """
    if func is F.linear:
        x, weight, bias = args if len(args) == 3 else _settings("linear", args, kwargs).values()
        parent = _transposed_parent(weight)
        if parent is None:
            return _checked(LinearCall(x, weight, bias, aten.linear, "Linear 0"))
        return _checked(LinearCall(x, parent, bias, lambda x, w, b: aten.linear(x, w.t(), b), "Linear 1"))
    if func in NORMALIZATIONS:
        return _normalization(NORMALIZATIONS[func], args, kwargs)
    if func is F.embedding:
        return _embedding(_settings("embedding", args, kwargs))
    kind = "conv_transpose" if func in _TRANSPOSED else "conv"
    return _convolution(_settings(kind, args, kwargs), getattr(aten, LINEAR[func]), transposed=kind != "conv")


def read_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_parameter: Callable[[Tensor], bool]
) -> LinearCall | None:
    """Return the call of a torch function as a layer; None for products other than of one parameter and one input.

    Args:
        func: a function of `LINEAR`, `NORMALIZATIONS` or `PRODUCTS`.
        args: its arguments.
        kwargs: its keyword arguments.
        is_parameter: whether a tensor is a parameter of the model.

    Raises:
        BackpassError: as of `linear_call`; or a product is linear in the parameter in a way that is not supported.
    """
    if func not in PRODUCTS:
        return linear_call(func, args, kwargs)

    def weight_of(*operands: Any) -> int | None:
        found = [k for k, t in enumerate(operands) if isinstance(t, Tensor) and (is_parameter(t) or _parent_is(t))]
        return found[0] if len(found) == 1 else None

    def _parent_is(tensor: Tensor) -> bool:
        parent = _transposed_parent(tensor)
        return parent is not None and is_parameter(parent)

    if kwargs.get("out") is not None or PRODUCTS[func] in _UNREAD:
        return None
    if PRODUCTS[func] == "addmm":
        return _addmm(_settings("addmm", args, kwargs), weight_of)
    if PRODUCTS[func] == "einsum":
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        at = weight_of(*operands) if isinstance(equation, str) and len(operands) == 2 else None
        return None if at is None else _einsum(equation, operands[1 - at], operands[at], at)
    first, second = (*args, *kwargs.values())[:2]
    if func is getattr(Tensor, "__rmatmul__", None):
        first, second = second, first
    at = weight_of(first, second)
    return None if at is None else _matmul(first, second, at)


def _matmul(first: Tensor, second: Tensor, at: int) -> LinearCall:
    x, weight = (second, first) if at == 0 else (first, second)
    if at == 1 and weight.dim() == 2:
        parent = _transposed_parent(weight)
        if parent is None:
            return _checked(LinearCall(x, weight, None, lambda x, w, b: aten.matmul(x, w), "Linear 1"))
        return _checked(LinearCall(x, parent, None, lambda x, w, b: aten.matmul(x, w.t()), "Linear 0"))
    # Letters from the end of the alphabet for leading dimensions, which broadcast.
    a, b = first.dim(), second.dim()
    leading = "stuvwxyz"
    left = "d" if a == 1 else leading[len(leading) - (a - 2) :] + "nd"
    right = "d" if b == 1 else leading[len(leading) - (b - 2) :] + "do"
    z = max(left[:-2], right[:-2], key=len) + ("n" if a > 1 else "") + ("o" if b > 1 else "")
    if any(m != n and 1 in (m, n) for m, n in zip(first.shape[-3::-1], second.shape[-3::-1], strict=False)):
        raise BackpassError(
            f"a matrix product with a parameter of shape {tuple(weight.shape)} that broadcasts over dimensions of size "
            "1 is no layer with a proximal step: expand the parameter away, or leave the call out by `where`."
        )
    equation = f"{left},{right}->{z}" if at == 1 else f"{right},{left}->{z}"
    return _checked(
        LinearCall(
            x, weight, None, lambda x, w, b: aten.matmul(x, w) if at else aten.matmul(w, x), f"Einsum {equation}"
        )
    )


def _addmm(given: dict[str, Any], weight_of: Callable[..., int | None]) -> LinearCall | None:
    added, first, second = given["input"], given["mat1"], given["mat2"]
    at = weight_of(first, second)
    if at is None:
        return None
    outputs = second.shape[1]
    if at == 0 or added.shape not in ((outputs,), (1, outputs)) or (given["beta"], given["alpha"]) != (1, 1):
        raise BackpassError(
            "addmm is a layer with a proximal step if it is bias + input @ weight, with a bias of one row and without "
            f"alpha and beta; got shapes {tuple(added.shape)}, {tuple(first.shape)}, {tuple(second.shape)}: leave the "
            "call out by `where`."
        )
    return _checked(LinearCall(first, second, added, lambda x, w, b: aten.addmm(b, x, w), "Linear 1"))


def _einsum(equation: str, x: Tensor, weight: Tensor, at: int) -> LinearCall:
    inputs, arrow, z = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if "..." in labels[1 - at] and "..." not in labels[at]:
        extra = x.dim() - len(labels[1 - at]) + 3
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation][:extra]
        labels[1 - at], z = labels[1 - at].replace("...", "".join(free)), z.replace("...", "".join(free))
    of_x, of_w = labels[1 - at], labels[at]
    if not arrow:
        counted = sorted(c for c in set(of_x + of_w) if (of_x + of_w).count(c) == 1)
        z = "".join(counted)
    repeated = any(len(set(part)) < len(part) for part in (of_x, of_w, z))
    if repeated or "." in of_x + of_w or any(c not in z and (c in of_x) != (c in of_w) for c in of_x + of_w):
        raise BackpassError(
            f"einsum({equation!r}) with a parameter is no layer with a proximal step, because it sums over a dimension "
            "of one argument alone or repeats one: write it otherwise, or leave the call out by `where`."
        )
    equation = equation.replace(" ", "")

    def compute(x: Tensor, weight: Tensor, bias: None) -> Any:
        return aten.einsum(equation, (x, weight) if at else (weight, x))

    return _checked(LinearCall(x, weight, None, compute, f"Einsum {of_x},{of_w}->{z}"))


def _embedding(given: dict[str, Any]) -> LinearCall:
    x, weight = given["input"], given["weight"]
    for setting in ("sparse", "scale_grad_by_freq"):
        if given[setting] and weight.requires_grad:
            raise BackpassError(
                "ProxProp solves for an embedding's gradient densely and divides by the counts itself: set "
                f"{setting}=False."
            )
    padding = given["padding_idx"]
    padding = -1 if padding is None else padding % weight.shape[0]
    call = _checked(LinearCall(x, weight, None, lambda x, w, b: aten.embedding(w, x, padding), f"Embedding {padding}"))
    if given["max_norm"] is None:
        return call

    def renormalized() -> LinearCall:
        with torch.no_grad():
            aten.embedding_renorm_(weight, x.contiguous(), given["max_norm"], given["norm_type"])
        return call

    return call._replace(before=renormalized)


def _convolution(given: dict[str, Any], operator: Callable[..., Tensor], transposed: bool) -> LinearCall:
    x, weight = given["input"], given["weight"]
    dims = weight.dim() - 2
    stride, dilation = _each(given["stride"], dims), _each(given["dilation"], dims)
    extra, groups = _each(given.get("output_padding", 0), dims), given["groups"]
    padding = given["padding"]
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
        before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    else:
        before = after = _each(0 if padding == "valid" else padding, dims)
    sizes = " ".join("".join(f"{n}," for n in part) for part in (stride, before, after, dilation, extra))
    settings = padding if isinstance(padding, str) else before
    rest = (stride, settings, extra, groups, dilation) if transposed else (stride, settings, dilation, groups)
    batched = x.dim() == weight.dim()
    text = f"Convolution {sizes} {groups} {int(transposed)}"
    x = x if batched else x.unsqueeze(0)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operator(x, weight, bias, *rest)

    return _checked(LinearCall(x, weight, given["bias"], compute, text, None, batched))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _normalization(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall | None:
    """Return the call as z = x w + b with the normalized x, which is computed from the input with its graph."""
    given = _settings(name, args, kwargs)
    weight, bias, eps = given["weight"], given.get("bias"), given["eps"]

    def compute(weight: Tensor | None, bias: Tensor | None, update: bool) -> Tensor:
        x, cudnn = given["input"], torch.backends.cudnn.enabled
        z: Tensor
        if name in ("batch_norm", "instance_norm"):
            own = given["training" if name == "batch_norm" else "use_input_stats"]
            statistics = (given["running_mean"], given["running_var"]) if update or not own else (None, None)
            z = getattr(aten, name)(x, weight, bias, *statistics, own, given["momentum"], eps, cudnn)
        elif name == "group_norm":
            z = aten.group_norm(x, given["num_groups"], weight, bias, eps, cudnn)
        elif name == "layer_norm":
            z = aten.layer_norm(x, given["normalized_shape"], weight, bias, eps, cudnn)
        else:
            z = aten.rms_norm(x, given["normalized_shape"], weight, eps)
        return z

    if weight is None and bias is None:
        return None
    scale: Tensor = torch.ones_like(bias).detach() if weight is None else weight  # type: ignore[arg-type]
    labels = "abcdefghijklmnopqrstuvwxyz"[: given["input"].dim()]
    features = labels[-scale.dim() :] if name in ("layer_norm", "rms_norm") else labels[1]
    text = f"Einsum {labels},{features}->{labels}"
    call = _checked(LinearCall(given["input"], scale, bias, aten.clone, text))

    def normalized() -> LinearCall:
        # First without moving the running statistics, on which the second may depend.
        x = compute(None, None, False)
        with torch.no_grad():
            return call._replace(x=x, z=compute(weight, bias, True))

    return call._replace(before=normalized)


def _transposed_parent(weight: Tensor) -> Tensor | None:
    """Return the leaf of which a matrix is the transpose, or None."""
    if is_dynamo_compiling() or weight.is_leaf or weight.dim() != 2:
        return None
    parent = weight._base
    if parent is None or not parent.is_leaf or weight.stride() != parent.stride()[::-1]:
        return None
    return parent if weight.shape == parent.shape[::-1] else None


def _checked(call: LinearCall) -> LinearCall:
    """Refuse sparse inputs, and weights for which a step would not be that of a parameter."""
    if not learns(call):
        return call
    if call.x.layout != torch.strided:
        raise BackpassError(
            f"implicit steps need dense inputs, got {call.x.layout}: call to_dense() first, or leave the layer out by "
            "`where`."
        )
    if call.weight.is_complex():
        raise BackpassError(
            f"implicit steps need real weights, got {call.weight.dtype}: leave the layer out by `where`, or store real "
            "and imaginary part as two parameters."
        )
    for tensor in (call.weight, call.bias):
        if tensor is not None and not is_dynamo_compiling() and not _is_parameter(tensor):
            raise BackpassError(
                f"the weight of shape {tuple(tensor.shape)} is computed from other parameters. {COMPUTED}"
            )
    return call


def _is_parameter(tensor: Tensor) -> bool:
    """Return whether a tensor is a leaf, or a view of one in which no two entries share memory."""
    if tensor.is_leaf or not tensor.requires_grad or isinstance(tensor, nn.Parameter):
        return True
    parent = tensor._base
    if parent is None or not parent.is_leaf:
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * size)
    return True
