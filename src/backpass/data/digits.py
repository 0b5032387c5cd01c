"""Scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

from __future__ import annotations

from importlib.metadata import version

import torch

from backpass.data.images import Images, Split

__all__ = ["load_digits"]


def load_digits() -> Split:
    """Load the digits; a quarter of every class is held out, always the same.

    Returns:
        Images (N, 1, 8, 8), uint8 in 0..16, with ten classes.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = round(0.25 * len(members))
        test.append(members[:held_out])
        train.append(members[held_out:])
    learn, held = torch.cat(train).sort().values, torch.cat(test).sort().values
    return Split(
        description=(
            f"digits of scikit-learn {version('scikit-learn')}: {len(labels):,} real images of 8x8 pixels, "
            f"{len(learn):,} to learn from and {len(held):,} held out (stratified, split seed 0)"
        ),
        classes=10,
        train=Images(pixels=pixels[learn], labels=labels[learn], white=16),
        test=Images(pixels=pixels[held], labels=labels[held], white=16),
    )
