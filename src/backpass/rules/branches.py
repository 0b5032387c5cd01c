"""Skip connections, found in the graph of the call: sums and concatenations of a tensor and of what it is computed to.

Graph nodes are visited from the newest to the oldest. The first node that two operands have in common is the input z of
the block. Each way from an operand to z costs the layers on it, so that the cheaper operand is the skip connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

from torch import Tensor, nn

from backpass.rules import torch_internals

__all__ = ["branch_of_sum", "new_features"]

_LAYER = re.compile(
    "convolution|addmm|mm|bmm|baddbmm|batchnorm|layernorm|groupnorm|rmsnorm|avgpool|maxpool|scaleddotproduct|linear"
)
_ACTIVATION = re.compile(
    "relu|gelu|silu|elu|mish|hardtanh|hardswish|hardsigmoid|sigmoid|tanh|softmax|softplus|threshold|prelu|softshrink"
)
_SKIP_LIMIT = 3
"""Layers on a skip connection, at most: a pooling, a convolution and a normalization."""


def branch_of_sum(a: Tensor, b: Tensor) -> int | None:
    """Return which operand of a + b is the branch of a residual block, or None if the sum ends no block.

    With skip(z) + branch(z), the cheapest way through the skip connection has fewer layers than that through the
    branch, at most three, and no activation.
    """
    if a is b or a.shape != b.shape or not (_is_computed(a) and _is_computed(b)):
        return None
    layers = [0, 0]
    for node, costs in _ancestors([a, b]):
        if len(costs) == 2:
            skip = 0 if (costs[0], layers[0]) <= (costs[1], layers[1]) else 1
            cheaper = (costs[skip], layers[skip]) < (costs[1 - skip], layers[1 - skip])
            return 1 - skip if cheaper and costs[skip] <= _SKIP_LIMIT and layers[1 - skip] else None
        for operand in costs:
            layers[operand] += _is_layer(node)
    return None


def new_features(tensors: Sequence[Tensor]) -> list[int]:
    """Return which of the concatenated tensors are computed from another one of them by at least one layer."""
    indices = [index for index, x in enumerate(tensors) if isinstance(x, Tensor) and x.requires_grad]
    nodes = {index: torch_internals.graph_node(tensors[index]) for index in indices}
    left = len(set(nodes.values()))
    if left < 2:
        return []
    own = set(nodes.values())
    found: set[int] = set()
    for node, costs in _ancestors([tensors[index] for index in indices]):
        if node in own:
            found.update(indices[operand] for operand, cost in costs.items() if cost)
            left -= 1
            if not left:
                break
    return sorted(found)


def _is_computed(x: Tensor) -> bool:
    return x.requires_grad and not isinstance(x, nn.Parameter)


def _ancestors(tensors: Sequence[Tensor]) -> Iterator[tuple[Any, dict[int, int]]]:
    """Yield graph nodes, the newest first, with the layers on the cheapest way from each operand that leads there."""
    costs: dict[Any, dict[int, int]] = {}
    queue: list[tuple[int, int, Any]] = []

    def reach(node: Any, operand: int, cost: int) -> None:
        if node not in costs:
            age = _age(node)
            if age is None:
                return
            costs[node] = {}
            heappush(queue, (age, len(costs), node))
        costs[node][operand] = min(cost, costs[node].get(operand, cost))

    for operand, x in enumerate(tensors):
        reach(torch_internals.graph_node(x), operand, 0)
    while queue:
        node = heappop(queue)[2]
        reached = costs[node]
        yield node, reached
        cost = _cost(node)
        for following, _ in node.next_functions:
            if following is not None:
                for operand, before in reached.items():
                    reach(following, operand, before + cost)


def _age(node: Any) -> int | None:
    """Return a number that is larger for older nodes; None for a parameter."""
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
