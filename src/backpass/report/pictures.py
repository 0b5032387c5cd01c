"""Images in a page, as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gallery", "Picture", "amplified", "png_uri"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Image with its caption.

    Attributes:
        uri: a PNG data URI.
        caption: short description, also used as the alternative text.
    """

    uri: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images in rows; every row has one image per column."""

    id: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Picture]]
    note: str = ""


def png_uri(image: Tensor) -> str:
    """Return an image (1 or 3, H, W), clamped to [0, 1], as a PNG data URI."""
    from PIL import Image

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def amplified(difference: Tensor, factor: float) -> Tensor:
    """Return a difference of images scaled around mid-grey: 0.5 + factor * difference."""
    return 0.5 + factor * difference
