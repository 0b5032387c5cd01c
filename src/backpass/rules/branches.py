"""Detection of skip connections in the autograd graph: sums and concatenations of a tensor and a function of it.

Graph nodes are visited from the newest to the oldest. The first node that two operands have in common is the input z of
the block. The cost of a path from an operand to z is its number of layers. The operand with the lower cost is the skip
connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from backpass.rules import torch_internals
from backpass.rules.attaching.run import SiteCall

__all__ = ["SUMS", "block_of_sum", "new_features", "sites_between", "writes_sum"]

_IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__))

SUMS = _IN_PLACE | {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
"""Functions that add two tensors."""

_LAYER = re.compile(
    "convolution|addmm|mm|bmm|baddbmm|batchnorm|layernorm|groupnorm|rmsnorm|avgpool|maxpool|scaleddotproduct|linear"
)
_ACTIVATION = re.compile(
    "relu|gelu|silu|elu|mish|hardtanh|hardswish|hardsigmoid|sigmoid|tanh|softmax|softplus|threshold|prelu|softshrink"
)
_SKIP_LIMIT = 3
"""Maximum number of layers on a skip connection: a pooling, a convolution and a normalization."""


class _Visit:
    """Graph node that is reachable from some operands.

    Attributes:
        costs: lowest number of layers on a path from each operand.
        outputs: outputs of the node at which the paths from each operand arrive.
    """

    def __init__(self) -> None:
        self.costs: dict[int, int] = {}
        self.outputs: dict[int, set[int]] = {}


def writes_sum(func: Any) -> bool:
    """Return True if a sum overwrites its first operand."""
    return func in _IN_PLACE


def block_of_sum(a: Tensor, b: Tensor) -> tuple[int, Any] | None:
    """Return which operand of a + b is the branch of a residual block, and the graph node of the block's input.

    With skip(z) + branch(z), the cheapest path through the skip connection has fewer layers than that
    through the branch, at most three layers, and no activation. None if the sum ends no block.
    """
    if a is b or a.shape != b.shape or not (_is_computed(a) and _is_computed(b)):
        return None
    layers = [0, 0]
    for node, visit in _ancestors([a, b]):
        costs = visit.costs
        if len(costs) == 2:
            skip = 0 if (costs[0], layers[0]) <= (costs[1], layers[1]) else 1
            cheaper = (costs[skip], layers[skip]) < (costs[1 - skip], layers[1 - skip])
            from_one_tensor = visit.outputs[0] & visit.outputs[1]  # not different outputs of a split
            found = cheaper and costs[skip] <= _SKIP_LIMIT and layers[1 - skip] and from_one_tensor
            return (1 - skip, node) if found else None
        for operand in costs:
            layers[operand] += _is_layer(node)
    return None


def sites_between(branch: Tensor, begin: Any) -> list[SiteCall]:
    """Return the sites on the graph paths from the node ``begin`` to a tensor."""
    begins = _age(begin)
    nodes = [get_gradient_edge(branch).node]
    seen, sites = {begin, *nodes}, []
    while nodes:
        node = nodes.pop()
        site = getattr(node, "site", None) if torch_internals.function_class(node) is not None else None
        if isinstance(site, SiteCall):
            sites.append(site)
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            age = _age(following)
            if age is not None and (begins is None or age < begins):
                seen.add(following)
                nodes.append(following)
    return sites


def new_features(tensors: Sequence[Tensor]) -> list[int]:
    """Return the indices of the concatenated tensors that are computed from another one by at least one layer."""
    indices = [index for index, x in enumerate(tensors) if isinstance(x, Tensor) and x.requires_grad]
    edges = [get_gradient_edge(tensors[index]) for index in indices]
    own: dict[Any, set[int]] = {}
    for edge in edges:
        own.setdefault(edge.node, set()).add(edge.output_nr)
    if len(edges) < 2:
        return []
    found: set[int] = set()
    for node, visit in _ancestors([tensors[index] for index in indices]):
        outputs = own.pop(node, None)
        if outputs is not None:
            found.update(i for i, cost in visit.costs.items() if cost and outputs & visit.outputs[i])
            if not own:
                break
    return sorted(indices[i] for i in found)


def _is_computed(x: Tensor) -> bool:
    return x.requires_grad and not isinstance(x, nn.Parameter)


def _ancestors(tensors: Sequence[Tensor]) -> Iterator[tuple[Any, _Visit]]:
    """Yield the graph nodes that the operands are computed from, the newest first."""
    visits: dict[Any, _Visit] = {}
    queue: list[tuple[int, int, Any]] = []

    def reach(node: Any, output: int, operand: int, cost: int) -> None:
        visit = visits.get(node)
        if visit is None:
            age = _age(node)
            if age is None:
                return
            visit = visits[node] = _Visit()
            heappush(queue, (age, len(visits), node))
        visit.costs[operand] = min(cost, visit.costs.get(operand, cost))
        visit.outputs.setdefault(operand, set()).add(output)

    for operand, x in enumerate(tensors):
        edge = get_gradient_edge(x)
        reach(edge.node, edge.output_nr, operand, 0)
    while queue:
        node = heappop(queue)[2]
        visit = visits[node]
        yield node, visit
        cost = _cost(node)
        # A copy into a tensor does not depend on its previous content.
        for following, output in node.next_functions[node.name().endswith("CopyBackwards") :]:
            if following is not None:
                for operand, before in visit.costs.items():
                    reach(following, output, operand, before + cost)


def _age(node: Any) -> int | None:
    """Return a number that is larger for older nodes; None for a leaf."""
    variable = getattr(node, "variable", None)
    if variable is None:
        return -torch_internals.sequence_number(node)
    return None if isinstance(variable, nn.Parameter) else 1


def _is_layer(node: Any) -> bool:
    return bool(_LAYER.match(_name(node)))


def _cost(node: Any) -> int:
    kind = torch_internals.function_class(node)
    if kind is not None:
        return 0 if getattr(kind, "passes_on", False) else _SKIP_LIMIT + 1
    name = _name(node)
    return 1 if _LAYER.match(name) else (_SKIP_LIMIT + 1) * bool(_ACTIVATION.match(name))


def _name(node: Any) -> str:
    name: str = node.name()
    return (
        name.lower().replace("native", "").replace("cudnn", "").replace("adaptive", "").replace("fused", "").lstrip("_")
    )
