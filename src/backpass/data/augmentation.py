"""Augmentation: random crops and mirror images, the same for a sample and an epoch however samples are batched.

The draws of a sample are bits of one 64-bit hash of (seed, index, epoch), the finaliser of splitmix64 after each word;
the arithmetic is that of wrapping 64-bit integers, hence the same on every device, and no generator has a state to
disturb. Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_whole_text

if TYPE_CHECKING:
    from backpass.training.batches import Batch

__all__ = ["Augmentation", "draw"]

_PURPOSE = 0x6175676D656E7421  # of these draws, so that they are not those of another use of the same words


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """y = crop(pad(x, crop), size of x), then mirrored with probability 1/2; and from uint8 to [0, 1].

    Offsets are uniform in 0..2 * crop, rows and columns apart; the border is 0, that is black. The draws depend on the
    batch's seed and epoch and on the sample's index alone, not on the batch, its order, or the number of processes.

    Args:
        crop: pixels of border on every side; 0 leaves images where they are.
        flip: whether half of the images are mirrored.
        white: the uint8 value that becomes 1.0; images that are floats already keep their values.

    Raises:
        BackpassError: ``crop`` is below 0, or ``white`` below 1.

    Source: the usual augmentation of CIFAR-10, after He et al., Deep residual learning (CVPR 2016), Section 4.2.
    """

    crop: int = 4
    flip: bool = True
    white: int = 255

    def __post_init__(self) -> None:
        if self.crop < 0 or self.white < 1:
            raise BackpassError(f"crop must be at least 0 and white at least 1, got {self.crop} and {self.white}.")

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """``crop``, ``crop=2`` and ``flip``, with commas between; without words, images stay as they are.

        Raises:
            UnknownNameError: a word is another.
            BackpassError: a word has no such value.
        """
        crop, flip = 0, False
        for part in filter(None, text.replace(" ", "").split(",")):
            name, equals, value = part.partition("=")
            if name not in ("crop", "flip"):
                raise UnknownNameError("augmentation", name, ("crop", "flip"))
            if equals and (name == "flip" or not is_whole_text(value)):
                raise BackpassError(
                    f"cannot read {part!r}: augment is crop, crop=2 (pixels of border), flip, or several."
                )
            flip = flip or name == "flip"
            crop = (int(value) if equals else 4) if name == "crop" else crop
        return cls(crop=crop, flip=flip)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """The images of a batch, augmented on their device.

        Args:
            x: (B, C, H, W), uint8 or float.
            batch: whose ``index`` (B,), ``epoch`` and ``seed`` name the draws.

        Returns:
            (B, C, H, W), float.

        Raises:
            BackpassError: x has another shape.
        """
        if x.ndim != 4 or len(batch.index) != len(x):
            raise BackpassError(
                f"augmentation takes images (B, C, H, W) with as many indices, got x of shape {tuple(x.shape)} and "
                f"{len(batch.index)} indices."
            )
        if self.crop or self.flip:
            rows, columns, mirrored = draw(batch.seed, batch.index.to(x.device), batch.epoch, 2 * self.crop + 1)
            x = _crop(x, self.crop, rows, columns, mirrored if self.flip else torch.zeros_like(mirrored))
        if x.dtype == torch.uint8:
            return x.to(torch.get_default_dtype()).div_(self.white)
        return x


def draw(seed: int, index: Tensor, epoch: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform draws of samples: two whole numbers below ``places``, and a coin.

    Args:
        seed: any integer.
        index: (B,) int64, of the samples.
        epoch: any integer.
        places: at least 1; a number's probability is off by less than 2**-31.

    Returns:
        (B,) int64, (B,) int64, (B,) bool.
    """
    key = torch.zeros_like(index)
    for word in (_PURPOSE, seed, index, epoch):
        key = _mix(key.add_(word if isinstance(word, Tensor) else _signed(word)).add_(_GAMMA))
    low, high = (key & _MASK_31) * places >> 31, ((key >> 31) & _MASK_31) * places >> 31
    return low, high, key < 0


def _crop(x: Tensor, border: int, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
    """``x`` shifted by rows and columns inside its zero border, and mirrored: one gather for the whole batch."""
    count, channels, height, width = x.shape
    down, right = (torch.arange(side, device=x.device) for side in (height, width))
    row = rows[:, None] + down
    column = columns[:, None] + torch.where(mirrored[:, None], width - 1 - right, right)
    place = (row[:, :, None] * (width + 2 * border) + column[:, None, :]).view(count, 1, -1)
    padded = F.pad(x, (border,) * 4).flatten(2)
    return padded.gather(2, place.expand(-1, channels, -1)).view(x.shape)


def _signed(word: int) -> int:
    """The integer in [-2**63, 2**63) equal to `word` modulo 2**64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_MASK_31 = (1 << 31) - 1
_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place: three times z ^= z >>> shift, z *= factor."""
    for shift, factor in _ROUNDS:
        # `>>` on int64 repeats the sign bit; the mask makes the shift logical.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z
