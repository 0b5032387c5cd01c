"""Adversarial images on disk: in floats and rounded to 8 bits, both judged; and as PNG files."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.jobs import Jobs
from backpass.attacks.result import Result
from backpass.attacks.settings import normalised_bounds
from backpass.attacks.shards import describe, read_tensors, write_tensors
from backpass.attacks.threat import Bounds, Threat, limits
from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["Saved", "load", "save", "to_uint8"]


@dataclass(frozen=True, eq=False)
class Saved:
    """Adversarial images as they were saved.

    Attributes:
        x_adv: (N, ...) floats inside the bounds.
        x_uint8: (N, ...) uint8, rounded inside the ball where the grid has a point there.
        y: (N,) labels, or the classes led to.
        success: (N,) bool, of `x_adv`.
        success_uint8: (N,) bool, of `x_uint8`, judged anew by the plain model after the rounding.
        settings: the attack's name and settings.
        versions: of torch and backpass.
    """

    x_adv: Tensor
    x_uint8: Tensor
    y: Tensor
    success: Tensor
    success_uint8: Tensor
    settings: dict[str, Any]
    versions: dict[str, str]

    def __repr__(self) -> str:
        shape = tuple(self.x_adv.shape[1:])
        return f"Saved({len(self.y):,} samples {shape}, success {self.success_rate:.1%}, {self.settings})"

    @property
    def success_rate(self) -> float:
        """The share of the float images that fool the model."""
        return float(self.success.double().mean())

    @property
    def success_rate_uint8(self) -> float:
        """The share of the 8-bit images that fool the model."""
        return float(self.success_uint8.double().mean())

    @property
    def images_uint8(self) -> Tensor:
        """(N, ...) the 8-bit images in the bounds' floats, as a model takes them."""
        return from_uint8(self.x_uint8, normalised_bounds(self.settings["bounds"]), self.x_adv.dtype)

    def write_png(self, folder: str | PathLike[str]) -> list[Path]:
        """Write the 8-bit images as ``00000.png`` and so on; grey or RGB.

        Raises:
            BackpassError: the images are not of shape (N, 1 or 3, H, W).
        """
        if self.x_uint8.dim() != 4 or self.x_uint8.shape[1] not in (1, 3):
            raise BackpassError(f"PNG files hold images (N, 1 or 3, H, W); got {tuple(self.x_uint8.shape)}.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number:05d}.png" for number in range(len(self.x_uint8))]
        for path, image in zip(paths, self.x_uint8, strict=True):
            write_png(path, image)
        return paths


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) as a PNG file, without any library."""
    channels, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, -1).cpu()
    scanlines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1)  # no filter
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(scanlines.flatten().tolist()), 6)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def from_uint8(image: Tensor, bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """Lo + (hi - lo) q / 255, q: uint8."""
    floats = image.to(dtype) / 255
    lo, hi = limits(bounds, floats)
    return torch.clamp(floats * (hi - lo) + lo, lo, hi)  # type: ignore[arg-type]


def to_uint8(x: Tensor, z: Tensor, threat: Threat) -> Tensor:
    """The grid's nearest point to z (N, ...) and, where that leaves the ball, the one towards x.

    If x is itself an 8-bit image, rounding towards it shortens every coordinate of z - x, so that the result is
    in the ball whatever the norm.
    """
    lo, hi = limits(threat.bounds, x.double())
    grid_x, grid_z = ((t.double() - lo) / (hi - lo) * 255 for t in (x, z))
    # Floats put 8-bit values a little off the grid; that little must not count as a step towards x.
    inward = torch.where(grid_z > grid_x, (grid_z + 1e-4).floor(), (grid_z - 1e-4).ceil())
    nearest = grid_z.round().clamp_(0, 255).to(torch.uint8)
    inside = threat.contains(x, from_uint8(nearest, threat.bounds, x.dtype))
    return torch.where(inside.view(-1, *(1,) * (x.dim() - 1)), nearest, inward.clamp_(0, 255).to(torch.uint8))


def save(path: str | PathLike[str], model: nn.Module, x: Tensor, y: Tensor, result: Result, attack: Attack) -> Saved:
    """Saves the images of a result, in floats and rounded to 8 bits, and judges the rounded ones.

    Args:
        path: the file, which is replaced at once or not at all.
        model: that was attacked.
        x: (N, ...) the original images.
        y: (N,) as they were given to the attack.
        result: of ``attack(model, x, y)``.
        attack: its settings, which go into the file.

    Returns:
        What `load` will return.
    """
    rows = torch.arange(len(x), device=x.device)
    threat = attack.threat(rows)
    rounded = to_uint8(x, result.x_adv, threat)
    with preserved(model):
        jobs = Jobs(x, y.long(), rows, rows, torch.zeros_like(rows), threat)
        z = from_uint8(rounded, attack.bounds, x.dtype)
        oracle = attack.make_oracle(model)
        judged = threat.contains(x, z)
        for _ in range(attack.eot):
            judged = judged & oracle.fooled(oracle.plain(z, jobs.y), jobs.y)
    saved = Saved(
        x_adv=result.x_adv.cpu(),
        x_uint8=rounded.cpu(),
        y=y.cpu(),
        success=result.success.cpu(),
        success_uint8=judged.cpu(),
        settings=describe(attack, strict=False),
        versions={"backpass": __version__, "torch": torch.__version__},
    )
    tensors = {name: value for name, value in vars(saved).items() if isinstance(value, Tensor)}
    notes = json.dumps({"settings": saved.settings, "versions": saved.versions})
    write_tensors(Path(path), {**tensors, "notes": notes})
    return saved


def load(path: str | PathLike[str]) -> Saved:
    """Reads what `save` wrote, without running code from the file.

    Raises:
        BackpassError: the file is damaged or holds something else.
        OSError: it cannot be read.
    """
    content = read_tensors(Path(path))
    try:
        return Saved(**json.loads(content.pop("notes")), **content)
    except (KeyError, TypeError, ValueError) as error:
        raise BackpassError(
            f"{path} holds no adversarial images of this version of backpass: write them with backpass.attacks.save."
        ) from error
