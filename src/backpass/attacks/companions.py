"""Transformations of images and gradients that improve transferability: TI, PatchOut, admix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["Pool", "patches_out", "smooth"]

_PATCHES, _MIXED = 4, 5  # purposes of random draws


def smooth(gradient: Tensor, reach: int) -> Tensor:
    """Convolve gradients (B, C, H, W) with a Gaussian window of 2 reach + 1 pixels, with zero padding.

    W_ij is proportional to exp(-(i^2 + j^2) / (2 sigma^2)), sums to 1, and sigma = reach / sqrt(3).
    Source: Dong, Pang, Su, Zhu (2019), section 3.3.
    """
    place = torch.arange(-reach, reach + 1, dtype=gradient.dtype, device=gradient.device)
    line = torch.softmax(-1.5 * (place / reach) ** 2, 0)
    channels = gradient.shape[1]
    column, row = (line.view(shape).expand(channels, 1, -1, -1) for shape in ((-1, 1), (1, -1)))
    across = F.conv2d(gradient, row, padding=(0, reach), groups=channels)
    return F.conv2d(across, column, padding=(reach, 0), groups=channels)


def patches_out(share: float, side: int, seed: int, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor]:
    """Return the function z -> x + M (z - x), which removes the perturbation of random patches.

    Every sample has its own mask M of round(share P) among P patches of side x side pixels; patches at the right and
    lower edge may be smaller.
    Source: Wei, Chen, Goldblum, Wu, Goldstein, Jiang (2022), section 3.4.
    """
    height, width = jobs.x.shape[2:]
    rows, columns = -(-height // side), -(-width // side)
    key = make_key(seed, jobs.index, jobs.restart, _PATCHES, iteration, like=jobs.index)
    order = uniform(key, jobs.x.new_empty(len(jobs), rows * columns)).argsort(1).argsort(1)
    kept = order >= round(share * rows * columns)
    pixels = kept.view(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
    mask = pixels[:, :, :height, :width]
    return lambda z: torch.where(mask, z, jobs.x)


class Pool:
    """Labelled images that admix mixes in. Pools compare equal if images and labels are equal.

    Args:
        images: (P, C, H, W), of the shape of the images under attack.
        labels: (P,) integers.

    Raises:
        BackpassError: there is no image, or the numbers of images and labels differ.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        shapes = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in (images, labels)]
        if not isinstance(images, Tensor) or images.dim() != 4 or not len(images) or shapes[1] != shapes[0][:1]:
            raise BackpassError(
                f"a pool needs tensors, images (P, C, H, W) and labels (P,); got {shapes[0]} and {shapes[1]}."
            )
        self.images, self.labels = images.detach(), labels.detach().long()
        words = hashlib.sha256(str((images.dtype, tuple(images.shape), self.labels.tolist())).encode())
        words.update(self.images.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.digest = words.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Pool({len(self.images)} images, {self.digest})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pool) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def draw(self, seed: int, jobs: Jobs, iteration: int) -> Tensor:
        """Return an image (B, C, H, W) of another class for each row.

        Raises:
            BackpassError: the images have another shape, or all have the label of a row.
        """
        if self.images.shape[1:] != jobs.x.shape[1:]:
            raise BackpassError(
                f"the pool's images must be of shape {tuple(jobs.x.shape[1:])}, as those under attack; "
                f"got {tuple(self.images.shape[1:])}."
            )
        images, labels = self.images.to(jobs.x), self.labels.to(jobs.y.device)
        other = labels != jobs.y[:, None]
        count = other.sum(1)
        if not bool(count.all()):
            raise BackpassError("admix needs images of another class: the pool has none for some labels.")
        key = make_key(seed, jobs.index, jobs.restart, _MIXED, iteration, like=jobs.index)
        chosen = (uniform(key, jobs.x.new_empty(len(jobs), 1)).squeeze(1) * count).long()
        # Index of the (chosen + 1)-th image of another class.
        return images[(other.cumsum(1) == per_sample(chosen + 1, other)).to(torch.uint8).argmax(1)]
