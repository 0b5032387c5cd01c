"""A folder of images by class: one folder per class, named after it."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from backpass.errors import BackpassError
from backpass.lab.data.cache import cached, content_key
from backpass.lab.data.decode import Decoded, Encoded, decode

__all__ = ["read_classes"]

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_SPLITS = ("train", "test", "validation", "val")


def read_classes(folder: Path, split: str) -> tuple[Decoded, tuple[str, ...]]:
    """The PNG and JPEG images in ``folder/SPLIT/CLASS/``, or all in ``folder/CLASS/`` where there are no splits.

    Classes are numbered in the order of their sorted names. Images come in rounds, each class's first one, then each
    class's second, by name: so the first n images, which ``--limit`` takes, are of all classes alike.

    Raises:
        BackpassError: there are fewer than two classes, a class has no image, an image cannot be read, or the part has
            other classes than ``train``: its labels would be other numbers.
    """
    splits = [name for name in _SPLITS if (folder / name).is_dir()]
    if splits and split not in splits:
        has = ", ".join(splits)
        raise BackpassError(f"{folder} has no {split!r}; it has {has}. Choose by --split, in training by --test-split.")
    root = folder / split if splits else folder
    names = _folders(root)
    learned = _folders(folder / "train") if "train" in splits else names
    if names != learned:
        only = [sorted(set(learned) - set(names)), sorted(set(names) - set(learned))]
        raise BackpassError(
            f"the parts of {str(folder)!r} have other classes: only in train {only[0]}, only in {split} {only[1]}. "
            "Classes are numbered by name: each part needs all of them."
        )
    if len(names) < 2:
        raise BackpassError(
            f"{root} holds neither Parquet files nor a folder of images for each class: expected at least two "
            f"folders such as {root / 'cat'} and {root / 'dog'}, got {len(names)}."
        )
    files = {name: sorted(p for p in (root / name).iterdir() if p.suffix.lower() in _SUFFIXES) for name in names}
    for name, paths in files.items():
        if not paths:
            raise BackpassError(f"{root / name} holds no PNG or JPEG image.")
    rounds = zip_longest(*([(path, label) for path in files[name]] for label, name in enumerate(names)))
    everything = [one for several in rounds for one in several if one is not None]
    key = content_key([path for path, _ in everything], ["classes", *(f"{label}" for _, label in everything)])
    images = (Encoded(str(path), path.read_bytes(), label) for path, label in everything)
    return cached(key, lambda: decode(images)), tuple(names)


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
