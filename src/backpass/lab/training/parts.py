"""The two parts of a data set: images to learn from, and images held out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.lab.data import Labelled, load_data

__all__ = ["Parts", "load_parts"]

_HELD_OUT = 0.1
_NO_PARTS = "Only training holds them out: for an attack on them alone sort the images into the folders train and test"


class Parts(NamedTuple):
    """Images to learn from, and images to judge by."""

    train: Labelled
    test: Labelled


def load_parts(name: str, *, test_split: str = "test", limit: int | None = None) -> Parts:
    """Both parts of a data set.

    Of a folder that has no parts, only folders of classes, a tenth of every class is held out, always the same.

    Args:
        name: as `load_data` takes it.
        test_split: the part that is held out.
        limit: learn from so many images only, drawn from all, always the same.

    Raises:
        UnknownNameError: there is no such data set or part.
        BackpassError: the parts differ in their classes or the shape of their images, or hold too few of them.
    """
    train, test = load_data(name, split="train"), load_data(name, split=test_split)
    if train.class_names != test.class_names:
        ours, theirs = set(train.class_names or ()), set(test.class_names or ())
        raise BackpassError(
            f"the parts of {name!r} have other classes: only in train {sorted(ours - theirs)}, only in {test_split} "
            f"{sorted(theirs - ours)}. Each part needs a folder of every class."
        )
    shapes = [tuple(part.images.pixels.shape[1:]) for part in (train, test)]
    if shapes[0] != shapes[1]:
        raise BackpassError(f"images of {name!r} have the shape {shapes[0]} in train and {shapes[1]} in {test_split}.")
    if len(train.images) == len(test.images) and torch.equal(train.images.pixels, test.images.pixels):
        train, test = _hold_out(train)
    if limit is not None and limit < len(train.images):
        rows = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:limit]
        train = _some(train, rows, f"{limit:,} of them")
    return Parts(train, test)


def _hold_out(whole: Labelled) -> Parts:
    generator = torch.Generator().manual_seed(0)
    held = []
    for label in torch.unique(whole.images.labels):
        rows = (whole.images.labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held.append(rows[: max(1, round(_HELD_OUT * len(rows)))])
    out = torch.zeros(len(whole.images), dtype=torch.bool)
    out[torch.cat(held)] = True
    if bool(out.all()):
        raise BackpassError(f"{whole.name!r} has one image of each class: nothing is left to learn from.")
    learned, judged = (~out).nonzero().squeeze(1), out.nonzero().squeeze(1)
    return Parts(
        _some(whole, learned, f"the {len(learned):,} to learn from"),
        _some(whole, judged, f"the {len(judged):,} held out, a tenth of each class. {_NO_PARTS}"),
    )


def _some(part: Labelled, rows: Tensor, words: str) -> Labelled:
    images = replace(part.images, pixels=part.images.pixels[rows], labels=part.images.labels[rows])
    return replace(part, images=images, description=f"{part.description}; {words}")
