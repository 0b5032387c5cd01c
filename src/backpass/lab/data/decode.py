"""Encoded images to uint8 tensors; a picture that cannot be read is named."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpass.errors import BackpassError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Decoded", "Encoded", "decode"]

_GREY = {"1", "L"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "LA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Encoded:
    """One image file's content, its label, and its name for messages, for instance ``row 7 of test.parquet``."""

    name: str
    content: bytes
    label: int


@dataclass(frozen=True)
class Decoded:
    """Images in one tensor.

    Attributes:
        pixels: (N, C, H, W) uint8; C is 1 where every image is grey and 3 otherwise.
        labels: (N,) int64.
        formats: of the files, for instance ``("PNG",)``.
    """

    pixels: Tensor
    labels: Tensor
    formats: tuple[str, ...]


def decode(images: Iterable[Encoded]) -> Decoded:
    """Decodes images of one size.

    Raises:
        BackpassError: there is none, one cannot be read, or one has another size; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    parts: list[Tensor] = []
    labels: list[int] = []
    formats: set[str] = set()
    first: tuple[str, tuple[int, int]] | None = None
    for encoded in images:
        try:
            with Image.open(io.BytesIO(encoded.content)) as image:
                image.load()
                formats.add(image.format or "unknown")
                pixels, size = _pixels(image, encoded.name), image.size
        except UnidentifiedImageError as error:
            raise BackpassError(f"{encoded.name} is no image that can be read: the file may be corrupt.") from error
        except Image.DecompressionBombError as error:
            raise BackpassError(f"{encoded.name} is too large to be an image of a data set: {error}") from error
        except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
            raise BackpassError(f"{encoded.name} is a corrupt image: {error}.") from error
        if first is None:
            first = encoded.name, size
        if size != first[1]:
            raise BackpassError(
                f"{encoded.name} has {size[0]}x{size[1]} pixels, {first[0]} has {first[1][0]}x{first[1][1]}: "
                "all images must have one size. Resize them first."
            )
        parts.append(pixels)
        labels.append(encoded.label)
    if not parts:
        raise BackpassError("there are no images to decode.")
    channels = max(part.shape[2] for part in parts)
    pixels = torch.stack([part.expand(-1, -1, channels) for part in parts])
    return Decoded(
        pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64), tuple(sorted(formats))
    )


def _pixels(image: Image, name: str) -> Tensor:
    """(H, W, 1 or 3) uint8."""
    import numpy as np

    if image.mode not in _GREY | _COLOUR:
        raise BackpassError(f"{name} has pixels of kind {image.mode!r}; expected 8-bit grey or colour.")
    array = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1))
