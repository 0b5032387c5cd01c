"""Input diversity: the model sees every image shrunk to a random size, at a random place on black."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.errors import BackpassError

__all__ = ["Diversity"]

_DIVERSITY = 3  # what the draw is for


@dataclass(frozen=True)
class Diversity:
    """With probability p, resize (H, W) to (sH, sW), s ~ U[resize, 1], and pad with zeros back to (H, W).

    Every sample has its own draw, so resizing and padding are one bilinear sampling of an affine grid.
    Source: Xie et al. (2019), section 3.3.
    """

    probability: float
    resize: float

    def draw(self, seed: int, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor]:
        """The transformation (B, C, H, W) -> (B, C, H, W) of this iteration.

        Raises:
            BackpassError: the samples are not images (N, C, H, W).
        """
        if jobs.x.dim() != 4:
            raise BackpassError(f"input diversity resizes images (N, C, H, W); got {tuple(jobs.x.shape)}.")
        key = make_key(seed, jobs.index, jobs.restart, _DIVERSITY, iteration, like=jobs.index)
        chance, size, down, right = uniform(key, jobs.x.new_empty(len(jobs), 4)).unbind(1)
        size = torch.where(chance < self.probability, self.resize + (1.0 - self.resize) * size, 1.0)
        # Output coordinates in [-1, 1] map to input coordinates by u -> (u - centre) / size.
        free = 1.0 - size
        zero = torch.zeros_like(size)
        across, along = (2.0 * right - 1.0) * free, (2.0 * down - 1.0) * free
        rows = [torch.stack([1 / size, zero, -across / size], 1), torch.stack([zero, 1 / size, -along / size], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(jobs.x.shape), align_corners=False)
        return lambda z: F.grid_sample(z, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
