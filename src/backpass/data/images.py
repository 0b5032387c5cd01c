"""Labelled images as uint8 tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Images", "Split"]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: (N, C, H, W), uint8 in 0..``white``.
        labels: (N,), int64 in 0..classes-1.
        white: pixel value that becomes 1.0.
    """

    pixels: Tensor
    labels: Tensor
    white: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def x(self) -> Tensor:
        """Images as floats, (N, C, H, W) in [0, 1]."""
        return self.pixels.float() / self.white

    @property
    def y(self) -> Tensor:
        """Labels, (N,)."""
        return self.labels


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and test images.

    Attributes:
        description: one line for reports.
        classes: number of classes.
        train: training images.
        test: test images.
    """

    description: str
    classes: int
    train: Images
    test: Images
