"""Module hooks under a stable identifier.

PyTorch numbers hooks by a running counter, and compiled code guards on the number: re-attaching a rule would recompile
the model. A stable identifier lets compiled code be reused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from torch import nn

from backpass.rules import torch_internals
from backpass.rules.torch_internals import keep_out_of_frames

__all__ = ["Pair", "free_identifier", "insert", "of", "remove", "swap"]

_PREFIX = "backpass-"

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""Hooks (``enter``, ``leave``) of one module."""


def free_identifier(model: nn.Module) -> str:
    """Return the first identifier that no module of the model uses."""
    used = {name for module in model.modules() for name in map(str, module._forward_pre_hooks)}
    return next(name for n in count() if (name := f"{_PREFIX}{n}") not in used)


def of(module: nn.Module) -> list[Any]:
    """Return the active ``enter`` hooks of this module, in the order of insertion."""
    own = [hook for name, hook in module._forward_pre_hooks.items() if str(name).startswith(_PREFIX)]
    return [hook for hook in own if hook is not _disabled]


class _Marked(dict[str, Any]):
    """Type of a module's member tables while hooks are attached.

    Compiled code has no guard on hook tables that were empty at compile time, but it guards on the types of these
    tables. Changing the type forces a recompilation, for this module only.
    """


def _mark(module: nn.Module, kind: type[dict[str, Any]]) -> None:
    for name in ("_modules", "_parameters"):
        table = vars(module).get(name)
        if table is not None and type(table) in (dict, _Marked) and type(table) is not kind:
            vars(module)[name] = kind(table)


def insert(
    module: nn.Module, identifier: str, enter: Callable[..., Any], leave: Callable[..., Any], with_kwargs: bool
) -> None:
    """Insert ``enter`` as the last pre-hook and ``leave`` as the first forward hook, called after exceptions too."""
    hooks: Any = module
    hooks._forward_pre_hooks[identifier] = enter
    if with_kwargs:
        hooks._forward_pre_hooks_with_kwargs[identifier] = True
    hooks._forward_hooks[identifier] = leave
    hooks._forward_hooks.move_to_end(identifier, last=False)
    hooks._forward_hooks_always_called[identifier] = True
    if torch_internals.dynamo_has_run():
        _mark(module, _Marked)


def remove(module: nn.Module, identifier: str) -> None:
    """Remove the hooks that `insert` added."""
    for hooks in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.pop(identifier, None)  # type: ignore[call-overload]
    if not any(str(name).startswith(_PREFIX) for name in module._forward_pre_hooks):
        _mark(module, dict)


def swap(module: nn.Module, identifier: str, pair: Pair | None) -> Pair | None:
    """Replace the hooks that `insert` added by others, or disable them (None), and return the previous ones or None.

    Their position among other hooks and their identifier are kept.
    """
    hooks: Any = module
    if identifier not in hooks._forward_pre_hooks:
        return None
    before = (hooks._forward_pre_hooks[identifier], hooks._forward_hooks[identifier])
    hooks._forward_pre_hooks[identifier], hooks._forward_hooks[identifier] = pair or (_disabled, _disabled)
    return before


@keep_out_of_frames
def _disabled(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
