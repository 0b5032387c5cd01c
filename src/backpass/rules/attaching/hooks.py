"""Module hooks under an identifier of our own.

PyTorch numbers hooks by a running counter, and compiled code guards on the number: attaching a rule again would
compile the model again. The same identifier for the same place lets compiled code serve every time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from torch import nn

from backpass.rules.attaching.dynamo import outside_compiled_frames

__all__ = ["Pair", "free_identifier", "insert", "of", "remove", "swap"]

_PREFIX = "backpass-"

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""The hooks ``enter`` and ``leave`` of one module."""


def free_identifier(model: nn.Module) -> str:
    """The first identifier that no module of the model uses."""
    used = {name for module in model.modules() for name in map(str, module._forward_pre_hooks)}
    return next(name for n in count() if (name := f"{_PREFIX}{n}") not in used)


def of(module: nn.Module) -> list[Any]:
    """Our ``enter`` hooks on this very module, in the order of insertion, without those silenced by `swap`."""
    own = [hook for name, hook in module._forward_pre_hooks.items() if str(name).startswith(_PREFIX)]
    return [hook for hook in own if hook is not _silent]


def insert(
    module: nn.Module, identifier: str, enter: Callable[..., Any], leave: Callable[..., Any], with_kwargs: bool
) -> None:
    """Call ``enter`` last before the forward, and ``leave`` first after it, also after an exception."""
    hooks: Any = module
    hooks._forward_pre_hooks[identifier] = enter
    if with_kwargs:
        hooks._forward_pre_hooks_with_kwargs[identifier] = True
    hooks._forward_hooks[identifier] = leave
    hooks._forward_hooks.move_to_end(identifier, last=False)
    hooks._forward_hooks_always_called[identifier] = True


def remove(module: nn.Module, identifier: str) -> None:
    """Take away what `insert` put there."""
    for hooks in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.pop(identifier, None)  # type: ignore[call-overload]


def swap(module: nn.Module, identifier: str, pair: Pair | None) -> Pair | None:
    """Put other hooks in the place of what `insert` put there, or silence for None; what was there, or None.

    The place among the other hooks stays, and so does the identifier, which nobody else can take meanwhile.
    """
    hooks: Any = module
    if identifier not in hooks._forward_pre_hooks:
        return None
    before = (hooks._forward_pre_hooks[identifier], hooks._forward_hooks[identifier])
    hooks._forward_pre_hooks[identifier], hooks._forward_hooks[identifier] = pair or (_silent, _silent)
    return before


@outside_compiled_frames
def _silent(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""
