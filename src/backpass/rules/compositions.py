"""Detection of gates and of activations composed of several calls.

``x * gate(x)`` (a hand-written SiLU, GELU, Mish or Hardswish) is one activation of x. An activation whose value
multiplies *another* tensor, as in squeeze-and-excitation, is a gate and no activation. To distinguish them, the
`Origin` of each result of an elementwise function, the tensor that it is a function of, is recorded while the calling
module runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules.attaching.run import SiteCall

__all__ = [
    "CHOICES",
    "ELEMENTWISE",
    "JOINS",
    "LAYERS",
    "MATRIX_PRODUCTS",
    "MIXES",
    "NONLINEAR",
    "POWERS",
    "PRODUCTS",
    "REDUCTIONS",
    "SUMS",
    "VIEWS",
    "Origin",
    "Origins",
    "common_path",
    "composes",
    "constants",
    "gates",
    "guarded",
    "is_of_parameters",
    "is_query",
    "limits",
    "rectifies",
]


def _functions(names: str) -> frozenset[Callable[..., Any]]:
    places = (torch, Tensor, F, torch.special, operator)
    found = (getattr(place, name, None) for place in places for name in names.split())
    return frozenset(function for function in found if callable(function))


PRODUCTS = _functions("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__") | _functions(
    "div div_ divide divide_ true_divide true_divide_ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__"
)
"""Functions that multiply or divide."""

CHOICES = _functions("maximum minimum max min where masked_fill masked_fill_")
"""Functions that select between tensors. Applied to functions of one tensor they form another, such as a leaky ReLU."""

NONLINEAR = _functions(
    "erf erfc ndtr exp exp_ exp2 expm1 log log1p log2 log10 sin sin_ cos cos_ tan sinc sinh cosh atan asinh acosh "
    "abs abs_ absolute __abs__ sqrt rsqrt reciprocal sign sgn heaviside "
    "clamp clamp_ clip clip_ clamp_min clamp_max clamp_min_ clamp_max_ "
    "gt ge lt le greater greater_equal less less_equal __gt__ __ge__ __lt__ __le__ logical_not __invert__ bitwise_not"
)
"""Nonlinear elementwise functions that can form a gate or an activation, but are no sites by themselves."""

POWERS = _functions("pow pow_ __pow__ square square_")
"""Powers, which form another activation from one, such as the squared ReLU."""

REDUCTIONS = _functions("mean sum norm")
"""Reductions. The square of an activation that enters one is a part of a norm."""

_ADDITIONS = _functions("add add_ __add__ __radd__ __iadd__")

SUMS = _ADDITIONS | _functions("sub sub_ subtract rsub __sub__ __rsub__ __isub__")
"""Sums and differences."""

_AFFINE = _functions("neg negative __neg__ clone contiguous to float half bfloat16 double type type_as detach")

ELEMENTWISE = PRODUCTS | CHOICES | NONLINEAR | POWERS | SUMS | _AFFINE | _functions("fmax logaddexp")
"""Elementwise functions."""

MATRIX_PRODUCTS = _functions("matmul __matmul__ __rmatmul__ bmm einsum")
"""Functions that sum products."""

_MIXED_SUMS = _functions("lerp lerp_ addcmul addcmul_ addcdiv addcdiv_")

MIXES = MATRIX_PRODUCTS | _MIXED_SUMS
"""Further functions that multiply tensors and can apply a gate."""

LAYERS = _functions(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear addmm mm baddbmm "
    "batch_norm layer_norm group_norm instance_norm rms_norm"
)
"""Layers: functions whose output is typically the input of an activation."""

JOINS = _functions("cat concat concatenate stack hstack vstack dropout dropout1d dropout2d mean")
"""Functions that preserve the property of being a gate."""

SOFTPLUS = _functions("log log1p")
"""Functions that form a softplus from an exponential."""

_LOGARITHMS = frozenset(("log", "log2", "log10"))
_GREATER = _functions("maximum max fmax logaddexp")
_CLAMPS = _functions("clamp clamp_ clip clip_ clamp_min clamp_min_")
_DOMAINS = _functions("sqrt rsqrt log log1p log2 log10 reciprocal")
_DIVISIONS = _functions("div div_ divide true_divide __truediv__ __itruediv__ __rtruediv__")

VIEWS = frozenset((F.interpolate, F.upsample)) | _functions(
    "view reshape expand expand_as unsqueeze squeeze flatten unflatten permute transpose __getitem__ chunk split "
    "unbind movedim t repeat tile broadcast_to view_as reshape_as narrow select pad constant_pad_nd gather "
    "index_select take_along_dim"
)
"""Functions that arrange the same elements anew, resample them, or pad them."""

_PARAMETER_LIMIT = 32
_SIGMOIDS = frozenset(("sigmoid", "hardsigmoid", "hsigmoid", "expit"))
_QUERIES = frozenset(
    ("__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__")
)


def is_query(func: Callable[..., Any]) -> bool:
    """Return True if a function only reads a property of a tensor."""
    return getattr(func, "__name__", "") in _QUERIES


class Origin:
    """Origin of a result: the tensor that it is an elementwise function of.

    Attributes:
        source: that tensor; None for a rearrangement of its elements.
        nonlinear: name of the last nonlinear function on the path from the source, or an empty string.
        sites: activations on the path.
        numel: number of elements of the result, before it was expanded.
        direct: the activation of ``base`` whose output the result is, if any.
        product: True if that activation is composed.
        learns: True if a parameter of the model enters the path.
        path: last tensors of the linear part of the path; an activation begins at one of them.
        layer: True if the linear part of the path starts at the output of a layer.
    """

    __slots__ = ("direct", "layer", "learns", "nonlinear", "numel", "path", "product", "sites", "source")

    _LIMIT = 8

    def __init__(
        self,
        source: Tensor | None,
        nonlinear: str,
        sites: tuple[SiteCall, ...],
        numel: int,
        direct: SiteCall | None = None,
        product: bool = False,
        learns: bool = False,
        path: tuple[Tensor, ...] = (),
        layer: bool = False,
    ) -> None:
        self.source = source
        self.nonlinear = nonlinear
        self.sites = sites
        self.numel = numel
        self.direct = direct
        self.product = product
        self.learns = learns
        self.layer = layer
        self.path = path[-self._LIMIT :]

    @property
    def base(self) -> Tensor | None:
        """Last tensor of the linear part of the path: the input of the activation with this value."""
        return self.path[-1] if self.path else self.source


class Origins:
    """The origins of the latest results in one call of a module, and of older values of activations."""

    _LATEST = 64
    _OLDER = 32

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Origin]] = []

    def of(self, x: Tensor) -> Origin:
        """Return the origin of a tensor; the tensor itself if no origin is recorded."""
        for tensor, origin in reversed(self._known):
            if tensor is x:
                return origin
        return Origin(x, "", (), x.numel(), path=(x,))

    def note(self, x: Tensor, origin: Origin) -> None:
        """Record the origin of a result."""
        self._known.append((x, origin))
        if len(self._known) > self._LATEST + self._OLDER:
            without = (i for i, (_, known) in enumerate(self._known[: self._OLDER]) if not known.sites)
            del self._known[next(without, 0)]

    def adopt(self, x: Tensor) -> None:
        """Assign the origin of the latest result to a tensor."""
        if self._known and self._known[-1][0] is not x:
            self.note(x, self._known[-1][1])

    def pass_on(self, outputs: Iterable[Any], to: Origins) -> None:
        """Copy the origins of a module's outputs to those of the calling module."""
        for x in outputs:
            if isinstance(x, Tensor):
                origin = self.of(x)
                if origin.source is not x or origin.layer:
                    to.note(x, origin)


