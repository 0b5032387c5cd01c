"""Detection of nonlinear operations in the autograd graph of a call that no site of a rule computes.

Every operation of a call is a node of the graph, whatever called it: torch functions, operators of torch, scripted or
compiled code, or custom autograd functions. A node is reported if it computes a nonlinear elementwise function of the
output of a layer. Functions of parameters only, and functions of a reduction, as in a normalization, are not reported;
nor is what enters that reduction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from backpass.rules.torch_internals import function_class, sequence_number

__all__ = ["unexplained"]

_LAYER = re.compile(
    "addmm|addbmm|baddbmm|addmv|mm$|bmm|mv$|linear$|trilinear|embedding|dot$"
    "|.*(conv|batchnorm|layernorm|groupnorm|rmsnorm|attention|backpass)"
)
_RESHAPED = re.compile("(alias|expand|permute|reshapealias|squeeze|t|transpose|unsafeview|unsqueeze|view)$")
_MATRIX_PRODUCT = re.compile("(bmm|mm|mv|dot)$")
_REDUCTION = re.compile(
    "mean|nansum|sum$|var|std|norm|linalgvectornorm|amax|amin|max$|min$|median|logsumexp|prod|.*softmax|.*loss"
)
_NONLINEAR = re.compile(
    "(abs|a?(cos|sin|tan)h?|atan2|bernoulli|ceil|celu|clamp(max|min)?|copysign|digamma|elu|erf(c|inv|cx)?|exp(2|m1)?"
    "|floor|fmax|fmin|fmod|frac|gelu|hardshrink|hardsigmoid|hardswish|hardtanh|hypot|i0e?|i1e?|ldexp|leakyrelu|lgamma"
    "|log(10|1p|2)?|logsigmoid|logaddexp2?|logit|logndtr|maximum|minimum|mish|ndtri|polygamma|pow|prelukernel"
    "|reciprocal|relu|remainder|round|rreluwithnoise|rsqrt|sgn|sigmoid|sign|silu|sinc|softplus|softshrink|sqrt"
    "|threshold|trunc|xlogy|xlog1py)$"
)
_PRODUCT = re.compile("(mul|div)$")
_ELEMENTWISE = re.compile("(add|sub|rsub|mul|div|neg|clone|tocopy|copy|where|maskedfill|lerp|addcmul|addcdiv)$")
_PREFIX = re.compile("^(_|native|cudnn|mkldnn|miopen|adaptive|fused|special|thnn|slow)+")
_WITH_BIAS = frozenset(("addmm", "addbmm", "baddbmm", "addmv"))
_WEIGHTS = frozenset(("exp", "clamp", "clampmin", "clampmax", "maximum", "minimum"))
"""Operations that are not reported if they compute a factor of another value, such as a decay."""

_WIDE = 1e4  # no activation is flat beyond this; the range of float16 ends at 65,504

_HARMLESS = ("torch.nn.", "torch.utils.", "torch.distributed.", "backpass.")
"""Packages whose autograd functions compute no activation that the rule does not know."""

_UNUSED, _FACTOR, _VALUE = range(3)
"""Uses of a value: in a reduction that normalizes, as a factor of another value, or otherwise."""

_Sources = frozenset[tuple[Any, int]]


def unexplained(
    outputs: Iterable[Any], masked: Collection[Any], left_plain: Collection[Any], gates: bool
) -> list[tuple[int, str]]:
    """Return the sequence number of each nonlinear operation that no site computes, and the reason to report it.

    Args:
        outputs: graph nodes of the outputs.
        masked: graph nodes of calls that apply a mask computed from the output of a layer.
        left_plain: graph nodes of sites that are not selected.
        gates: True to report gates, too.
    """
    known: dict[Any, _Operation] = {}
    for node in _reachable(outputs):
        known[node] = _Operation(node, known)
    for node in outputs:
        known[node].use = _VALUE
    found = []
    for one in reversed(known.values()):
        one.pass_use_on()
        reason = one.reason(masked, gates) if one.use and one.sources and one.node not in left_plain else ""
        if reason:
            found.append((sequence_number(one.node), reason))
    return found[::-1]


class _Operation:
    """Operation of the graph, with the origin and the use of its value.

    Attributes:
        node: its graph node.
        kind: class of a custom autograd function, or None.
        name: name in lower case.
        inputs: operations that compute the inputs; None for a constant.
        is_data: True if the value depends on more than parameters.
        origins: sources of each input.
        sources: layers and rearrangements that the value is an elementwise function of; empty for a reduction.
        factors: sources of the factors of a product of different values.
        use: use of the value.
    """

    def __init__(self, node: Any, known: Mapping[Any, _Operation]) -> None:
        self.node, self.kind, self.name = node, function_class(node), _name(node)
        self.use = _UNUSED
        edges = node.next_functions
        if self.kind is not None and self.kind.__module__ == "backpass.rules.kernels":
            edges = edges[:1]  # the input of a site; the rest is its plain value
        elif self.name in _WITH_BIAS or (self.name == "copy" and len(edges) > 1):
            edges = edges[1:]  # without the bias, or what the copy overwrites
        self.inputs = [known.get(one) for one, _ in edges]
        self.origins = [one.sources_of(number) for one, (_, number) in zip(self.inputs, edges, strict=True) if one]
        self.sources: _Sources = frozenset().union(*self.origins)
        self.factors: _Sources = frozenset()
        self.is_data: bool = any(one.is_data for one in self.inputs if one)
        if hasattr(node, "variable"):
            self.is_data = not isinstance(node.variable, nn.Parameter)
        elif self.multiplies_itself:
            self.sources = frozenset()
        elif self.is_layer:
            self.is_data = self.is_data or self.name.startswith("embedding") or self.inputs[0] is None
            self.sources = frozenset([(node, 0)] * self.is_data)
        elif _REDUCTION.match(self.name):
            self.sources = frozenset()
        elif self.sources:
            if self.joins_different or len(self.origins) == 1:
                factors = self.sources if self.joins_different else frozenset()
                self.factors = factors.union(*(one.factors for one in self.inputs if one))
            elementwise = _ELEMENTWISE.match(self.name) or _NONLINEAR.match(self.name) or self.kind is not None
            if self.joins_different or not elementwise:
                self.sources = frozenset([(node, 0)])

    @property
    def is_layer(self) -> bool:
        """True if the value is the output of a layer."""
        return bool(_LAYER.match(self.name))

    @property
    def multiplies_itself(self) -> bool:
        """True for the matrix product of a value with itself, a norm or a Gram matrix."""
        inputs = [one.whole() for one in self.inputs if one]
        return bool(_MATRIX_PRODUCT.match(self.name)) and len(inputs) == 2 and inputs[0] is inputs[1]

    def whole(self) -> _Operation:
        """Return the operation whose value this one only reshapes or transposes."""
        first = self.inputs[0] if self.inputs else None
        return first.whole() if first and _RESHAPED.match(self.name) else self

    @property
    def joins_different(self) -> bool:
        """True for a product of functions of different values."""
        each = self.origins
        return bool(_PRODUCT.match(self.name)) and len(each) == 2 and all(each) and not each[0] & each[1]

    def sources_of(self, number: int) -> _Sources:
        """Return the sources of one of the outputs."""
        return frozenset([(self.node, number)]) if (self.node, 0) in self.sources else self.sources

    def pass_use_on(self) -> None:
        """Record the use of the inputs."""
        inputs = [one for one in self.inputs if one]
        of_layers = [one for one in inputs if one.sources]
        use = self.use
        if self.is_layer:
            use = _FACTOR if sum(one.is_data for one in inputs) > 1 else _VALUE
        elif self.is_data and not self.sources and _NONLINEAR.match(self.name):
            use = _UNUSED  # a function of a reduction
        elif len(inputs) == 2 and self.normalizes(*inputs):
            use = _UNUSED  # a softmax
        elif self.joins_different:
            use = min(use, _FACTOR)
        for one in of_layers or inputs:
            one.use = max(one.use, use)

    def normalizes(self, one: _Operation, other: _Operation) -> bool:
        """Return True if this divides one value by the sum of such values, or multiplies by the reciprocal."""
        if self.name == "mul":
            return any(a.sums(b, inverted=True) for a, b in ((one, other), (other, one)))
        return self.name == "div" and other.sums(one)

    def sums(self, other: _Operation, inverted: bool = False) -> bool:
        """Return True if the value, or its reciprocal, is the reduction of a value like the other, up to a constant."""
        inputs = [one for one in self.inputs if one]
        if len(inputs) != 1:
            return False
        if _REDUCTION.match(self.name):
            return not inverted and (inputs[0].name, inputs[0].sources) == (other.name, other.sources)
        return inputs[0].sums(other, inverted and self.name != "reciprocal")

    @property
    def guards_range(self) -> bool:
        """True for a clamp to the range of a floating-point type."""
        limits = [getattr(self.node, f"_saved_{name}", None) for name in ("min", "max")]
        return self.name == "clamp" and all(isinstance(one, float | int) and abs(one) > _WIDE for one in limits)

    def reason(self, masked: Collection[Any], gates: bool) -> str:
        """Return the reason to report the operation, or an empty string."""
        if self.kind is not None:
            harmless = self.kind.__module__.startswith(_HARMLESS)
            return "" if harmless else f"the autograd function {self.kind.__name__} has its own backward"
        if "jit" in self.node.name().lower():
            return "it calls scripted code"
        if (self.use == _FACTOR and self.name in _WEIGHTS and not gates) or self.guards_range:
            return ""
        of_factors = [
            origin.union(one.factors) for origin, one in zip(self.origins, filter(None, self.inputs), strict=True)
        ]
        of_one = _PRODUCT.match(self.name) and len(of_factors) == 2 and of_factors[0] & of_factors[1]
        inverse = self.name == "div" and self.inputs[0] is None
        gate = gates and self.name == "glu"
        if _NONLINEAR.match(self.name) or of_one or inverse or gate or self.node in masked:
            return f"it calls {self.name} as an activation, or for another purpose"
        return ""


def _reachable(outputs: Iterable[Any]) -> list[Any]:
    """Return the nodes that the outputs depend on, each after those that it depends on itself."""
    nodes = list(dict.fromkeys(outputs))
    seen = set(nodes)
    for node in nodes:
        following = [one for one, _ in node.next_functions if one is not None and one not in seen]
        seen.update(following)
        nodes += dict.fromkeys(following)
    leaves = [node for node in nodes if hasattr(node, "variable")]
    return leaves + sorted((node for node in nodes if not hasattr(node, "variable")), key=sequence_number)


def _name(node: Any) -> str:
    return _PREFIX.sub("", re.sub(r"backwards?\d*$", "", node.name().lower().rpartition("::")[2]))
