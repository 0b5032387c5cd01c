"""Description of a run in JSON types, which detects checkpoints of another run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["describe", "describe_model", "describe_optimizer", "differences"]


def describe(value: Any) -> Any:
    """Describe a value in JSON types: functions and classes by name, tensors by a hash."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"{value.dtype} {tuple(value.shape)} {digest.hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): describe(one) for key, one in value.items()}
    if isinstance(value, nn.Module):
        return describe_model(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, Sequence | set | frozenset):
        return [describe(one) for one in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type) or (isinstance(value, Callable) and hasattr(value, "__qualname__")):  # type: ignore[arg-type]
        owner = getattr(value, "__objclass__", value)  # a method of a C class has only its class
        return f"{owner.__module__}.{value.__qualname__}"
    state = getattr(value, "__dict__", {})
    public = {name: describe(one) for name, one in state.items() if isinstance(one, bool | int | float | str | Tensor)}
    return {"type": type(value).__qualname__, **public}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe a model by its class, its text form, and names, shapes and dtypes of its weights and buffers."""
    tensors = {
        name: f"{one.dtype} {tuple(one.shape)}" for name, one in model.state_dict().items() if torch.is_tensor(one)
    }
    words = f"{model!r} {tensors}"
    return {"type": type(model).__qualname__, "sha256": hashlib.sha256(words.encode()).hexdigest()[:16]}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer by its class and the settings of its groups; a scheduled rate by its first value."""
    groups = []
    for group in optimizer.param_groups:
        settings = {name: describe(value) for name, value in group.items() if name not in ("params", "initial_lr")}
        settings["lr"] = describe(group.get("initial_lr", group["lr"]))
        groups.append({**settings, "tensors": len(group["params"])})
    return {"type": type(optimizer).__qualname__, "groups": groups}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return the differences of two descriptions, each as ``name: was a, is b``."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [
            one
            for name in names
            for one in differences(before.get(name), now.get(name), f"{path}.{name}" if path else str(name))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            one
            for place, (a, b) in enumerate(zip(before, now, strict=True))
            for one in differences(a, b, f"{path}[{place}]")
        ]
    return [] if before == now else [f"{path}: was {before!r}, is {now!r}"]
