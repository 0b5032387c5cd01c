"""The first layer of every network of the lab: it takes images in [0, 1] and normalises them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.data.normalisation import Normalisation

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """y = (x - mean) / std for every channel; x, y: (N, C, H, W).

    Mean and std are buffers, hence part of the state dict: weights carry the normalisation they were learned with.

    Args:
        channels: C; until `use` says otherwise mean is 0 and std 1, which changes nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def use(self, normalisation: Normalisation) -> None:
        """Takes another mean and std.

        Raises:
            BackpassError: they are not one per channel, or one for all.
        """
        normalisation.check(len(self.mean))
        mean, std = normalisation.column
        self.mean.copy_(mean)
        self.std.copy_(std)

    @property
    def changes_nothing(self) -> bool:
        """True if mean is 0 and std 1."""
        return not bool(self.mean.any()) and bool((self.std == 1).all())

    def forward(self, x: Tensor) -> Tensor:
        """The images, normalised."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Mean and std, where the model is shown."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
