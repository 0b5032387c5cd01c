"""Square attack: random search in square windows, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, signs, uniform
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import SearchAttack
from backpass.attacks.settings import count, setting
from backpass.attacks.state import State, choose
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["Square", "window_share"]

_START, _PLACE, _SIGN = 1, 4, 5  # what a draw is for


def window_share(query: int, queries: int, share: float) -> float:
    """Share of the image that the window covers: halved at .1, .5, 2, 5, 10, 20, 40, 60 and 80 % of the queries."""
    done = 10_000 * query / queries
    halvings = sum(done > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return math.ldexp(share, -halvings)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tried(State):
    """State of the random search; value: (B,) the loss at z."""

    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Square(SearchAttack):
    """z <- z' where the loss of z' is larger; z' differs from z in one random window, moved to the ball's edge.

    A black-box check: where it succeeds and gradient attacks do not, gradients are masked.
    Source: Andriushchenko et al., Square attack (2020), algorithms 1, 2 and 3.

    Args:
        queries: forward passes per sample and restart.
        restarts: random restarts of each sample.
        share: p, the share of the image that the first window covers, in (0, 1].
        published: as in the authors' evaluation (auto-attack): the share falls at 10, 50, 200, ... queries whatever
            their number, the start is not counted as a query, a window never lies at the last place of a side, and
            in l_2 the tiles of the start are halves of opposite sign.
    """

    uses_gradients: ClassVar[bool] = False

    queries: int = count(5000)
    restarts: int = count(1)
    share: float = setting(0.8, "(0, 1]")
    loss: str = "margin"
    published: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        if self.norm == "l1":
            raise BackpassError("Square moves windows in l_inf and l_2 only: use APGD or FMN for norm='l1'.")

    @property
    def iterations(self) -> int:
        """Forward passes."""
        return self.queries + self.published

    def begin(self, oracle: Oracle, jobs: Jobs) -> State:
        """Start at stripes or pyramids."""
        if jobs.x.dim() != 4:
            raise BackpassError(f"Square moves windows of images (N, C, H, W); got {tuple(jobs.x.shape)}.")
        z = self.first_images(jobs, self._start(jobs))
        return _Tried(jobs=jobs, z=z, seen=z, value=z.new_full((len(z),), -torch.inf))

    def advance(self, oracle: Oracle, state: State, iteration: int) -> State:
        """One proposal."""
        assert isinstance(state, _Tried)  # noqa: S101 -- `begin` made it
        propose = self._propose_linf if self.norm == "linf" else self._propose_l2
        proposal = propose(state.z, state.jobs, iteration) if iteration else state.z
        logits = oracle.forward(proposal, state.jobs)
        value = oracle.objective(logits, state.jobs.y, state.jobs.target)
        better = value > state.value
        if not iteration:
            better = torch.ones_like(better)
        return replace(
            state,
            z=choose(better, proposal, state.z),
            value=torch.where(better, value, state.value),
            seen=proposal,
            logits=logits,
        )

    @property
    def _spare(self) -> int:
        return 0 if self.published else 1

    def _key(self, jobs: Jobs, purpose: int, query: int) -> Tensor:
        return make_key(self.seed, jobs.index, jobs.restart, purpose, query, like=jobs.index)

    def _start(self, jobs: Jobs) -> Tensor:
        """Vertical stripes of width one in l_inf; a grid of pyramids in l_2; at the ball's edge."""
        x, key, threat = jobs.x, self._key(jobs, _START, 0), jobs.threat
        if self.norm == "linf":
            stripes = signs(key, x[:, :, :1, :])
            return threat.project(x, x + threat.radius(x) * stripes)
        height, width = x.shape[2:]
        side = max(1, min(height, width) // 5)
        tall, wide = (size // side if self.published else -(-size // side) for size in (height, width))
        shift = (height - 5 * side) // 2 if self.published else 0

        def spread(tiles: Tensor) -> Tensor:
            return tiles.repeat_interleave(side, 2).repeat_interleave(side, 3)

        tile = _two_pyramids(side, x) if self.published else _pyramid(side, side, x)
        turned = uniform(self._key(jobs, _START, 1), x.new_empty(len(x), 1, tall, wide)) < 0.5
        shape = torch.where(spread(turned), tile.repeat(tall, wide), tile.T.repeat(tall, wide))
        grid = spread(signs(key, x.new_empty(len(x), x.shape[1], tall, wide))) * shape
        grid = F.pad(grid, (shift, width, shift, height))[..., :height, :width]
        return self._to_sphere(jobs, grid)

    def _to_sphere(self, jobs: Jobs, delta: Tensor) -> Tensor:
        """X + eps * delta / |delta|_2, cut by bounds and mask."""
        delta = delta if jobs.threat.mask is None else delta * jobs.threat.mask
        return jobs.threat.project(jobs.x, jobs.x + jobs.threat.radius(delta) * jobs.threat.direction(delta))

    def _side(self, x: Tensor, query: int) -> int:
        # In the authors' evaluation queries count from 0 after the start, and the schedule is that of 10,000.
        place = (query - 1, 10_000) if self.published else (query, self.queries)
        area = window_share(*place, self.share) * x.shape[2] * x.shape[3]
        return max(1, min(round(math.sqrt(area)), int(x.shape[2]), int(x.shape[3])))

    def _propose_linf(self, z: Tensor, jobs: Jobs, query: int) -> Tensor:
        """Every channel of the window goes to x + eps or to x - eps (algorithm 2)."""
        x, side = jobs.x, self._side(jobs.x, query)
        place = uniform(self._key(jobs, _PLACE, query), x.new_empty(len(x), 2))
        window = _Window.at(x, place, side, self._spare)
        sign = signs(self._key(jobs, _SIGN, query), x[:, :, :1, :1])
        edge = jobs.threat.project(x, x + jobs.threat.radius(x) * sign)
        return torch.where(window.mask, edge, z)

    def _propose_l2(self, z: Tensor, jobs: Jobs, query: int) -> Tensor:
        """The window takes a pyramid of random sign, with the norm that a second window gives up (algorithm 3)."""
        x = jobs.x
        side = max(3, self._side(x, query) // 2 * 2 + 1)
        side = min(side, *x.shape[2:])
        place = uniform(self._key(jobs, _PLACE, query), x.new_empty(len(x), 5))
        here, there = (_Window.at(x, some, side, self._spare) for some in (place[:, :2], place[:, 2:4]))
        delta = z - x
        eps = torch.as_tensor(jobs.threat.eps, dtype=torch.float64, device=x.device)
        spare = (eps**2 - jobs.threat.size(delta).square()).clamp_min(0.0).to(x.dtype)
        patch = _two_pyramids(side, x)
        patch = torch.where(per_sample(place[:, 4] < 0.5, x), here.place(patch), here.place(patch.T))
        sign = signs(self._key(jobs, _SIGN, query), x[:, :, :1, :1])
        inside = delta * here.mask
        wanted = sign * patch + inside / _length(inside)
        freed = (delta * (here.mask | there.mask)).square().sum((2, 3), keepdim=True)
        budget = (freed + per_sample(spare, x) / x.shape[1]).sqrt()
        moved = torch.where(there.mask, 0.0, delta)
        moved = torch.where(here.mask, wanted * here.mask / _length(wanted * here.mask) * budget, moved)
        return self._to_sphere(jobs, moved)


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
    def at(cls, x: Tensor, place: Tensor, side: int, spare: int = 1) -> _Window:
        """place: (B, 2) in [0, 1), among all the places where the window fits; without the last if `spare` is 0."""
        height, width = x.shape[2:]
        free = place.new_tensor([height - side + spare, width - side + spare])
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
