"""Calling a model once more without a lasting effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from backpass.errors import BackpassError

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Copies of the arguments to call ``model`` with; buffers and random states are put back afterwards.

    Raises:
        BackpassError: the model has lazy modules that were not called yet.
    """
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise BackpassError("the model has lazy modules without a shape: call it once before attaching a rule.")
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {t.device for t in (*model.parameters(), *tensors) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield args, kwargs
    finally:
        for module, name, buffer, saved in before:
            module._buffers[name] = buffer
            # An untouched buffer may be saved for a backward pass that is still to come: writing would spoil it.
            # Its version does not tell: batch norm moves its running statistics without a trace.
            if not torch.equal(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)
