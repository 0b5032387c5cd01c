"""Classes of the data and outputs of a network: which label is which output."""

from __future__ import annotations

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from backpass.data.lookup import Labelled
from backpass.errors import BackpassError

__all__ = ["match_classes"]


def match_classes(data: Labelled, file: Path | None, outputs: int, network: str) -> Labelled:
    """Return the data with labels that are outputs of the network.

    Args:
        data: labelled images.
        file: text with one entry a line, or JSON. Whole numbers are the outputs of the data's classes, in their order.
            Words are the names of all outputs, in their order; a line may hold several names of one output, separated
            by tabs or commas, and begin with an identifier, as in ``n01440764 tench``. JSON is a list of either, a
            mapping from class to output, or a mapping from output to a name or a list of names. None: the classes of
            the data are the outputs.
        outputs: number of outputs of the network.
        network: its name, for messages.

    Raises:
        BackpassError: the file cannot be read, or does not give every class its own output.
    """
    names = data.class_names or tuple(map(str, range(data.classes)))
    if file is None:
        if data.folders and outputs != data.classes:
            raise BackpassError(
                f"{network} has {outputs:,} outputs, and {data.name} {data.classes:,} folders of classes, so that "
                "labels would be other outputs: name the outputs with --classes FILE, one a line in their order, or "
                "make an empty folder for every other class."
            )
        return data
    indices = _indices(_read(file), names, file)
    wrong = [f"{name}: {index}" for name, index in zip(names, indices, strict=True) if not 0 <= index < outputs]
    if wrong or len(set(indices)) < len(indices):
        raise BackpassError(
            f"{file} must give every class its own output, 0 to {outputs - 1}; got {', '.join(wrong) or 'one twice'}."
        )
    labels = torch.tensor(indices, dtype=data.images.labels.dtype)[data.images.labels.long()]
    own = dict(zip(indices, names, strict=True))
    every = _all_names(_read(file), outputs)
    return replace(
        data,
        images=replace(data.images, labels=labels),
        classes=outputs,
        class_names=tuple(own.get(index, every[index]) for index in range(outputs)),
    )


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BackpassError(f"{file} must be text in UTF-8: {error}.") from error
    if file.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise BackpassError(f"{file} is no valid JSON: {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [int(line) if line.lstrip("-").isdigit() else line for line in lines]


def _indices(content: Any, names: tuple[str, ...], file: Path) -> list[int]:
    """Return the output of each class."""
    if isinstance(content, list) and content and all(type(one) is int for one in content):
        if len(content) != len(names):
            raise BackpassError(
                f"{file} holds {len(content)} numbers for {len(names)} classes: one for each is needed."
            )
        return content
    if isinstance(content, dict) and content and all(type(one) is int for one in content.values()):
        known = {str(name): index for name, index in content.items()}
    else:
        known = {}
        for index, one in _entries(content, file):
            for alias in _aliases(one):
                known.setdefault(alias, index)
    missing = [name for name in names if name not in known and name.lower() not in known]
    if missing:
        near = get_close_matches(missing[0], known, n=1, cutoff=0.4)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise BackpassError(
            f"{file} does not name {len(missing)} of the data's {len(names)} classes, for instance "
            f"{missing[0]!r}.{guess}"
        )
    return [known[name] if name in known else known[name.lower()] for name in names]


def _entries(content: Any, file: Path) -> list[tuple[int, Any]]:
    if isinstance(content, list) and content:
        return list(enumerate(content))
    if isinstance(content, dict) and content and all(str(key).isdigit() for key in content):
        return [(int(key), one) for key, one in content.items()]
    raise BackpassError(f"{file} must hold a list of classes, or a mapping between classes and outputs; see --help.")


def _aliases(one: Any) -> list[str]:
    """All names of one output, and each in lower case."""
    texts = [str(part) for part in one] if isinstance(one, list) else [str(one)]
    found: list[str] = []
    for text in texts:
        head, _, rest = text.partition(" ")
        parts = [part.strip() for some in (text, rest) for part in some.replace("\t", ",").split(",")]
        found += [text, *parts, head.strip(","), rest.strip()]
        found += [part.replace(" ", "_") for part in (text, *parts, rest.strip())]
    return [name for alias in found if alias for name in (alias, alias.lower())]


def _all_names(content: Any, outputs: int) -> list[str]:
    names = [str(index) for index in range(outputs)]
    if isinstance(content, list) and all(type(one) is int for one in content):
        return names
    pairs = enumerate(content) if isinstance(content, list) else content.items()
    for key, one in pairs:
        if isinstance(one, int):
            key, one = one, key
        if str(key).isdigit() and int(key) < outputs:
            names[int(key)] = str(one[-1] if isinstance(one, list) and one else one)
    return names
