"""The nearest point of a hyperplane inside the pixel bounds, the step of FAB."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.attacks.threat import Bounds, limits, per_sample

__all__ = ["towards_hyperplane"]


def towards_hyperplane(z: Tensor, w: Tensor, gap: Tensor, norm: str, bounds: Bounds) -> Tensor:
    """Argmin |d|_p such that <w, d> = gap and lo <= z + d <= hi, exactly, by sorting; p = inf, 2 or 1.

    Every coordinate moves along sign(w_i gap) by min(t, room_i) in l_inf and by min(t |w_i|, room_i) in l_2, and
    sum_i a_i min(t, b_i) = |gap| determines t, with (a, b) = (|w|, room) or (w^2, room / |w|).
    In l_1 the coordinates move in the order of |w_i|, each as far as it can, until the gap is closed.
    Where the box does not reach the hyperplane, d goes as far as it lets it.
    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack (2020),
    section 2.2 and appendix A, solved here in one sort.

    Args:
        z: (B, ...) in [lo, hi].
        w: (B, ...), the normal.
        gap: (B,), how much <w, z> has to grow.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: (lo, hi).

    Returns:
        d, (B, ...).
    """
    sign = w.flatten(1).sign() * gap.sign()[:, None]
    slope = w.flatten(1).abs()
    lo, hi = limits(bounds, z)
    room = torch.where(sign > 0, (hi - z).flatten(1), (z - lo).flatten(1)).clamp_min(0.0)
    tiny = torch.finfo(z.dtype).tiny
    if norm == "l1":
        slope, order = slope.sort(1, descending=True)
        room = room.gather(1, order)
        before = (slope * room).cumsum(1) - slope * room
        left = ((gap.abs()[:, None] - before) / slope.clamp_min(tiny)).clamp_min(0.0)
        moved = torch.where(slope > 0, torch.minimum(left, room), 0.0)
        return (sign * torch.zeros_like(moved).scatter(1, order, moved)).view(z.shape)
    a, b = (slope, room) if norm == "linf" else (slope.square(), room / slope.clamp_min(tiny))
    b, order = b.sort(1)
    a = a.gather(1, order)
    # With coordinates up to k at their limits b_i, the sum is full_k + t * rest_k.
    full = (a * b).cumsum(1)
    rest = a.flip(1).cumsum(1).flip(1) - a
    reached = full + b * rest  # the sum at t = b_k, rising in k
    k = torch.searchsorted(reached.contiguous(), gap.abs()[:, None]).clamp_max(a.shape[1] - 1)
    before = torch.where(k > 0, (full.gather(1, k) - (a * b).gather(1, k)), 0.0)
    remaining = (rest + a).gather(1, k)
    t = ((gap.abs()[:, None] - before) / remaining.clamp_min(tiny)).clamp_min(0.0)
    t = torch.where(remaining > 0, t, b.gather(1, k)).clamp_max(b[:, -1:])
    moved = torch.minimum(t.expand_as(room) if norm == "linf" else t * slope, room)
    return torch.where(slope > 0, sign * moved, 0.0).view(z.shape) * per_sample(gap != 0, z)
