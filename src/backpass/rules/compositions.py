"""Activations composed of several calls, and gates, recognised from the calls themselves.

``x * gate(x)`` (a hand-written SiLU, GELU, Mish or Hardswish) is one activation of x. An activation whose value
multiplies *another* tensor, as in squeeze-and-excitation, is a gate and no activation. To distinguish them, each result
of an elementwise function remembers the tensor that it is a function of, its `Origin`, while the calling module runs.
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
    "BENT",
    "ELEMENTWISE",
    "JOINS",
    "LAYERS",
    "MATRIX_PRODUCTS",
    "MIXES",
    "POWERS",
    "PRODUCTS",
    "REDUCTIONS",
    "UNNAMED",
    "VIEWS",
    "Origin",
    "Origins",
    "clamps_from_zero",
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
"""Functions that choose between tensors; of functions of one tensor they make another, such as a leaky ReLU."""

BENT = _functions(
    "erf exp exp_ expm1 log1p log sin cos sinh cosh atan asinh "
    "clamp clamp_ clip clip_ clamp_min clamp_max clamp_min_ clamp_max_ gt ge lt le __gt__ __ge__ __lt__ __le__ "
    "heaviside"
)
"""Elementwise functions that make a gate, or an activation, of their input, but are no sites by themselves."""

POWERS = _functions("pow pow_ __pow__ square square_")
"""Functions that make another activation of one, such as the squared ReLU."""

REDUCTIONS = _functions("mean sum norm")
"""Functions by which the square of an activation turns out to be a part of its norm."""

_SMOOTH = POWERS | _functions(
    "add add_ __add__ __radd__ __iadd__ sub sub_ subtract rsub __sub__ __rsub__ __isub__ neg "
    "negative __neg__ abs __abs__ sqrt rsqrt reciprocal clone contiguous to float half bfloat16 double type type_as"
)

ELEMENTWISE = PRODUCTS | CHOICES | BENT | _SMOOTH | _functions("fmax logaddexp")
"""Functions of which each output element depends on the input elements in its place."""

MATRIX_PRODUCTS = _functions("matmul __matmul__ __rmatmul__ bmm einsum")
"""Functions that sum products."""

MIXES = MATRIX_PRODUCTS | _functions("lerp lerp_ addcmul addcmul_")
"""Further functions that multiply tensors, and so may multiply by a gate."""

LAYERS = _functions(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear addmm mm baddbmm "
    "batch_norm layer_norm group_norm instance_norm rms_norm"
)
"""Functions whose value an activation follows."""

JOINS = _functions("cat concat concatenate stack hstack vstack dropout dropout1d dropout2d mean")
"""Functions after which a gate is still one."""

SOFTPLUS = _functions("log log1p")
"""Functions that make a softplus of an exponential."""

UNNAMED = _functions("sin cos sinh cosh atan asinh erf expm1")
"""Functions that are activations of a layer's value, of which the package does not know more, but for a composition."""

_GREATER = _functions("maximum max fmax logaddexp")
_CLAMPS = _functions("clamp clamp_ clip clip_ clamp_min clamp_min_")
_DOMAINS = _functions("sqrt rsqrt log log1p log2 log10 reciprocal")
_DIVISIONS = _functions("div div_ divide true_divide __truediv__ __itruediv__ __rtruediv__")

VIEWS = frozenset((F.interpolate, F.upsample)) | _functions(
    "view reshape expand expand_as unsqueeze squeeze flatten unflatten permute transpose __getitem__ chunk split "
    "unbind movedim t repeat tile broadcast_to view_as reshape_as narrow select pad constant_pad_nd"
)
"""Functions that arrange the same elements anew, resample them, or pad them."""

_PARAMETER_LIMIT = 32
_SIGMOIDS = frozenset(("sigmoid", "hardsigmoid", "hsigmoid", "expit"))
_QUERIES = frozenset(
    ("__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__")
)


def is_query(func: Callable[..., Any]) -> bool:
    """Return whether a function only asks a tensor for a property."""
    return getattr(func, "__name__", "") in _QUERIES


class Origin:
    """The tensor that a result is an elementwise function of.

    Attributes:
        source: that tensor; None for an arrangement of its elements.
        bent: name of the last function on the way that is not linear, or an empty string.
        sites: activations on the way.
        numel: number of elements of the result, before it was expanded.
        direct: the activation of ``base`` whose value the result is, if it is one.
        product: whether that activation is composed.
        learns: whether a parameter of the model is on the way.
        path: the last tensors on the way before it bends; an activation begins at one of them.
        layer: whether it is the value of a layer, before it bends.
    """

    __slots__ = ("bent", "direct", "layer", "learns", "numel", "path", "product", "sites", "source")

    _LIMIT = 8

    def __init__(
        self,
        source: Tensor | None,
        bent: str,
        sites: tuple[SiteCall, ...],
        numel: int,
        direct: SiteCall | None = None,
        product: bool = False,
        learns: bool = False,
        path: tuple[Tensor, ...] = (),
        layer: bool = False,
    ) -> None:
        self.source = source
        self.bent = bent
        self.sites = sites
        self.numel = numel
        self.direct = direct
        self.product = product
        self.learns = learns
        self.layer = layer
        self.path = path[-self._LIMIT :]

    @property
    def base(self) -> Tensor | None:
        """The last tensor on the way before it bends: the input of an activation of this value."""
        return self.path[-1] if self.path else self.source


