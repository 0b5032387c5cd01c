"""Square attack: random search in square windows, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, signs, uniform
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import Found, SearchAttack
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["Square", "window_share"]

_START, _PLACE, _SIGN = 1, 4, 5  # what a draw is for


def window_share(query: int, queries: int, share: float) -> float:
    """The share of the image that the window covers: halved at .1, .5, 2, 5, 10, 20, 40, 60 and 80 % of the queries."""
    done = 10_000 * query / queries
    halvings = sum(done > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return math.ldexp(share, -halvings)


@dataclass(frozen=True, kw_only=True)
class Square(SearchAttack):
    """z <- z' where the loss of z' is larger; z' differs from z in one random window, moved to the ball's edge.

    A black-box check: where it succeeds and gradient attacks do not, gradients are masked.
    Source: Andriushchenko et al., Square attack (2020), algorithms 1, 2 and 3.

    Args:
        queries: forward passes per sample and restart.
        restarts: searches of each sample.
        share: p, the share of the image that the first window covers, in (0, 1].
    """

    uses_gradients: ClassVar[bool] = False

    queries: int = 5000
    restarts: int = 1
    share: float = 0.8
    loss: str = "margin"

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        super().__post_init__()
        if min(self.queries, self.restarts) < 1 or not 0 < self.share <= 1:
            raise BackpassError(
                "queries and restarts must be at least 1 and share in (0, 1]; "
                f"got queries={self.queries}, restarts={self.restarts}, share={self.share}."
            )

    @property
    def _rounds(self) -> int:
        return self.restarts

    def _search(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> Found:
        if jobs.x.dim() != 4:
            raise BackpassError(f"Square moves windows of images (N, C, H, W); got {tuple(jobs.x.shape)}.")
        propose = self._propose_linf if self.norm == "linf" else self._propose_l2
        z = self._start(oracle, jobs)
        value: Tensor | None = None
        for query in range(self.queries):
            proposal = z if value is None else propose(oracle, z, jobs, query)
            logits = oracle.forward(proposal, jobs)
            new = oracle.objective(logits, jobs.y, jobs.target)
            better = torch.ones_like(active.live) if value is None else new > value
            z = torch.where(per_sample(better, z), proposal, z)
            value = new if value is None else torch.where(better, new, value)
            keep = active.retire(proposal, active.fooled(oracle, proposal, jobs, logits))
            if active.done:
                break
            if keep is not None:
                z, value, jobs = z[keep], value[keep], jobs[keep]
        return Found(active.finish(z))

    def _key(self, jobs: Jobs, purpose: int, query: int) -> Tensor:
        return make_key(self.seed, jobs.index, jobs.restart, purpose, query, like=jobs.index)

    def _start(self, oracle: Oracle, jobs: Jobs) -> Tensor:
        """Vertical stripes of width one in l_inf; a grid of 5 x 5 pyramids in l_2; at the ball's edge."""
        x, key = jobs.x, self._key(jobs, _START, 0)
        if self.norm == "linf":
            stripes = signs(key, x[:, :, :1, :])
            return oracle.threat.project(x, x + self.eps * stripes)
        height, width = x.shape[2:]
        side = max(1, min(height, width) // 5)
        tile = _pyramid(side, side, x)
        tall, wide = -(-height // side), -(-width // side)
        sign = signs(key, x.new_empty(len(x), x.shape[1], tall, wide))
        sign = sign.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
        grid = sign * tile.repeat(tall, wide)[:height, :width]
        return oracle.threat.project(x, x + self.eps * oracle.threat.direction(grid))

    def _side(self, x: Tensor, query: int) -> int:
        area = window_share(query, self.queries, self.share) * x.shape[2] * x.shape[3]
        return max(1, min(round(math.sqrt(area)), int(x.shape[2]), int(x.shape[3])))

    def _propose_linf(self, oracle: Oracle, z: Tensor, jobs: Jobs, query: int) -> Tensor:
        """Every channel of the window goes to x + eps or to x - eps (algorithm 2)."""
        x, side = jobs.x, self._side(jobs.x, query)
        place = uniform(self._key(jobs, _PLACE, query), x.new_empty(len(x), 2))
        window = _Window.at(x, place, side)
        sign = signs(self._key(jobs, _SIGN, query), x[:, :, :1, :1])
        return torch.where(window.mask, oracle.threat.project(x, x + self.eps * sign), z)

    def _propose_l2(self, oracle: Oracle, z: Tensor, jobs: Jobs, query: int) -> Tensor:
        """The window takes a pyramid of random sign, with the norm that a second window gives up (algorithm 3)."""
        x = jobs.x
        side = max(3, self._side(x, query) // 2 * 2 + 1)
        side = min(side, *x.shape[2:])
        place = uniform(self._key(jobs, _PLACE, query), x.new_empty(len(x), 5))
        here, there = _Window.at(x, place[:, :2], side), _Window.at(x, place[:, 2:4], side)
        delta = z - x
        spare = (self.eps**2 - oracle.threat.size(delta).square()).clamp_min(0.0).to(x.dtype)
        patch = _two_pyramids(side, x)
        patch = torch.where(per_sample(place[:, 4] < 0.5, x), here.place(patch), here.place(patch.T))
        sign = signs(self._key(jobs, _SIGN, query), x[:, :, :1, :1])
        inside = delta * here.mask
        wanted = sign * patch + inside / _length(inside)
        freed = (delta * (here.mask | there.mask)).square().sum((2, 3), keepdim=True)
        budget = (freed + per_sample(spare, x) / x.shape[1]).sqrt()
        moved = torch.where(there.mask, 0.0, delta)
        moved = torch.where(here.mask, wanted * here.mask / _length(wanted * here.mask) * budget, moved)
        return oracle.threat.project(x, x + moved)


def _length(patch: Tensor) -> Tensor:
    """The l_2 norm of every channel (B, C, 1, 1), never 0."""
    return patch.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)


class _Window(NamedTuple):
    """A square window of every sample: the mask (B, 1, H, W), and the rows (B, H) and columns (B, W) inside it."""

    mask: Tensor
    row: Tensor
    column: Tensor
    side: int

    @classmethod
    def at(cls, x: Tensor, place: Tensor, side: int) -> _Window:
        """place: (B, 2) in [0, 1), among all the places where the window fits."""
        height, width = x.shape[2:]
        free = place.new_tensor([height - side + 1, width - side + 1])
        corner = (place * free).long()
        row = torch.arange(height, device=x.device) - corner[:, :1]
        column = torch.arange(width, device=x.device) - corner[:, 1:]
        inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
        return cls(inside[:, None], row, column, side)

    def place(self, patch: Tensor) -> Tensor:
        """The patch (side, side) at the window, 0 outside; (B, 1, H, W)."""
        last = self.side - 1
        row, column = self.row.clamp(0, last), self.column.clamp(0, last)
        return torch.where(self.mask, patch[row[:, :, None], column[:, None, :]][:, None], 0.0)


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """eta_{r,s} = sum_{k=0}^{M(r,s)} 1 / (n + 1 - k)^2, n = height // 2; (height, width), of norm 1."""
    n = height // 2
    terms = 1.0 / (n + 1.0 - torch.arange(n + 1, dtype=like.dtype, device=like.device)).square()
    r = (torch.arange(height, device=like.device) - n).abs()[:, None]
    s = (torch.arange(width, device=like.device) - width // 2).abs()[None, :]
    level = (n - torch.maximum(r, s)).clamp(0, n)
    eta = terms.cumsum(0)[level]
    return eta.div(eta.norm())


def _two_pyramids(side: int, like: Tensor) -> Tensor:
    """A pyramid on the left half and its negative on the right; (side, side), of norm 1."""
    left = side // 2
    if left == 0:
        return _pyramid(side, side, like)
    eta = torch.cat([_pyramid(side, left, like), -_pyramid(side, side - left, like)], 1)
    return eta.div(eta.norm())
