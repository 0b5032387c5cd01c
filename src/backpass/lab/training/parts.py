"""Training and test images of a data set."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from backpass.data import Labelled, load_data
from backpass.data.held_out import HELD_OUT, held_out_rows
from backpass.errors import BackpassError

__all__ = ["Parts", "load_parts"]


class Parts(NamedTuple):
    """Training and test images."""

    train: Labelled
    test: Labelled


def load_parts(name: str, *, test_split: str = "test", limit: int | None = None) -> Parts:
    """Load both parts of a data set.

    In a folder without parts, which has folders of classes only, a fixed tenth of every class is held out; `load_data`
    calls it ``held-out``.

    Args:
        name: name of the data set for `load_data`.
        test_split: split of the test images.
        limit: number of training images, a fixed random choice; None for all.

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
        held = held_out_rows(train.images.labels, name)
        train = train.some((~held).nonzero().squeeze(1), f"the {int((~held).sum()):,} to learn from")
        test = replace(test, split=HELD_OUT).some(held.nonzero().squeeze(1), f"the {int(held.sum()):,} held out")
    if limit is not None and limit < len(train.images):
        rows = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:limit]
        train = train.some(rows, f"{limit:,} of them")
    return Parts(train, test)
