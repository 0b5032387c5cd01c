"""From what a user names with ``--data`` to labelled images."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.data.classes import read_classes
from backpass.lab.data.decode import Decoded
from backpass.lab.data.digits import load_digits
from backpass.lab.data.images import Images
from backpass.lab.data.parquet import parquet_files, read_parquet

__all__ = ["Labelled", "load_data"]

_DIGITS = "digits"
_PUBLISHED = {"mnist", "cifar10"}


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One part of a data set.

    Attributes:
        name: as it was asked for.
        split: which part.
        description: one line for reports.
        images: pixels and labels.
        classes: how many there are, whether or not these images have them all.
        class_names: by label, or ``None`` where the data does not say.
        warning: what a reader of numbers measured on these images must know, or nothing.
    """

    name: str
    split: str
    description: str
    images: Images
    classes: int
    class_names: tuple[str, ...] | None = None
    warning: str = ""

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        names = self.class_names
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    def first(self, count: int | None) -> Labelled:
        """The first ``count`` images; all where it is ``None`` or larger than what there is.

        Raises:
            BackpassError: ``count`` is below 1.
        """
        if count is None or count >= len(self.images):
            return self
        if count < 1:
            raise BackpassError(f"the number of images must be at least 1, got {count}.")
        some = replace(self.images, pixels=self.images.pixels[:count], labels=self.images.labels[:count])
        return replace(self, images=some, description=f"{self.description}; the first {count:,} of them")


def load_data(name: str, *, split: str = "test") -> Labelled:
    """A data set by name, or from a folder.

    Args:
        name: ``digits``; a data set in the folder that the environment variable BACKPASS_DATA names, such as
            ``mnist`` and ``cifar10``; a folder of Parquet files; or a folder with a folder of images for each class.
        split: the part, for instance ``train`` or ``test``.

    Raises:
        UnknownNameError: there is no data set of this name.
        BackpassError: the data is not where it should be, or cannot be read.
    """
    if name == _DIGITS:
        return _digits(split)
    folder = _beneath_backpass_data(name) if name in _PUBLISHED or not Path(name).is_dir() else Path(name)
    if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
        decoded, names = read_parquet(parquet_files(folder, split))
    else:
        decoded, names = read_classes(folder, split)
    return _labelled(name, split, decoded, names)


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


def _beneath_backpass_data(name: str) -> Path:
    place = os.environ.get("BACKPASS_DATA")
    plain = Path(name).name == name and name not in (".", "..")
    if place is not None and plain and (Path(place) / name).is_dir():
        return Path(place) / name
    if name in _PUBLISHED:
        looked = f"there is no {Path(place) / name}" if place else "the environment variable BACKPASS_DATA is not set"
        raise BackpassError(
            f"cannot find {name!r}: {looked}. Set BACKPASS_DATA to a folder that holds {name}/train-*.parquet and "
            f"{name}/test-*.parquet as they are on the Hugging Face hub, or give the folder itself."
        )
    if not plain:
        raise BackpassError(f"there is no folder {name!r}, and no data set has that name.")
    there = [path.name for path in Path(place).iterdir() if path.is_dir()] if place and Path(place).is_dir() else []
    raise UnknownNameError("data set (and no folder of that name)", name, {_DIGITS, *_PUBLISHED, *there})


def _labelled(name: str, split: str, decoded: Decoded, names: tuple[str, ...] | None) -> Labelled:
    count, channels, height, width = decoded.pixels.shape
    kind = " and ".join(decoded.formats)
    warning = ""
    if "JPEG" in decoded.formats:
        warning = "The images are JPEG, which is lossy"
        if name == "cifar10":
            warning += ": this CIFAR-10 is a re-encoded copy, so that accuracies on it are not the published ones'"
        warning += "."
    colour = "grey" if channels == 1 else "colour"
    return Labelled(
        name=name,
        split=split,
        description=f"{Path(name).name}, {split}: {count:,} {colour} images of {width}x{height} pixels ({kind})",
        images=Images(pixels=decoded.pixels, labels=decoded.labels),
        classes=max(int(decoded.labels.max()) + 1, len(names or ())),
        class_names=names,
        warning=warning,
    )
