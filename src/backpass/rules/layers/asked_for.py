"""Which gradients a backward pass was asked for."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_asked_for"]


def is_asked_for(ctx: Any, position: int) -> bool:
    """Whether this backward pass computes the gradient of an argument; ``autograd.grad`` names what it wants.

    Args:
        ctx: of the autograd function whose backward runs.
        position: of the argument, one that needs a gradient.
    """
    if torch.compiler.is_compiling():
        return True
    edges = getattr(ctx, "next_functions", None)
    node = edges[position][0] if edges else None
    if node is None or torch._C._current_graph_task_id() < 0:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True
