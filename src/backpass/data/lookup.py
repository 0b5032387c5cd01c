"""Labelled images by what a user names with ``--data``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from backpass.data.classes import read_classes
from backpass.data.decode import Decoded
from backpass.data.digits import load_digits
from backpass.data.held_out import HELD_OUT, held_out_rows
from backpass.data.hub import fetch
from backpass.data.images import Images
from backpass.data.names import HUB, DataName, base_name, read_name
from backpass.data.parquet import parquet_files, read_parquet
from backpass.errors import BackpassError, UnknownNameError

__all__ = ["Labelled", "load_data"]

_DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One part of a data set.

    Attributes:
        name: as the user gave it.
        split: name of the part.
        description: one line for reports.
        images: pixels and labels.
        classes: number of classes, also of those without an image here.
        class_names: names by label, or None where the data has none.
        warning: caveat for accuracies on these images, or an empty text.
        folders: whether the classes are folders, numbered in the order of their names.
    """

    name: str
    split: str
    description: str
    images: Images
    classes: int
    class_names: tuple[str, ...] | None = None
    warning: str = ""
    folders: bool = False

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number."""
        names = self.class_names
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    def first(self, count: int | None) -> Labelled:
        """Return the first ``count`` images; all of them for None or a larger number.

        Raises:
            BackpassError: ``count`` is below 1.
        """
        if count is None or count >= len(self.images):
            return self
        if count < 1:
            raise BackpassError(f"the number of images must be at least 1, got {count}.")
        return self.some(slice(count), f"the first {count:,} of them")

    def some(self, rows: Tensor | slice, words: str) -> Labelled:
        """Return the images of some rows; ``words`` are added to the description."""
        chosen = replace(self.images, pixels=self.images.pixels[rows], labels=self.images.labels[rows])
        return replace(self, images=chosen, description=f"{self.description}; {words}")


def load_data(name: str, *, split: str = "test") -> Labelled:
    """Load a data set by name, or from a folder.

    Args:
        name: ``digits``; a data set in the folder that the environment variable BACKPASS_DATA names, such as
            ``mnist`` and ``cifar10``; one of the Hugging Face hub as ``owner/name``, downloaded once (``mnist`` and
            ``cifar10`` too, where BACKPASS_DATA has them not); a folder of Parquet files; or a folder with a folder of
            images for each class. Settings may follow, as in ``uoft-cs/cifar100:label=fine_label``; see `DataName`.
        split: part, for instance ``train`` or ``test``. A folder of classes without parts gives all images for every
            split but ``held-out``, a tenth of every class that `load_parts` keeps out of the training images.

    Returns:
        The images; they are decoded once and then mapped from the cache.

    Raises:
        UnknownNameError: the data set is unknown.
        BackpassError: the data is missing or cannot be read.
    """
    wanted = read_name(name)
    if wanted.name == _DIGITS:
        if wanted != DataName(name=wanted.name):
            raise BackpassError(f"digits has no settings, it is part of scikit-learn; got {name!r}.")
        return _digits(split)
    folder = _folder(wanted.name)
    if folder is None and wanted.repository is not None:
        fetched = fetch(wanted, split)
        decoded, names = read_parquet(fetched.files, image=wanted.image, label=wanted.label)
        return _labelled(name, split, decoded, names, f" of {fetched}")
    if folder is None:
        raise _not_there(wanted.name)
    folders = False
    if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
        decoded, names = read_parquet(parquet_files(folder, split), image=wanted.image, label=wanted.label)
    else:
        decoded, names = read_classes(folder, split)
        folders = True
    whole = replace(_labelled(name, split, decoded, names, ""), folders=folders)
    if split != HELD_OUT:
        return whole
    return whole.some(held_out_rows(decoded.labels, name).nonzero().squeeze(1), "a tenth of each class")


def _folder(name: str) -> Path | None:
    """Find the folder of a data set on this machine: the name itself, or one beneath BACKPASS_DATA."""
    if name not in HUB and Path(name).is_dir():
        return Path(name)
    place = os.environ.get("BACKPASS_DATA")
    inside = not Path(name).is_absolute() and not {".", ".."} & set(name.split("/"))
    if not place or not inside:
        return None
    shorts = [short for short, long in HUB.items() if long == name]
    return next((Path(place) / n for n in (name, *shorts) if (Path(place) / n).is_dir()), None)


def _not_there(name: str) -> BackpassError:
    place = os.environ.get("BACKPASS_DATA")
    if Path(name).name != name:
        return BackpassError(f"there is no folder {name!r}, and no data set has that name.")
    there = [path.name for path in Path(place).iterdir() if path.is_dir()] if place and Path(place).is_dir() else []
    return UnknownNameError("data set (and no folder of that name)", name, {_DIGITS, *HUB, *there})


def _digits(split: str) -> Labelled:
    both = load_digits()
    if split not in ("train", "test"):
        raise UnknownNameError("split of digits", split, ("train", "test"))
    images = both.train if split == "train" else both.test
    return Labelled(
        name=_DIGITS,
        split=split,
        description=f"{both.description}; the {split} part, {len(images):,}",
        images=images,
        classes=both.classes,
    )


def _labelled(name: str, split: str, decoded: Decoded, names: tuple[str, ...] | None, origin: str) -> Labelled:
    count, channels, height, width = decoded.pixels.shape
    kind = " and ".join(decoded.formats)
    warning = ""
    if "JPEG" in decoded.formats:
        warning = "The images are JPEG, which is lossy"
        if base_name(name) == "cifar10":
            warning += ": this CIFAR-10 is a re-encoded copy, so that accuracies on it are not the published ones'"
        warning += "."
    colour = "grey" if channels == 1 else "colour"
    short = Path(read_name(name).name).name
    return Labelled(
        name=name,
        split=split,
        description=f"{short}, {split}: {count:,} {colour} images of {width}x{height} pixels ({kind}){origin}",
        images=Images(pixels=decoded.pixels, labels=decoded.labels),
        classes=max(int(decoded.labels.max()) + 1, len(names or ())),
        class_names=names,
        warning=warning,
    )
