"""What Dynamo, the tracer of ``torch.compile``, has to know of our hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

__all__ = ["constant_while_tracing", "guard_module_hooks", "outside_compiled_frames", "show_to_modes"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_while_tracing(function: Function) -> Function:
    """Dynamo runs the function while it traces; the graph takes the answer as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_compiled_frames(function: Function) -> Function:
    """Dynamo may inline the function, but does not compile it as a frame of its own.

    The hooks of a compiled model's outermost module run outside the graph; they push and pop modes, which a frame
    compiled by itself cannot do.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


def guard_module_hooks() -> None:
    """Let compiled code notice that module hooks came or went.

    By default Dynamo does not look at empty hook dictionaries again, so code compiled before a rule was attached, or
    after it was removed, would go on without it. Code compiled under the default is dropped, once in a process.
    """
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo import config, reset

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        reset()


def show_to_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Let Dynamo hand these functions to torch function modes, as eager PyTorch does.

    Its own list lacks some, for instance ``F.tanh``, ``F.hardswish`` and ``torch.relu_``.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.variables.torch import get_overridable_functions

        get_overridable_functions().update(functions)
