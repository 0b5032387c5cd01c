"""Text forms of optimizers: ``sgd:momentum=0.9,weight_decay=5e-4``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from backpass.errors import BackpassError
from backpass.numbers import is_number
from backpass.training.schedules import read_named

__all__ = ["OPTIMIZERS", "default_rate", "make_optimizer"]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "sgd": SGD,
}
_RATES = {"sgd": 0.01, "adagrad": 0.01}


def default_rate(text: str) -> float:
    """Return the default learning rate of an optimizer.

    Raises:
        UnknownNameError: there is no such optimizer or setting.
    """
    return _RATES.get(read_named("optimizer", text, OPTIMIZERS)[0], 1e-3)


def make_optimizer(text: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Return the optimizer of a text form; its settings are those of torch.

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
