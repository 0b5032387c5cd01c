"""The held-out tenth of folders of images without a training and a test part."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["HELD_OUT", "held_out_rows"]

HELD_OUT = "held-out"
"""Name of the part; training uses the rest."""

_PART = 0.1


def held_out_rows(labels: Tensor, name: str) -> Tensor:
    """Return a mask (N,) of the held-out samples, a tenth of each class of labels (N,), always the same.

    Raises:
        BackpassError: nothing would be left to learn from.
    """
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held[rows[: max(1, round(_PART * len(rows)))]] = True
    if bool(held.all()):
        raise BackpassError(f"{name!r} has one image of each class: nothing is left to learn from.")
    return held