class Origins:
    """The origins of the latest results in one call of a module, and of older values of activations."""

    _LATEST = 64
    _OLDER = 32

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Origin]] = []

    def of(self, x: Tensor) -> Origin:
        """Return the origin of a tensor, which is the tensor itself where it is not known."""
        for tensor, origin in reversed(self._known):
            if tensor is x:
                return origin
        return Origin(x, "", (), x.numel(), path=(x,))

    def note(self, x: Tensor, origin: Origin) -> None:
        """Remember the origin of a result."""
        self._known.append((x, origin))
        if len(self._known) > self._LATEST + self._OLDER:
            without = (i for i, (_, known) in enumerate(self._known[: self._OLDER]) if not known.sites)
            del self._known[next(without, 0)]

    def adopt(self, x: Tensor) -> None:
        """Give a tensor the origin of the latest result."""
        if self._known and self._known[-1][0] is not x:
            self.note(x, self._known[-1][1])

    def pass_on(self, outputs: Iterable[Any], to: Origins) -> None:
        """Tell the calling module the origins of what a module returns."""
        for x in outputs:
            if isinstance(x, Tensor):
                origin = self.of(x)
                if origin.source is not x or origin.layer:
                    to.note(x, origin)


def common_path(origins: list[Origin]) -> tuple[Tensor, ...]:
    """Return the way, before it bends, that several functions of one tensor have in common."""
    first, *others = [origin.path for origin in origins]
    for end in range(len(first), 0, -1):
        if all(any(x is first[end - 1] for x in path) for path in others):
            return first[:end]
    return ()


def composes(func: Callable[..., Any], origins: list[Origin], parametrised: bool) -> bool:
    """Return whether a call on functions of one tensor makes an activation of it, or scales one that was made so.

    A parameter that scales an activation, as in StarReLU and LayerScale, is a layer of its own.
    """
    if func in CHOICES:
        return len(origins) > 1
    if func in SOFTPLUS:
        return origins[0].bent == "exp"
    if func in POWERS:
        return len(origins) == 1 and origins[0].direct is not None
    if func not in PRODUCTS or not any(origin.bent for origin in origins):
        return False
    return len(origins) > 1 or (origins[0].product and not parametrised)


def limits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the limits between which a call clamps its tensor, or None if it does not clamp."""
    if func not in _CLAMPS:
        if func in _GREATER and len(args) == 2 and not kwargs and all(isinstance(x, Tensor) for x in args):
            return (0, None) if any(_is_zero(x) for x in args) else None
        return None
    low, high = (*args[1:], None, None)[:2]
    return kwargs.get("min", low), kwargs.get("max", high)


def _is_zero(x: Any) -> bool:
    """Return whether a limit is zero; tensors without a gradient count too."""
    if isinstance(x, Tensor):
        with suppress(RuntimeError):  # a tensor without a value, as vmap maps
            return not x.requires_grad and not bool(x.any())
        return False
    return x is not None and bool(x == 0)


def rectifies(limits: tuple[Any, Any] | None) -> bool:
    """Return whether a clamp between these limits is a ReLU."""
    return limits is not None and _is_zero(limits[0]) and limits[1] is None


def clamps_from_zero(limits: tuple[Any, Any] | None) -> bool:
    """Return whether a clamp between these limits may be a ReLU with an upper limit, or that of a pixel."""
    return limits is not None and _is_zero(limits[0]) and limits[1] is not None


def guarded(func: Callable[..., Any], operands: list[Tensor], origins: list[Origin]) -> list[SiteCall]:
    """Return the clamps that only keep the operand of a root, a logarithm or a division in its domain."""
    if func in _DIVISIONS:
        origins = origins[1:] if len(operands) == 2 else []
    elif func not in _DOMAINS:
        return []
    return [site for origin in origins for site in origin.sites if site.by_hand]


def is_of_parameters(x: Tensor, origin: Origin) -> bool:
    """Return whether a tensor is a function of the model's parameters alone, as far as it shows."""
    if isinstance(origin.source, nn.Parameter) or isinstance(x._base, nn.Parameter):
        return True
    nodes, seen = [x.grad_fn], {x.grad_fn}
    if x.grad_fn is None:
        return False
    while nodes:
        node: Any = nodes.pop()
        if not node.next_functions and not isinstance(getattr(node, "variable", None), nn.Parameter):
            return False
        for following, _ in node.next_functions:
            if following is None or len(seen) > _PARAMETER_LIMIT:
                return False  # a tensor without a gradient, as the model's input may be
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return True


def gates(func: Callable[..., Any], factors: list[Origin], product: Tensor) -> list[Origin]:
    """Return the factors that gate a product of different tensors: sigmoids, and activations that are expanded."""
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
    """Return which operands only parametrise a function of another: single numbers, and the model's own parameters.

    So do zeros that a function compares with.

    A tensor that another operand is a function of is no constant, whatever its size.
    """
    choice = func in CHOICES or func in _GREATER
    sources = [origin.source for x, origin in zip(operands, origins, strict=True) if origin.source is not x]
    found = [
        origin.source is x
        and (isinstance(x, nn.Parameter) or (x.numel() == 1 and x.grad_fn is None) or (choice and _is_zero(x)))
        and not any(x is source for source in sources)
        for x, origin in zip(operands, origins, strict=True)
    ]
    return [False] * len(found) if all(found) else found
