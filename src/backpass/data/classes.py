"""A folder of images by class: one folder per class, named after it."""

from __future__ import annotations

import logging
import os
from itertools import zip_longest
from pathlib import Path

from backpass.data.cache import cached, content_key
from backpass.data.decode import Decoded, Encoded, decode
from backpass.errors import BackpassError

__all__ = ["read_classes"]

_LOG = logging.getLogger(__name__)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"}
_OTHER_IMAGES = {
    ".apng", ".avif", ".dcm", ".dib", ".eps", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".mpo", ".npy",
    ".npz", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".xbm", ".xpm",
}  # fmt: skip
_SPLITS = ("train", "test", "validation", "val")


def read_classes(folder: Path, split: str) -> tuple[Decoded, tuple[str, ...]]:
    """Read the images in ``folder/SPLIT/CLASS/`` and the folders below, or in ``folder/CLASS/`` without splits.

    Images are PNG, JPEG, WebP and BMP files. Classes are numbered in the order of their sorted names. Images are
    interleaved, each class's first one, then each class's second, by path: the first n images, which ``--limit``
    takes, are of all classes alike. A class may be empty.

    Raises:
        BackpassError: there are fewer than two classes, no class has an image, an image cannot be read or has another
            format, the folders below the classes look like classes, or the part has other classes than ``train``, so
            that its labels would be other numbers.
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
    beside = [path.name for path in root.iterdir() if path.suffix.lower() in _SUFFIXES | _OTHER_IMAGES]
    if beside:
        _LOG.warning("%s: images beside the folders of classes, of no class: %d (%s)", root, len(beside), _few(beside))
    _check_depth(root, names)
    files = {name: _images(root / name) for name in names}
    empty = [name for name in names if not files[name]]
    if len(empty) == len(names):
        raise BackpassError(f"the folders of classes in {root} hold no PNG, JPEG, WebP or BMP image.")
    if empty:
        _LOG.warning("%s: folders of classes that are empty: %d of %d (%s)", root, len(empty), len(names), _few(empty))
    rounds = zip_longest(*([(path, label) for path in files[name]] for label, name in enumerate(names)))
    everything = [one for several in rounds for one in several if one is not None]
    key = content_key([path for path, _ in everything], ["classes", *(f"{label}" for _, label in everything)])
    images = (Encoded(str(path), path.read_bytes(), label) for path, label in everything)
    # The same names in every locale: bytes that are no UTF-8 stay apart as surrogates.
    return cached(key, lambda: decode(images)), tuple(os.fsencode(n).decode(errors="surrogateescape") for n in names)


def _images(folder: Path) -> list[Path]:
    """Return the images of a class, also in folders below; hidden files and folders are left out."""
    images: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder, set()):
        suffix = path.suffix.lower()
        if suffix in _OTHER_IMAGES:
            raise BackpassError(f"{path} is no PNG, JPEG, WebP or BMP image: convert it, or move it elsewhere.")
        if suffix in _SUFFIXES and not path.is_file():
            raise BackpassError(f"{path} is no regular file.")
        (images if suffix in _SUFFIXES else others).append(path)
    if others:
        _LOG.warning("%s: files that are no images: %d (%s)", folder, len(others), _few([path.name for path in others]))
    return sorted(images, key=os.fsencode)


def _walk(folder: Path, seen: set[str]) -> list[Path]:
    """Return all files below; linked folders are followed, each once."""
    if (real := os.path.realpath(folder)) in seen:
        return []
    seen.add(real)
    inside = [path for path in sorted(folder.iterdir()) if not _hidden(path)]
    return [file for path in inside for file in (_walk(path, seen) if path.is_dir() else [path])]


def _check_depth(root: Path, names: list[str]) -> None:
    """Refuse a folder in which the classes seem to be one level deeper, as in ``training/cat`` and ``testing/cat``."""
    inner = [set(_folders(root / name)) for name in names]
    if all(len(folders) > 1 and folders == inner[0] for folders in inner):
        raise BackpassError(
            f"{root} holds the folders {_few(names)}, and each of them {_few(sorted(inner[0]))}: expected the classes' "
            f"own folders. Name one of them, as in {root / names[0]}, or call them train and test."
        )


def _hidden(path: Path) -> bool:
    """Return whether a name is hidden, or the folder that archives of macOS carry beside the classes."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _folders(root: Path) -> list[str]:
    """Return the names of the folders inside, in an order that no locale changes."""
    names = (path.name for path in root.iterdir() if path.is_dir() and not _hidden(path))
    return sorted(names, key=os.fsencode)
