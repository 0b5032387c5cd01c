"""From what a user names on the command line to a network."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.models import INPUT_SHAPES, MODELS, build

__all__ = ["find", "parse_shape"]


def find(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """A network of the lab, or a user's own as ``module:callable``, with its input's shape where that is known.

    A user's module is looked up as Python does, and in the current folder; it is imported, so it runs. The name after
    the colon is a module instance, or is called without arguments and returns one.

    Args:
        name: for instance ``mlp``, or ``my_package.nets:make_resnet``.

    Returns:
        The network, and the shape of one input without the batch axis, or ``None``.

    Raises:
        UnknownNameError: the lab has no network of this name, or the user's module none of that name.
        BackpassError: the user's module cannot be imported, or gives no ``nn.Module``.
    """
    if ":" not in name:
        return build(name), INPUT_SHAPES.get(name)
    path, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(path)
    except (ImportError, ValueError) as error:
        raise BackpassError(f"cannot import {path!r} of {name!r}: {error}.") from error
    if not hasattr(module, attribute):
        own = [n for n, v in vars(module).items() if isinstance(v, nn.Module) or getattr(v, "__module__", "") == path]
        raise UnknownNameError(f"network of module {path!r}", attribute, own)
    found = getattr(module, attribute)
    try:
        model = found if isinstance(found, nn.Module) or not callable(found) else found()
    except TypeError as error:
        raise BackpassError(f"cannot call {name!r} without arguments: {error}.") from error
    if not isinstance(model, nn.Module):
        raise BackpassError(
            f"{name!r} must give an nn.Module, got {type(model).__name__}. Lab networks: {list(MODELS)}."
        )
    return model, None


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape of one input without the batch axis, from ``3x224x224`` or ``3,224,224``.

    Raises:
        BackpassError: the text has another form, or a size is below 1.
    """
    parts = text.lower().replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise BackpassError(f"a shape is positive whole numbers as in 3x224x224 (no batch axis), got {text!r}.")
    return tuple(int(part) for part in parts)
