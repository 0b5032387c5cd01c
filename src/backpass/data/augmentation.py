"""Augmentation by random crops and mirroring that does not depend on how samples are batched.

The random numbers of a sample are bits of a 64-bit hash of (seed, index, epoch), with the finaliser of splitmix64
after each word. Wrapping 64-bit integers give the same numbers on every device, and no generator is used.
Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
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

_PURPOSE = 0x6175676D656E7421  # separates these random numbers from other uses of the same seed


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augment images: y = crop(pad(x, crop), size of x), mirrored with probability 1/2, from uint8 to [0, 1].

    Row and column offsets are independent and uniform in 0..2 * crop; the border is 0 (black). The result depends on
    the seed, the epoch and the sample's index alone, not on the batch, its order or the number of processes.

    Args:
        crop: pixels of border on every side; 0: no crop.
        flip: mirror each image with probability 1/2.
        white: uint8 value that becomes 1.0; float images keep their values.

    Raises:
        BackpassError: ``crop`` is below 0, or ``white`` below 1.

    Source: He et al., Deep residual learning (CVPR 2016), Section 4.2.
    """

    crop: int = 4
    flip: bool = True
    white: int = 255

    def __post_init__(self) -> None:
        if self.crop < 0 or self.white < 1:
            raise BackpassError(f"crop must be at least 0 and white at least 1, got {self.crop} and {self.white}.")

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read ``crop``, ``crop=2`` and ``flip``, separated by commas; an empty text is no augmentation.

        Raises:
            UnknownNameError: a word is unknown.
            BackpassError: a value is invalid.
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
        """Return the augmented images of a batch.

        Args:
            x: (B, C, H, W), uint8 or float.
            batch: its ``index`` (B,), ``epoch`` and ``seed`` determine the random numbers.

        Returns:
            (B, C, H, W), float.

        Raises:
            BackpassError: x has another shape, or another number of samples than the index.
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
    """Draw two whole numbers below ``places`` and a coin for each sample.

    Args:
        seed: any integer.
        index: (B,) int64, indices of the samples.
        epoch: any integer.
        places: at least 1; probabilities are exact to 2**-31.

    Returns:
        (B,) int64, (B,) int64, (B,) bool.
    """
    key = torch.zeros_like(index)
    for word in (_PURPOSE, seed, index, epoch):
        key = _mix(key.add_(word if isinstance(word, Tensor) else _signed(word)).add_(_GAMMA))
    low, high = (key & _MASK_31) * places >> 31, ((key >> 31) & _MASK_31) * places >> 31
    return low, high, key < 0


def _crop(x: Tensor, border: int, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
    """Shift x inside its zero border and mirror it, by one gather for the whole batch."""
    count, channels, height, width = x.shape
    down, right = (torch.arange(side, device=x.device) for side in (height, width))
    row = rows[:, None] + down
    column = columns[:, None] + torch.where(mirrored[:, None], width - 1 - right, right)
    place = (row[:, :, None] * (width + 2 * border) + column[:, None, :]).view(count, 1, -1)
    padded = F.pad(x, (border,) * 4).flatten(2)
    return padded.gather(2, place.expand(-1, channels, -1)).view(x.shape)


def _signed(word: int) -> int:
    """Return the integer in [-2**63, 2**63) that equals `word` modulo 2**64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_MASK_31 = (1 << 31) - 1
_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def _mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 in place: three times z ^= z >>> shift, z *= factor."""
    for shift, factor in _ROUNDS:
        # `>>` on int64 repeats the sign bit; the mask makes the shift logical.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z
