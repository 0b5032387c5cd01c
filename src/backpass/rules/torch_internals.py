"""Private APIs of torch that the rules rely on; tested with torch 2.9 and 2.13.

They are undocumented and may change in any release of torch. The tests of the rules run on the oldest and the newest
supported release.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

__all__ = [
    "FUNCTION_NODE",
    "bare_apply",
    "body_below_modes",
    "called_through",
    "checkpoint_hooks",
    "constant_while_tracing",
    "custom_functions",
    "dynamo_has_run",
    "eager_without_modes",
    "forward_mode",
    "function_class",
    "function_modes",
    "graph_node",
    "keep_out_of_frames",
    "next_sequence_number",
    "pop_mode",
    "push_mode",
    "restore_modes",
    "saved_tensor_hooks",
    "sequence_number",
    "show_to_modes",
    "transforms",
    "without_tracing",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_CHECKPOINT = "torch.utils.checkpoint"
_GRAPH_LIMIT = 20_000


# --- Torch function modes ---


def function_modes() -> list[Any]:
    """Return this thread's torch function modes, the innermost first."""
    depths = range(torch._C._len_torch_function_stack() - 1, -1, -1)
    return [torch._C._get_function_stack_at(depth) for depth in depths]


def push_mode(mode: Any) -> None:
    """Push a mode as the innermost one; unlike ``with mode:`` this works in a hook."""
    torch._C._push_on_torch_function_stack(mode)


def pop_mode() -> Any:
    """Pop the innermost mode."""
    return torch._C._pop_torch_function_stack()


def restore_modes(modes: Iterable[Any]) -> None:
    """Replace the stack by these modes, the innermost first."""
    while torch._C._len_torch_function_stack():
        pop_mode()
    for mode in reversed(list(modes)):
        push_mode(mode)


def body_below_modes(function: Function) -> Function:
    """Return a copy of one of torch's Python functions whose body runs although a mode is active."""
    original: Any = function
    scope = {**original.__globals__, "has_torch_function": lambda tensors: False}
    copy: Any = FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy  # type: ignore[no-any-return]


# --- Autograd ---

FUNCTION_NODE: type = torch.autograd.function.BackwardCFunction
"""Class of the graph nodes of custom autograd functions."""


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for eager calls, without the support for `torch.func`; ten times as fast."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply  # type: ignore[no-any-return]


def function_class(node: Any) -> type | None:
    """Return the ``torch.autograd.Function`` that made a graph node, or None for an operator of torch.

    `torch.func.vmap` replaces a function by a generated one, which shares the name alone with it.
    """
    kind: type | None = getattr(node, "_forward_cls", None) if isinstance(node, FUNCTION_NODE) else None
    if kind is None or not kind.__name__.startswith("Vmapped"):
        return kind
    name, kinds = kind.__name__.rpartition("Vmapped")[2], [torch.autograd.Function]
    for one in kinds:
        kinds += one.__subclasses__()
    return next((one for one in kinds if one.__name__ == name and one.__module__.startswith("backpass.")), kind)


def custom_functions(output: Any) -> list[type]:
    """Return the custom autograd functions in the graph of an output, except those of this package."""
    nodes = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen, found = set(nodes), []
    while nodes and len(seen) < _GRAPH_LIMIT:
        node = nodes.pop()
        kind = function_class(node)
        if kind is not None and not kind.__module__.startswith("backpass.") and kind not in found:
            found.append(kind)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def graph_node(x: Tensor) -> Any:
    """Return the graph node that receives a tensor's gradient, or None; for a leaf, its accumulation node."""
    return torch.autograd.graph.get_gradient_edge(x).node if x.requires_grad else None


def sequence_number(node: Any) -> int:
    """Return the sequence number of a graph node; nodes that it depends on have smaller ones, except leaves."""
    return int(node._sequence_nr())


next_sequence_number = torch._C._autograd._get_sequence_nr
"""Return the sequence number of the next graph node of this thread."""

saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
"""Return the innermost pair of saved-tensor hooks, or None; called with True."""


def checkpoint_hooks() -> Any:
    """Return the innermost saved-tensor hook if it belongs to a checkpoint (unique per checkpoint), else None."""
    top = saved_tensor_hooks(True)
    return top[0] if top is not None and top[0].__module__ == _CHECKPOINT else None


def transforms() -> bool:
    """Return True if a ``torch.func`` transform is active."""
    return torch._C._are_functorch_transforms_active()


def eager_without_modes() -> bool:
    """Return True in plain eager calls: no tracing, no transform, no mode."""
    return not (is_dynamo_compiling() or transforms() or torch._C._len_torch_function_stack())


def forward_mode() -> bool:
    """Return True if forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def called_through(caller: Any, code: Any) -> int:
    """Count the running calls of a module in this thread by the stack frames of ``code``."""
    frame, running = sys._getframe(1), 0
    while frame.f_back is not None:
        frame = frame.f_back
        running += frame.f_code is code and frame.f_locals.get("self") is caller
    return running


# --- Dynamo, the tracer of torch.compile ---


def dynamo_has_run() -> bool:
    """Return True if this process may hold compiled code."""
    return "torch._dynamo" in sys.modules


def constant_while_tracing(function: Function) -> Function:
    """Make Dynamo call the function while tracing and use its result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def keep_out_of_frames(function: Function) -> Function:
    """Make Dynamo inline the function, but never compile it as a separate frame.

    The hooks of a compiled model's outermost module run outside the graph; they push and pop modes, which a frame
    compiled by itself cannot do.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


def without_tracing(function: Callable[[], Any]) -> Any:
    """Call a function with compilation disabled, including the use of previously compiled code."""
    frames = torch._C._dynamo.eval_frame
    callback = frames.set_eval_frame(None)
    try:
        with torch.compiler.set_stance("force_eager") if dynamo_has_run() else nullcontext():
            return function()
    finally:
        frames.set_eval_frame(callback)


def show_to_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Make Dynamo pass these functions to torch function modes, as eager PyTorch does.

    The list of Dynamo lacks some, for instance ``F.tanh``, ``F.hardswish`` and ``torch.relu_``. Code compiled without a
    mode does not change.
    """
    if dynamo_has_run():
        from torch._dynamo.variables.torch import get_overridable_functions

        get_overridable_functions().update(functions)
