"""Calls in activation checkpointing: which part of the forward pass is computed a second time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from backpass.rules.attaching.run import ModuleCall

__all__ = ["checkpointed_without_gradients"]


def checkpointed_without_gradients(running: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the call whose module a reentrant checkpoint runs without gradients now, to run it again later.

    Args:
        running: the chain of module calls, the outermost first.
    """
    if torch.is_grad_enabled() or not running[0].grad_enabled:
        return None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return next((call for call in running if not call.grad_enabled), None)
    return None
