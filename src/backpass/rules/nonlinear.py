"""Detection of nonlinear operations in the autograd graph of a call that no site of a rule computes.

Every operation of a call is a node of the graph, whatever called it: torch functions, operators of torch, scripted or
compiled code, or custom autograd functions. A node is reported if it computes a nonlinear elementwise function of the
output of a layer. Functions of parameters only, and functions of a reduction, as in a normalization, are not reported;
nor is what enters that reduction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from backpass.rules.torch_internals import function_class, sequence_number

__all__ = ["unexplained"]

_LAYER = re.compile(
    "addmm|addbmm|baddbmm|addmv|mm$|bmm|mv$|linear$|trilinear|embedding|dot$"
    "|.*(conv|batchnorm|layernorm|groupnorm|rmsnorm|attention|backpass)"
)
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
_PREFIX = re.compile("_|native|cudnn|mkldnn|miopen|adaptive|fused|special|thnn|slow")
_HARMLESS = ("torch.nn.", "torch.utils.", "torch.distributed.", "backpass.")
"""Packages whose autograd functions compute no activation that the rule does not know."""

_WEIGHTS = frozenset(("exp", "clamp", "clampmin", "clampmax", "maximum", "minimum"))
"""Operations that are not reported if they compute a factor of another value, such as a decay."""

_GATE, _VALUE = 1, 2
"""Uses of a value: as a factor of another value, or otherwise."""

_Sources = frozenset[tuple[Any, int]]


class _Node:
    """Node of the graph, with the origin of its value.

    Attributes:
        node: node of torch.
        name: name of the operation in lower case.
        inputs: nodes of the inputs, with the index of the output that they give; None for a constant.
        is_data: True if the value depends on more than parameters.
        sources: layers and rearrangements that the value is an elementwise function of; empty for a reduction.
        factors: sources of the factors of a product of different values.
        use: use of the value.
    """

    def __init__(self, node: Any, known: dict[Any, _Node]) -> None:
        self.node, self.kind, self.use = node, function_class(node), 0
        self.name = _name(node)
        edges = node.next_functions
        if self.kind is not None and self.kind.__module__ == "backpass.rules.kernels":
            edges = edges[:1]  # the input of a site; the rest is its plain value
        elif self.name in ("copy", "addmm", "addbmm", "baddbmm", "addmv") and len(edges) > 1:
            edges = edges[1:]  # what is overwritten, or a bias
        self.inputs = [(known.get(one), output) for one, output in edges]
        given = [one for one, _ in self.inputs if one is not None]
        self.is_data: bool = any(one.is_data for one in given)
        self.sources = self.factors = frozenset[Any]()
        each = [self._of(one, output) for one, output in self.inputs if one is not None]
        if hasattr(node, "variable"):
            self.is_data = not isinstance(node.variable, nn.Parameter)
        elif _LAYER.match(self.name):
            self.is_data |= self.name.startswith("embedding") or edges[0][0] is None
            self.sources = frozenset([(node, 0)] * self.is_data)
        elif any(each) and not _REDUCTION.match(self.name):
            joined = frozenset().union(*each)
            separate = _PRODUCT.match(self.name) and all(each) and len(each) > 1 and not each[0] & each[1]
            if separate or len(each) == 1:
                self.factors = frozenset().union(joined if separate else (), *(one.factors for one in given))
            keeps = _ELEMENTWISE.match(self.name) or _NONLINEAR.match(self.name) or self.kind is not None
            self.sources = joined if keeps and not separate else frozenset([(node, 0)])

    @staticmethod
    def _of(one: _Node, output: int) -> _Sources:
        return frozenset([(one.node, output)]) if (one.node, 0) in one.sources else one.sources

    def is_layer(self) -> bool:
        return bool(_LAYER.match(self.name))

    def operands(self) -> list[_Node]:
        return [one for one, _ in self.inputs if one is not None]

    def reason(self, masked: Collection[Any]) -> str:
        """Return the reason why the operation may be an activation, or an empty string."""
        if self.kind is not None:
            harmless = self.kind.__module__.startswith(_HARMLESS)
            return "" if harmless else f"the autograd function {self.kind.__name__} has its own backward"
        if "jit" in self.node.name().lower():
            return "it calls scripted code"
        each = [self._of(one, output) | one.factors for one, output in self.inputs if one is not None]
        of_one = _PRODUCT.match(self.name) and len(each) > 1 and each[0] & each[1]
        inverse = self.name == "div" and self.inputs[0][0] is None
        if _NONLINEAR.match(self.name) or of_one or inverse or self.node in masked:
            return f"it calls {self.name} as an activation, or for another purpose"
        return ""

    def pass_on(self) -> None:
        """Record the use of the inputs."""
        operands = self.operands()
        of_layers = [one for one in operands if one.sources]
        use = self.use
        if self.is_layer():
            use = _GATE if len([one for one in operands if one.is_data]) > 1 else _VALUE
        elif not self.use or (self.is_data and not self.sources and _NONLINEAR.match(self.name)):
            return
        elif _PRODUCT.match(self.name) and len(of_layers) > 1 and (self.node, 0) in self.sources:
            use = _GATE
        elif self.name == "div" and len(operands) > 1 and operands[1].sums(operands[0]):
            return  # a softmax
        for one in of_layers or operands:
            one.use = max(one.use, use)

    def sums(self, other: _Node) -> bool:
        """Return True if the value is a reduction of another one, or that and a constant."""
        operands = self.operands()
        return len(operands) == 1 and (operands[0] is other if _REDUCTION.match(self.name) else operands[0].sums(other))


def unexplained(outputs: Iterable[Any], masked: Collection[Any], gates: bool) -> list[tuple[int, str]]:
    """Return the sequence number of each nonlinear operation that no site computes, and the reason to report it.

    Args:
        outputs: graph nodes of the outputs.
        masked: graph nodes of calls that apply a mask computed from the output of a layer.
        gates: True to report exponentials and GLUs that multiply other values.
    """
    roots = list(outputs)
    known: dict[Any, _Node] = {}
    for one in _reachable(roots):
        known[one] = _Node(one, known)
    for root in roots:
        known[root].use = _VALUE
    found = []
    for node in reversed(known.values()):
        node.pass_on()
        if node.sources and (node.use == _VALUE or (node.use and (gates or node.name not in _WEIGHTS))):
            reason = node.reason(masked) or ("it calls glu" if gates and node.name == "glu" else "")
            if reason:
                found.append((sequence_number(node.node), reason))
    return found[::-1]


def _reachable(roots: list[Any]) -> list[Any]:
    """Return the nodes that these depend on, each after those that it depends on itself."""
    nodes, seen = list(roots), set(roots)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    leaves = [one for one in nodes if hasattr(one, "variable")]
    return leaves + sorted((one for one in nodes if not hasattr(one, "variable")), key=sequence_number)


def _name(node: Any) -> str:
    name = re.sub(r"backwards?\d*$", "", node.name().lower().rpartition("::")[2])
    while (short := _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name) != name:
        name = short
    return name
