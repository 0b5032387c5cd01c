"""Networks by what a user names: the lab's, another library's, her own."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import nn

from backpass.data.normalisation import Normalisation
from backpass.errors import BackpassError, UnknownNameError
from backpass.models import INPUT_SHAPES, MODELS, build
from backpass.models.libraries import is_of_a_library, library_network
from backpass.models.shapes import parse_shape

__all__ = ["find", "is_the_labs", "parse_shape"]


def is_the_labs(name: str) -> bool:
    """Return whether a specification is ``NAME`` or ``NAME:option=value,...`` of the lab, not a user's own."""
    head, colon, rest = name.strip().partition(":")
    return not colon or head in MODELS or "=" in rest


def find(
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    classes: int = 10,
    normalisation: Normalisation | None = None,
    seed: int = 0,
) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return a network of the lab, or a user's own as ``module:callable``, with its input's shape where that is known.

    A user's module is imported from Python's path, then from the current folder, so its code runs. The name after the
    colon is an ``nn.Module``, or a function without arguments that returns one.

    Args:
        name: for instance ``mlp``, ``resnet18:activation=silu``, or ``my_package.nets:make_resnet``.
        shape: shape of one image; this and the following are for the lab's networks, see `build`.
        classes: number of logits.
        normalisation: normalisation by the first layer.
        seed: seed of the weights.

    Returns:
        The network, and the shape of one input without the batch axis, or None where it is not known.

    Raises:
        UnknownNameError: the lab, or the user's module, has no network of this name.
        BackpassError: the user's module cannot be imported or gives no ``nn.Module``; or as in `build`.
    """
    head, _, rest = name.strip().partition(":")
    if is_of_a_library(name):
        return library_network(name, pretrained=True)[0], None
    if head not in MODELS and ":" in rest:
        raise BackpassError(
            f"a network of your own takes no settings, got {name!r}: write a function without arguments, such as "
            f"def my_net(): return {rest.partition(':')[0]}(...), and name {head}:my_net."
        )
    if is_the_labs(name):
        model = build(name, shape=shape, classes=classes, normalisation=normalisation, seed=seed)
        return model, shape or INPUT_SHAPES[name.strip().partition(":")[0]]
    path, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file such as jinja2.py in this folder hides no package
    try:
        module = import_module(path)
    except (ImportError, TypeError, ValueError) as error:
        raise BackpassError(
            f"cannot import {path!r} of {name!r}: {error}. It is looked for in {here} and where Python looks, and "
            "named without .py."
        ) from error
    _check_not_hidden(module, path, here)
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


def _check_not_hidden(module: ModuleType, path: str, here: str) -> None:
    """Refuse a module of the current folder that has the name of an installed one, which is imported in its place."""
    mine = Path(here, *path.split("."))
    own = [file.resolve() for file in (mine.with_name(mine.name + ".py"), mine / "__init__.py") if file.is_file()]
    found = getattr(module, "__file__", None)
    if own and (found is None or Path(found).resolve() not in own):
        raise BackpassError(f"{own[0]} has the name of another module, which Python imports ({found}): rename it.")
