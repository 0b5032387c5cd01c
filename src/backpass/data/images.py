"""Labelled images as uint8 tensors, seen as floats in [0, 1]."""

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
        white: the pixel value that is 1.0 as a float.
    """

    pixels: Tensor
    labels: Tensor
    white: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def x(self) -> Tensor:
        """The images as floats, (N, C, H, W) in [0, 1]."""
        return self.pixels.float() / self.white

    @property
    def y(self) -> Tensor:
        """The labels, (N,)."""
        return self.labels


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images to learn from, and images held out.

    Attributes:
        description: one line for reports: which data, how many, how split.
        classes: the number of classes.
        train: what a network learns from.
        test: what it never sees while it learns.
    """

    description: str
    classes: int
    train: Images
    test: Images
