"""Normalisation of images, the first layer of every network of the lab."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.data.normalisation import Normalisation

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """Normalise images: y = (x - mean) / std for every channel; x, y: (N, C, H, W).

    Mean and std are buffers: the state dict holds the normalisation that the weights were trained with.

    Args:
        channels: C; mean is 0 and std 1 until `use` sets them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def use(self, normalisation: Normalisation) -> None:
        """Set mean and std.

        Raises:
            BackpassError: there is neither one mean and std per channel nor one for all.
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
        """Return the normalised images."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Return mean and std."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
