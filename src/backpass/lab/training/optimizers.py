"""Optimizers by name, as the command line and recipes write them: ``sgd:momentum=0.9,weight_decay=5e-4``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number
from backpass.rules.text import read_settings

__all__ = ["OPTIMIZERS", "default_rate", "make_optimizer", "read_named"]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "sgd": SGD,
}
_RATES = {"sgd": 0.01, "adagrad": 0.01}


def default_rate(text: str) -> float:
    """The learning rate where none was given.

    Raises:
        UnknownNameError: there is no such optimizer or setting.
    """
    return _RATES.get(read_named("optimizer", text, OPTIMIZERS)[0], 1e-3)


def make_optimizer(text: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """The optimizer of a text form; its settings are torch's own.

    Raises:
        UnknownNameError: there is no such optimizer or setting.
        BackpassError: a value is out of its range.
    """
    name, settings = read_named("optimizer", text, OPTIMIZERS)
    if not (is_number(lr) and lr > 0):
        raise BackpassError(f"the learning rate, --lr, is a finite number above 0; got {lr!r}.")
    try:
        return OPTIMIZERS[name](parameters, lr=lr, **settings)
    except (TypeError, ValueError) as error:
        raise BackpassError(f"the optimizer {text!r} with --lr {lr:g} cannot be made: {error}.") from error


def read_named(kind: str, text: str, known: dict[str, Callable[..., Any]]) -> tuple[str, dict[str, Any]]:
    """Name and settings of a text form, which a function of that name takes.

    Args:
        kind: of thing, for messages.
        text: ``name`` or ``name:setting=value,...``.
        known: the functions; their settings are the parameters with defaults, but the rate.

    Raises:
        UnknownNameError: there is no such name or setting.
        BackpassError: the text has another form.
    """
    name, settings = read_settings(text)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    parameters = inspect.signature(known[name]).parameters.values()
    names = {p.name for p in parameters if p.default is not p.empty} - {"lr"}
    for setting in settings:
        if setting not in names:
            raise UnknownNameError(f"setting of {kind} {name!r}", setting, names)
    return name, settings
