"""A data set's images in the space in which a protocol attacks, one by one."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from backpass.data import Labelled
from backpass.lab.protocols import Protocol

__all__ = ["AttackImages"]


class AttackImages(Dataset[tuple[Tensor, int]]):
    """Pairs (image, label); images become floats when they are asked for, so that only bytes stay in memory.

    Args:
        data: the images.
        protocol: says in which space they are attacked.
    """

    def __init__(self, data: Labelled, protocol: Protocol) -> None:
        self.images, self.protocol = data.images, protocol

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images.pixels[index].float() / self.images.white
        return self.protocol.images(pixels), int(self.images.labels[index])
