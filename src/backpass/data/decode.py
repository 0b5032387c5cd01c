"""Decoding of image files into uint8 tensors; the only place that opens an image."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.wording import reason

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Decoded", "Encoded", "decode"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no others: Pillow starts Ghostscript for EPS
_MOST_PIXELS = 1 << 26  # of one image
_ORIENTATION = 0x0112  # the tag of EXIF
_GREY = {"1", "L"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "LA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Encoded:
    """Content of an image file, its label, and its name for messages, for instance ``row 7 of test.parquet``."""

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
    """Decode PNG, JPEG, WebP and BMP images of one size, upright as their EXIF orientation says.

    Raises:
        BackpassError: there is no image, one cannot be read, has several frames, too many pixels or another size than
            the first; the message names it.
    """
    parts: list[Tensor] = []
    labels: list[int] = []
    formats: set[str] = set()
    first: tuple[str, torch.Size] | None = None
    for encoded in images:
        pixels, kind = _read(encoded)
        if first is None:
            first = encoded.name, pixels.shape
        if pixels.shape[:2] != first[1][:2]:
            raise BackpassError(
                f"{encoded.name} has {_size(pixels.shape)} pixels, {first[0]} has {_size(first[1])}: all images must "
                "have one size. Resize them first."
            )
        formats.add(kind)
        parts.append(pixels)
        labels.append(encoded.label)
    if not parts:
        raise BackpassError("there are no images to decode.")
    channels = max(part.shape[2] for part in parts)
    pixels = torch.stack([part.expand(-1, -1, channels) for part in parts])
    return Decoded(
        pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64), tuple(sorted(formats))
    )


def _read(encoded: Encoded) -> tuple[Tensor, str]:
    """Return the pixels (H, W, 1 or 3), uint8, and the format."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = encoded.name
    try:
        with Image.open(io.BytesIO(encoded.content), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise BackpassError(f"{name} has {image.n_frames} frames: one image each is expected.")  # type: ignore[attr-defined]
            image.load()
            kind = "JPEG" if image.format == "MPO" else image.format  # a JPEG file with a preview behind it
            upright = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
            return _pixels(upright, name), str(kind)
    except BackpassError:
        raise
    except UnidentifiedImageError as error:
        raise BackpassError(f"{name} is no PNG, JPEG, WebP or BMP image, or it is corrupt.") from error
    except Image.DecompressionBombError as error:
        raise BackpassError(f"{name} is too large to be an image of a data set: {reason(error)}.") from error
    except Exception as error:  # whatever Pillow makes of damaged bytes
        raise BackpassError(f"{name} is a corrupt image: {reason(error)}.") from error


def _pixels(image: Image, name: str) -> Tensor:
    import numpy as np

    if image.mode not in _GREY | _COLOUR:
        raise BackpassError(f"{name} has pixels of kind {image.mode!r}; expected 8-bit grey or colour.")
    array = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1))


def _size(shape: torch.Size) -> str:
    return f"{shape[1]}x{shape[0]}"