def common_path(origins: list[Origin]) -> tuple[Tensor, ...]:
    """Return the common linear part of the paths of several functions of one tensor."""
    first, *others = [origin.path for origin in origins]
    for end in range(len(first), 0, -1):
        if all(any(x is first[end - 1] for x in path) for path in others):
            return first[:end]
    return ()


def composes(func: Callable[..., Any], origins: list[Origin], parametrised: bool) -> bool:
    """Return True if a call on functions of one tensor forms an activation, or scales a composed one.

    A parameter that scales an activation, as in StarReLU and LayerScale, is a layer of its own.
    """
    if func in CHOICES:
        return len(origins) > 1
    if func in SOFTPLUS:
        return origins[0].nonlinear == "exp"
    if func in SUMS or func in _MIXED_SUMS:
        residual = func in _ADDITIONS and len(origins) == 2 and _is_residual(*origins)
        return len(origins) > 1 and any(origin.nonlinear for origin in origins) and not residual
    if func in POWERS:
        return len(origins) == 1 and origins[0].direct is not None
    if func not in PRODUCTS or not any(origin.nonlinear for origin in origins):
        return False
    if any(origin.nonlinear in _LOGARITHMS for origin in origins):
        return False  # a term of an entropy
    return len(origins) > 1 or (origins[0].product and not parametrised)


