"""Brownian paths that can be refined and shared between integrations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BrownianPath"]

_MOST_HALVINGS = 24


class BrownianPath:
    """A Brownian path on [0, t]; halving the step length refines the path and does not change it.

    The increments over `steps` equal intervals are drawn first. Every halving inserts midpoints by the Brownian bridge,
    from a generator of its own, so that increments over 2^k steps always sum to those over 2^(k-1). Two integrations,
    of the same or of different SDEs, that are given one path see the same noise.

    Args:
        t: the end, > 0.
        steps: intervals of the coarsest grid, >= 1.
        shape: of one increment, (noise_dim,) for one path or (M, noise_dim) for several.
        seed: of the path.
        dtype: of the increments.
        device: of the increments.

    Raises:
        BackpassError: a setting is out of its range.

    Example:
        >>> path = BrownianPath(1.0, steps=4, shape=(100, 3), seed=0)
        >>> coarse, fine = (torch.stack(list(path.increments(n))) for n in (4, 8))
        >>> torch.allclose(coarse, fine[0::2] + fine[1::2], atol=1e-6)
        True
    """

    def __init__(
        self,
        t: float,
        *,
        steps: int,
        shape: tuple[int, ...],
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not (is_number(t) and t > 0):
            raise BackpassError(f"t must be the end of the path, a finite number > 0; got {t!r}.")
        if not is_whole(steps, 1) or not is_whole(seed, 0):
            raise BackpassError(f"steps must be an integer >= 1 and seed one >= 0; got {steps!r} and {seed!r}.")
        if not isinstance(shape, tuple) or len(shape) not in (1, 2) or not all(is_whole(n, 1) for n in shape):
            raise BackpassError(f"shape must be (noise_dim,) or (M, noise_dim), got {shape!r}.")
        self.t, self.steps, self.shape, self.seed = float(t), steps, shape, seed
        self.dtype, self.device = dtype or torch.get_default_dtype(), torch.device(device or "cpu")

    def increments(self, steps: int) -> Iterator[Tensor]:
        """Yield W(t_{k+1}) - W(t_k) over equal intervals, each of `shape`.

        Args:
            steps: the path's own number of steps times a power of 2.

        Raises:
            BackpassError: another number of steps.
        """
        halvings = round(math.log2(steps / self.steps)) if is_whole(steps, 1) else -1
        if not 0 <= halvings <= _MOST_HALVINGS or steps != self.steps * 2**halvings:
            raise BackpassError(
                f"a path of {self.steps} steps can be refined to {self.steps} times a power of 2; got {steps!r} steps. "
                f"Choose dt = {self.t / self.steps:g} / 2^k."
            )
        generators = [torch.Generator(self.device).manual_seed(self.seed * 64 + level) for level in range(halvings + 1)]
        for _ in range(self.steps):
            whole = self._normal(generators[0]) * (self.t / self.steps) ** 0.5
            yield from self._halved(whole, 1, generators)

    def _halved(self, whole: Tensor, level: int, generators: list[torch.Generator]) -> Iterator[Tensor]:
        """Split an increment by a bridge: its half is normal around the mean, with a quarter of its variance."""
        if level == len(generators):
            yield whole
            return
        length = self.t / self.steps / 2 ** (level - 1)
        first = whole / 2 + self._normal(generators[level]) * (length / 4) ** 0.5
        yield from self._halved(first, level + 1, generators)
        yield from self._halved(whole - first, level + 1, generators)

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, dtype=self.dtype, device=self.device)
