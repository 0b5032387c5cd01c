"""Shapes of images and their checks."""

from __future__ import annotations

from backpass.errors import BackpassError
from backpass.numbers import is_whole_text

__all__ = ["Shape", "check_shape", "parse_shape", "require_side"]

Shape = tuple[int, int, int]
"""Channels, height, width."""


def parse_shape(text: str) -> tuple[int, ...]:
    """Read the shape of one input without the batch axis from ``3x224x224`` or ``3,224,224``.

    Raises:
        BackpassError: the text has another form, or a size is below 1.
    """
    parts = [part.strip() for part in text.lower().replace("x", ",").split(",")]
    if not all(is_whole_text(part) and int(part) > 0 for part in parts):
        raise BackpassError(f"a shape is positive whole numbers as in 3x224x224 (no batch axis), got {text!r}.")
    return tuple(int(part) for part in parts)


def check_shape(shape: tuple[int, ...]) -> Shape:
    """Return the shape if it is (channels, height, width), all positive.

    Raises:
        BackpassError: it is not.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise BackpassError(f"an image's shape is channels, height and width, as in (3, 32, 32); got {tuple(shape)}.")
    return shape[0], shape[1], shape[2]


def require_side(name: str, shape: Shape, least: int) -> None:
    """Check that images are large enough for all poolings of a network.

    Raises:
        BackpassError: height or width is below ``least``.
    """
    if min(shape[1:]) < least:
        raise BackpassError(
            f"{name} takes images of at least {least}x{least} pixels, got {shape[1]}x{shape[2]}: choose another "
            "network (mlp takes any size, cnn from 4x4), or larger images."
        )
