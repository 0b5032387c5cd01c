"""Scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

from __future__ import annotations

from importlib.metadata import version

import torch

from backpass.data.images import Images, Split
from backpass.errors import BackpassError

__all__ = ["load_digits"]


def load_digits(*, test_fraction: float = 0.25, seed: int = 0) -> Split:
    """Load the digits with a stratified split.

    Args:
        test_fraction: fraction of every class that is held out, in (0, 1).
        seed: seed of the split; the global random state is not touched.

    Returns:
        Images (N, 1, 8, 8), uint8 in 0..16, with ten classes.

    Raises:
        BackpassError: ``test_fraction`` is outside (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise BackpassError(f"test_fraction must lie inside (0, 1), got {test_fraction}.")
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = round(test_fraction * len(members))
        test.append(members[:held_out])
        train.append(members[held_out:])
    learn, held = torch.cat(train).sort().values, torch.cat(test).sort().values
    return Split(
        description=(
            f"digits of scikit-learn {version('scikit-learn')}: {len(labels):,} real images of 8x8 pixels, "
            f"{len(learn):,} to learn from and {len(held):,} held out (stratified, split seed {seed})"
        ),
        classes=10,
        train=Images(pixels=pixels[learn], labels=labels[learn], white=16),
        test=Images(pixels=pixels[held], labels=labels[held], white=16),
    )