def _is_residual(a: Origin, b: Origin) -> bool:
    """Return True if one summand is an activation of the other, which is no activation."""
    straight, nonlinear = (b, a) if a.nonlinear else (a, b)
    return not straight.nonlinear and nonlinear.direct is not None and nonlinear.base is straight.base


def limits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the limits (min, max) of a clamp, or None if the call is no clamp."""
    if func not in _CLAMPS:
        if func in _GREATER and len(args) == 2 and not kwargs and all(isinstance(x, Tensor) for x in args):
            return (0, None) if any(_is_zero(x) for x in args) else None
        return None
    low, high = (*args[1:], None, None)[:2]
    return kwargs.get("min", low), kwargs.get("max", high)


def _is_zero(x: Any) -> bool:
    """Return True if a limit is zero; tensors without a gradient count too."""
    if isinstance(x, Tensor):
        with suppress(RuntimeError):  # a tensor without data, as under vmap
            return not x.requires_grad and not bool(x.any())
        return False
    return x is not None and bool(x == 0)


def rectifies(limits: tuple[Any, Any] | None) -> bool:
    """Return True if a clamp with these limits is a ReLU."""
    return limits is not None and _is_zero(limits[0]) and limits[1] is None


def guarded(func: Callable[..., Any], operands: list[Tensor], origins: list[Origin]) -> list[SiteCall]:
    """Return the clamps that only keep the operand of a root, a logarithm or a division in its domain."""
    if func in _DIVISIONS:
        origins = origins[1:] if len(operands) == 2 else []
    elif func not in _DOMAINS:
        return []
    return [site for origin in origins for site in origin.sites if site.by_hand]


def is_of_parameters(x: Tensor, origin: Origin) -> bool:
    """Return True if a tensor depends on the parameters of the model only, as far as the graph shows."""
    if isinstance(origin.source, nn.Parameter) or isinstance(x._base, nn.Parameter):
        return True
    nodes, seen = [x.grad_fn], {x.grad_fn}
    if x.grad_fn is None:
        return False
    while nodes:
        node: Any = nodes.pop()
        if node.name().startswith("Embedding"):
            return False
        if not node.next_functions and not isinstance(getattr(node, "variable", None), nn.Parameter):
            return False
        for following, _ in node.next_functions:
            if following is None or len(seen) > _PARAMETER_LIMIT:
                return False  # a tensor without a gradient, possibly the input of the model
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return True


def gates(func: Callable[..., Any], factors: list[Origin], product: Tensor) -> list[Origin]:
    """Return the factors that are gates in a product of different tensors: sigmoids and expanded activations."""
    if func in MATRIX_PRODUCTS:
        sigmoids = [factor for factor in factors if any(_is_sigmoid(site) for site in factor.sites)]
        return sigmoids if len(factors) > 1 else []
    whole = [factor.numel >= product.numel() for factor in factors]
    return [
        factor
        for factor, full in zip(factors, whole, strict=True)
        if factor.sites and ((not full and any(whole)) or any(_is_sigmoid(site) for site in factor.sites))
    ]


def _is_sigmoid(site: SiteCall) -> bool:
    return site.function.lower().replace("_", "") in _SIGMOIDS


def constants(func: Callable[..., Any], operands: list[Tensor], origins: list[Origin]) -> list[bool]:
    """Return a mask of the constants: single numbers, parameters, compared zeros, and summands without a gradient.

    A tensor that another operand depends on is no constant, whatever its size.
    """
    compares = func in CHOICES or func in _GREATER or func in NONLINEAR
    shifts = func in SUMS and any(x.requires_grad for x in operands)
    sources = [origin.source for x, origin in zip(operands, origins, strict=True) if origin.source is not x]
    found = [
        (shifts and not x.requires_grad)
        or (
            origin.source is x
            and (isinstance(x, nn.Parameter) or (x.numel() == 1 and x.grad_fn is None) or (compares and _is_zero(x)))
            and not any(x is source for source in sources)
        )
        for x, origin in zip(operands, origins, strict=True)
    ]
    return [False] * len(found) if all(found) else found
