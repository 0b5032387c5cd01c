"""Data set of images in the input space of a protocol."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from backpass.data import Labelled
from backpass.lab.protocols import Protocol

__all__ = ["AttackImages"]


class AttackImages(Dataset[tuple[Tensor, int]]):
    """Pairs (image, label); images are converted to floats on access, so that only bytes are kept in memory.

    Args:
        data: the images.
        protocol: protocol that defines the input space.
    """

    def __init__(self, data: Labelled, protocol: Protocol) -> None:
        self.images, self.protocol = data.images, protocol

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images.pixels[index].float() / self.images.white
        return self.protocol.images(pixels), int(self.images.labels[index])
