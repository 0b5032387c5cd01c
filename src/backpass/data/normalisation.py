"""Normalisation of images: mean and standard deviation by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.data import Images, load_digits
from backpass.data.names import base_name
from backpass.errors import BackpassError
from backpass.wording import listing

__all__ = ["Normalisation", "known_normalisation", "measured_normalisation"]

_PUBLISHED = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


@dataclass(frozen=True)
class Normalisation:
    """Normalisation x -> (x - mean) / std of every channel.

    Attributes:
        mean: one number per channel, or one for all.
        std: likewise, each above 0.

    Raises:
        BackpassError: mean is empty, mean and std have different lengths, or a std is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise BackpassError(
                f"a normalisation needs as many means as stds, every std above 0; got mean {self.mean} and "
                f"std {self.std}."
            )

    def check(self, channels: int) -> None:
        """Check that there is one mean per channel, or one for all.

        Raises:
            BackpassError: there is not.
        """
        if len(self.mean) not in (1, channels):
            raise BackpassError(f"the images have {channels} channels, the normalisation {len(self.mean)}.")

    @property
    def column(self) -> tuple[Tensor, Tensor]:
        """Mean and std as float32 tensors (C, 1, 1)."""
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def __str__(self) -> str:
        return f"mean {listing([f'{m:.4g}' for m in self.mean])}, std {listing([f'{s:.4g}' for s in self.std])}"


def known_normalisation(data: str) -> Normalisation | None:
    """Return the published normalisation of a data set; that of digits is measured on the training images."""
    name = base_name(data)
    if name == "digits":
        return measured_normalisation(load_digits().train)
    return Normalisation(*_PUBLISHED[name]) if name in _PUBLISHED else None


def measured_normalisation(images: Images) -> Normalisation:
    """Return mean and standard deviation of the pixels by channel, rounded to four digits.

    They are computed from counts of pixel values, without a float copy of the images. A constant channel has standard
    deviation 1.
    """
    values = torch.arange(256, dtype=torch.float64) / images.white
    means, stds = [], []
    for channel in images.pixels.unbind(1):
        part = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = float(part @ values)
        means.append(round(mean, 4))
        stds.append(round(float(part @ (values - mean).square()) ** 0.5, 4) or 1.0)
    return Normalisation(tuple(means), tuple(stds))
