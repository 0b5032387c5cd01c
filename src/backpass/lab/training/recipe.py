"""A recipe: everything that a training run is told, by names and numbers, in a TOML file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.files import write_bytes_atomically

__all__ = ["Recipe", "read_recipe", "write_recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training run is told. Text forms are those of the command line.

    Attributes:
        title: for people.
        source: the paper, and the place in it, that the recipe follows.
        note: what a reader must know, for instance where the recipe departs from its source.
        data: the data set's name or folder; its part ``train`` is learned from.
        test_split: the part that the network is judged by.
        model: a lab network or ``module:callable``.
        weights: a file to start from.
        normalize: whether a lab network first normalises images where the data set's mean and spread are known.
        limit: learn from so many images only, always the same.
        augment: how training images are varied, for instance ``crop,flip``.
        rule: rules for the gradients of the weights.
        adversary: the attack that makes the examples to learn from, with its eps, for instance ``pgd:eps=8/255``.
        adversary_rule: the rule for its gradients.
        trades: beta of TRADES.
        warmup: epochs until the adversary's ball has its full size.
        label_smoothing: of the cross-entropy.
        optimizer: for instance ``sgd:momentum=0.9,weight_decay=5e-4``.
        lr: the learning rate.
        scheduler: for instance ``cosine``.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        accumulate: parts in which a step is computed.
        clip: upper limit of the gradient's norm.
        normalize_gradient: whether every gradient gets the norm 1.
        average: averaged weights, as in ``ema:0.999``.
        dtype: ``bfloat16`` or ``float16``, of autocast.
        compile: whether to compile the network.
        robust: the attack that measures robust accuracy on the way, with its eps; ``none`` for none.
        robust_images: on how many test images.
        robust_every: epochs from one measurement to the next.
        stop_overfitting: whether to end a run whose robustness holds against its own adversary alone.
        seed: of initial weights, order, augmentation and adversaries.
    """

    title: str = ""
    source: str = ""
    note: str = ""
    data: str
    test_split: str = "test"
    model: str
    weights: str | None = None
    normalize: bool = True
    limit: int | None = None
    augment: str | None = None
    rule: tuple[str, ...] = ("bp",)
    adversary: str | None = None
    adversary_rule: str | None = None
    trades: float | None = None
    warmup: int = 0
    label_smoothing: float = 0.0
    optimizer: str = "sgd:momentum=0.9"
    lr: float | None = None
    scheduler: str | None = None
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    clip: float | None = None
    normalize_gradient: bool = False
    average: str | None = None
    dtype: str | None = None
    compile: bool = False
    robust: str | None = None
    robust_images: int = 500
    robust_every: int = 1
    stop_overfitting: bool = False
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """A recipe from values by name.

        Args:
            values: in TOML's types; ``rule`` may be one word.
            where: they come from, for messages.

        Raises:
            UnknownNameError: a name means nothing.
            BackpassError: a value has another type, or data or model is missing.
        """
        kinds = get_type_hints(cls)
        for name in values:
            if name not in kinds:
                raise UnknownNameError(f"key of {where}", name, kinds)
        read = {name: _typed(value, kinds[name], f"{name} of {where}") for name, value in values.items()}
        missing = [name for name in ("data", "model") if not read.get(name)]
        if missing:
            raise BackpassError(f"{where} does not say which {' and which '.join(missing)}: both are needed.")
        return cls(**read)

    def with_(self, **values: Any) -> Recipe:
        """The same with other values."""
        return replace(self, **values)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the values of a recipe's file, by name.

    Raises:
        BackpassError: there is no such file, or it is no TOML.
    """
    if not path.is_file():
        raise BackpassError(f"there is no recipe {path}: give a TOML file, for instance one from the folder recipes.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise BackpassError(f'{path} is no TOML file: {error}. Expected lines such as data = "mnist".') from error


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """Write a recipe, with its defaults, so that `read_recipe` and `Recipe.of` give it back; None is left out."""
    lines = [
        f"{field.name} = {_toml(value)}"
        for field in fields(recipe)
        if (value := getattr(recipe, field.name)) is not None and value != ""
    ]
    # A path may hold bytes that are no UTF-8; they are kept as they are.
    return write_bytes_atomically(path, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def _typed(value: Any, kind: Any, what: str) -> Any:
    """The value, in the type that the recipe has for it."""
    allowed = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    if kind == tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not values or not all(isinstance(one, str) for one in values):
            raise BackpassError(f'{what} must be a rule such as "linbp:start=-2", or a list of them; got {value!r}.')
        return tuple(values)
    if value is None and len(get_args(kind)) > 1:
        return None
    (only,) = allowed
    if only is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not only:
        words = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise BackpassError(f"{what} must be {words[only]}, got {value!r}.")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes what TOML wants escaped, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
