"""The nearest point of a hyperplane inside the pixel bounds, the step of FAB."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.attacks.threat import per_sample

__all__ = ["towards_hyperplane"]


def towards_hyperplane(z: Tensor, w: Tensor, gap: Tensor, norm: str, bounds: tuple[float, float]) -> Tensor:
    """Argmin |d|_p such that <w, d> = gap and lo <= z + d <= hi, exactly, by sorting; p = inf or 2.

    Every coordinate moves along sign(w_i gap) by min(t, room_i) in l_inf and by min(t |w_i|, room_i) in l_2, and
    sum_i a_i min(t, b_i) = |gap| determines t, with (a, b) = (|w|, room) or (w^2, room / |w|).
    Where the box does not reach the hyperplane, d goes as far as it lets it.
    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack (2020),
    section 2.2 and appendix A, solved here in one sort.

    Args:
        z: (B, ...) in [lo, hi].
        w: (B, ...), the normal.
        gap: (B,), how much <w, z> has to grow.
        norm: ``"linf"`` or ``"l2"``.
        bounds: (lo, hi).

    Returns:
        d, (B, ...).
    """
    sign = w.flatten(1).sign() * gap.sign()[:, None]
    slope = w.flatten(1).abs()
    flat = z.flatten(1)
    room = torch.where(sign > 0, bounds[1] - flat, flat - bounds[0]).clamp_min(0.0)
    tiny = torch.finfo(z.dtype).tiny
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
