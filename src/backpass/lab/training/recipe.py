"""Recipe of a training run: all its settings, by names and numbers, in a TOML file or on the command line."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from backpass.errors import BackpassError, UnknownNameError
from backpass.files import write_whole
from backpass.training.settings import Settings
from backpass.training.trainer import Trainer

__all__ = ["Recipe", "described", "kinds", "read_recipe", "write_recipe"]

_DATA = {"panel": "Network and data"}
_OBJECTIVE = {"panel": "Objective and rules"}
_AGAINST = {"panel": "Adversarial training"}


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Settings of a training run by name, for files and the command line; further settings are those of `Trainer`.

    Args:
        title: title of the recipe.
        source: paper, and the place in it, that the recipe follows.
        note: what a reader must know, for instance where the recipe departs from its source.
        data: digits, mnist, cifar10, owner/name of the Hugging Face hub, or a folder; its part train is learned from.
        test_split: part of the data that the network is evaluated on.
        model: network of the lab, as in lenet5 or mlp:widths=400-200, or your own as module:callable.
        weights: file of weights to start from.
        normalize: lab networks normalise images first, where the data set's mean and deviation are known.
        limit: learn from this many images only, always the same.
        augment: variation of training images: crop, crop=2 (pixels of border), flip, or several.
        rule: backward rules for the gradients of the weights, as in linbp:start=-2.
        optimizer: sgd, adam, adamw, adagrad or rmsprop, with torch's settings, as in sgd:momentum=0.9,nesterov=true.
        lr: learning rate; by default 0.01 for sgd and 0.001 for adam.
        label_smoothing: part of the target that is spread evenly over all classes, in [0, 1].
        mixup: alpha of mixup, as in 0.2; 0 is none.
        adversary: attack whose examples are learned from, as in pgd:eps=8/255,steps=10.
        adversary_rule: backward rule for the adversary's gradients.
        trades: beta of TRADES; without it PGD adversarial training.
        warmup: epochs until the adversary's eps has its full size.
        robust: attack that measures robust accuracy after epochs; none for none. With an adversary, PGD of 20 steps.
        robust_images: test images for robust accuracy.
        stop_overfitting: end a run that withstands its own adversary alone.
    """

    title: str = field(default="", metadata={"panel": None})
    source: str = field(default="", metadata={"panel": None})
    note: str = field(default="", metadata={"panel": None})
    data: str = field(metadata=_DATA)
    test_split: str = field(default="test", metadata=_DATA)
    model: str = field(metadata=_DATA)
    weights: str | None = field(default=None, metadata=_DATA)
    normalize: bool = field(default=True, metadata=_DATA)
    limit: int | None = field(default=None, metadata=_DATA)
    augment: str | None = field(default=None, metadata=_DATA)
    rule: tuple[str, ...] = field(default=("bp",), metadata=_OBJECTIVE)
    label_smoothing: float = field(default=0.0, metadata=_OBJECTIVE)
    mixup: float = field(default=0.0, metadata=_OBJECTIVE)
    adversary: str | None = field(default=None, metadata=_AGAINST)
    adversary_rule: str | None = field(default=None, metadata=_AGAINST)
    trades: float | None = field(default=None, metadata=_AGAINST)
    warmup: int = field(default=0, metadata=_AGAINST)
    robust: str | None = field(default=None, metadata=_AGAINST)
    robust_images: int = field(default=500, metadata=_AGAINST)
    stop_overfitting: bool = field(default=False, metadata=_AGAINST)
    optimizer: str = "sgd:momentum=0.9"
    lr: float | None = None
    # Those of the trainer that have another default, or a narrower type, here.
    epochs: int = 1
    batch_size: int = 64
    scheduler: str | None = None
    dtype: str | None = None
    compile: bool = False
    normalize_gradient: str | None = None  # type: ignore[assignment]
    evaluate_at: tuple[int, ...] = ()
    loggers: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Return a recipe from values by name.

        Args:
            values: in TOML's types; a list of one value may be the value.
            where: origin of the values, for messages.

        Raises:
            UnknownNameError: a name is unknown.
            BackpassError: a value has another type or is out of its range, or data or model is missing.
        """
        known = kinds()
        for name in values:
            if name not in known:
                raise UnknownNameError(f"key of {where}", name, known)
        read = {name: _typed(value, known[name], f"{name} of {where}") for name, value in values.items()}
        missing = [name for name in ("data", "model") if not read.get(name)]
        if missing:
            raise BackpassError(f"{where} does not name {' and '.join(missing)}: both data and model are needed.")
        return cls(**read)

    def with_(self, **values: Any) -> Recipe:
        """Return a copy with other values."""
        return replace(self, **values)


def kinds() -> dict[str, tuple[tuple[type, ...], bool]]:
    """Return of each setting the types of its value, by name, and whether it is a list of them.

    Types are those that a TOML file can hold, the same for files and the command line.
    """
    found: dict[str, tuple[tuple[type, ...], bool]] = {}
    for name, hint in get_type_hints(Recipe).items():
        members = [one for one in get_args(hint) or (hint,) if one in (str, int, float, bool)]
        found[name] = (tuple(members), hint in (tuple[str, ...], tuple[int, ...]))
    return found


def described() -> dict[str, str]:
    """Return the description of each setting, from the documentation of `Recipe` and `Trainer`."""
    found: dict[str, str] = {}
    for documented in (Trainer, Recipe):
        text = inspect.getdoc(documented) or ""
        arguments = re.search(r"^Args:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
        for name, words in re.findall(
            r"^    (\w+): ((?:.*)(?:\n        .*)*)", arguments[1] if arguments else "", re.M
        ):
            found[name] = re.sub(r"\s+", " ", words)
    return found


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the values of a recipe's file, by name.

    Raises:
        BackpassError: there is no such file, or it is not TOML.
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
        if (value := getattr(recipe, field.name)) is not None and value not in ("", ())
    ]
    # A path may hold bytes that are no UTF-8; they are kept as they are.
    return write_whole(path, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def _typed(value: Any, kind: tuple[tuple[type, ...], bool], what: str) -> Any:
    """Return the value, in the type that the recipe has for it."""
    members, several = kind
    words = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
    expected = " or ".join(words[one] for one in members)
    if several:
        values = value if isinstance(value, list | tuple) else [value]
        if not values or not all(type(one) in members for one in values):
            raise BackpassError(f"{what} must be {expected}, or a list of these; got {value!r}.")
        return tuple(values)
    if float in members and type(value) is int and int not in members:
        return float(value)
    if value is not None and type(value) not in members:
        raise BackpassError(f"{what} must be {expected}, got {value!r}.")
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
