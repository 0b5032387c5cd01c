"""Seeing through what is wrapped around a model, and what cannot be seen into."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from backpass.errors import BackpassError, NoSiteError

__all__ = ["named_modules", "refuse_scripted", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, DDP and DataParallel wrappers.

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
    """Every module with its path in the user's model, wrappers left out."""
    for path, module in model.named_modules():
        if unwrap(module) is module:
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module


def refuse_scripted(model: nn.Module) -> None:
    """Scripted code calls no torch function that Python could see.

    Raises:
        NoSiteError: a module is scripted.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"its module {path!r}" if path else "the model"
            raise NoSiteError(
                f"{where} is scripted (TorchScript), so its operations cannot be reached and it shows no sites: "
                "attach the rule to the model before torch.jit.script or torch.jit.trace."
            )
