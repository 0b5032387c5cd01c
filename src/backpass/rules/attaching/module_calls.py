"""Hooks that start and end an interception and maintain the chain of module calls."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from backpass.rules import torch_internals
from backpass.rules.attaching.interception import Interception
from backpass.rules.torch_internals import keep_out_of_frames

if TYPE_CHECKING:
    from backpass.rules.attaching.attached import Attached

__all__ = ["FUSED", "ModuleCalls", "asks_for_gradients", "pop_interceptions"]

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that take another code path under a mode if gradients are disabled."""

_NOTHING: dict[str, Any] = {}


class ModuleCalls:
    """Pair of hooks of one module in an attached model.

    Args:
        attached: the attached rule.
        path: path of the module.
        activation: True if the module may compute a single activation.
        fused: True if it is one of `FUSED`.
    """

    def __init__(self, attached: Attached, path: str, activation: bool, fused: bool) -> None:
        self.attached = attached
        self.path = path
        self.activation = activation
        self.fused = fused

    @keep_out_of_frames
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] = _NOTHING) -> Any:
        """Forward pre-hook: record the call, and start the interception in the outermost module."""
        mode = self._current()
        if mode is not None and not (is_dynamo_compiling() or self.fused) and self.path and mode.step_into(self.path):
            return None
        if mode is not None and not self.path and not is_dynamo_compiling() and not _calls_itself(module):
            # A previous call was ended by Ctrl-C, after which PyTorch runs no hook.
            pop_interceptions(self.attached)
            mode = None
        if mode is None:
            if self.path and self.attached.is_aside():
                return None
            mode = self.attached.begin(self.path, module, args, kwargs)
            key = self.attached.replayed_key(self.path) if self.path else ""
            known = not (is_dynamo_compiling() or self.path or self.fused) and mode.step_into("")
            changed = None if known else mode.enter(module, self.path, key, args, self.activation)
            torch_internals.push_mode(mode)
        else:
            changed = mode.enter(module, self.path, mode.key_of(self.path), args, self.activation)
        if self.fused and not is_dynamo_compiling() and not asks_for_gradients(module, args, kwargs):
            self.attached.step_aside(mode)
        return changed if changed is None or kwargs is _NOTHING else (changed, kwargs)

    @keep_out_of_frames
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, also called after exceptions: end the call that `enter` recorded."""
        if self.fused and not is_dynamo_compiling():
            self.attached.step_back(self.path)
        mode = self._current()
        # If another pre-hook failed before ours, there is no call of this module to end.
        if mode is None or mode.running[-1].path != self.path:
            return None
        if is_dynamo_compiling():
            changed = self._end(mode, mode.leave(module, mode.running[-1], output))
        elif mode.running[-1].planned is not None and len(mode.running) > 1:
            mode.running.pop()  # fast path
            return None
        else:
            finished = None
            try:
                finished = mode.leave(module, mode.running[-1], output)
            finally:
                failed = finished is None and sys.exception() is not mode.handled
                changed = self._end(mode, finished, failed)
        return None if changed is output else changed

    def _end(self, mode: Interception, output: Any, failed: bool = False) -> Any:
        mode.running.pop()
        if len(mode.running) == 0:
            torch_internals.pop_mode()
            self.attached.end(mode, failed)
        return output

    def _current(self) -> Interception | None:
        attached = self.attached
        depth = torch._C._len_torch_function_stack()
        while depth:
            depth -= 1  # usually the innermost one
            mode = torch._C._get_function_stack_at(depth)
            if isinstance(mode, Interception) and mode.attached is attached:
                return mode
        return None


def _calls_itself(module: nn.Module) -> bool:
    return torch_internals.called_through(module, nn.Module._call_impl.__code__) > 1


def asks_for_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a call of a module computes gradients."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*module.parameters(), *tensors))


def pop_interceptions(attached: Attached | None = None) -> None:
    """Remove the interceptions of an attached rule, or all, from this thread's stack of modes."""
    torch_internals.restore_modes(
        mode
        for mode in torch_internals.function_modes()
        if not (isinstance(mode, Interception) and attached in (None, mode.attached))
    )
