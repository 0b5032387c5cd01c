"""Unwrapping of models, and detection of parts that no rule can reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from backpass.errors import BackpassError, NoSiteError

__all__ = ["named_modules", "out_of_reach", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile``, DDP and DataParallel wrappers.

    Raises:
        BackpassError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise BackpassError(f"expected an nn.Module, got {type(model).__name__}: pass the model itself.")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its path in the unwrapped model."""
    for path, module in model.named_modules():
        if unwrap(module) is module:
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module


def out_of_reach(model: nn.Module) -> dict[str, list[str]]:
    """Return the parts of a model without torch function calls in Python, with reasons by module path.

    Raises:
        NoSiteError: the model itself is scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise NoSiteError(
            "the model is scripted (TorchScript), so its operations cannot be reached and it shows no sites: attach "
            "the rule to the model before torch.jit.script or torch.jit.trace."
        )
    found: dict[str, list[str]] = {}
    inside: list[str] = []
    for path, module in named_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            if not any(path.startswith(outer + ".") for outer in inside):
                inside.append(path)
                found[path] = ["the module is scripted"]
            continue
        names = getattr(getattr(type(module), "forward", None), "__code__", None)
        scope = getattr(getattr(type(module), "forward", None), "__globals__", {})
        functions = [(name, scope.get(name)) for name in (names.co_names if names else ())]
        functions += list(vars(module).items())
        scripted = [name for name, one in functions if isinstance(one, torch.jit.ScriptFunction)]
        if scripted:
            found[path] = [f"the function {name} is scripted" for name in scripted]
    return found
