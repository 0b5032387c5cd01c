"""Where a call stands in activation checkpointing: which part of the forward pass is computed a second time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from backpass.rules.attaching.interception import ModuleCall

__all__ = ["checkpoint_hooks", "checkpointed_without_gradients"]

_CHECKPOINT = "torch.utils.checkpoint"


def checkpointed_without_gradients(running: Sequence[ModuleCall]) -> ModuleCall | None:
    """The call whose module a reentrant checkpoint runs without gradients just now, to run it again later.

    Args:
        running: the chain of module calls, the outermost first.
    """
    if torch.is_grad_enabled() or not running[0].grad_enabled:
        return None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            return next((call for call in running if not call.grad_enabled), None)
    return None


def checkpoint_hooks() -> Any:
    """The innermost hooks on saved tensors if they are a checkpoint's, each of which has its own; else None."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top[0] if top is not None and top[0].__module__ == _CHECKPOINT else None
