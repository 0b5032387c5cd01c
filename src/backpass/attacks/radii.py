"""Robustness curves: an attack at several radii, from the largest to the smallest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.search import SearchAttack
from backpass.attacks.settings import plain
from backpass.errors import BackpassError
from backpass.numbers import is_number

__all__ = ["check_radii", "run", "run_radii"]

_COLUMNS = ("success", "loss", "prediction", "distance")
_LENGTHS = ("step", "start_eps")  # settings in the unit of the radius


def check_radii(radii: Sequence[float], attacks: Sequence[Attack]) -> list[float]:
    """Return the radii in ascending order.

    Raises:
        BackpassError: a radius is invalid or repeated, or an attack does not support radii.
    """
    levels = list(plain(radii)) if hasattr(radii, "__iter__") else []
    if not levels or not all(is_number(radius) and radius >= 0 for radius in levels) or len(set(levels)) < len(levels):
        raise BackpassError(f"radii must be different numbers, at least 0; got {levels or radii!r}.")
    for attack in attacks:
        if isinstance(attack.eps, tuple):
            raise BackpassError("radii are for attacks with one eps; this one has a radius for each sample.")
        if not attack.minimum_norm:
            for radius in levels:
                replace(attack, eps=radius)
    return sorted(float(radius) for radius in levels)


def run(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, batch_size: int, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Attack samples (B, ...) and return success, loss, prediction and distance, (B, 1) each, and `gradients`."""
    if len(x) == 0:
        return _table(x, 1)
    result = attack(model, x, y, indices=index, batch_size=batch_size, mask=mask)
    return {
        **{name: getattr(result, name)[:, None] for name in _COLUMNS},
        "gradients": torch.tensor(result.gradients),
    }


def run_radii(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    batch_size: int,
    radii: Sequence[float],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Attack samples (B, ...) at ascending radii and return the columns of `run`, (B, R) each.

    A sample is attacked at the largest radius, then at the next smaller one, until an attack fails. It counts as robust
    at this and all smaller radii. Each attack has its full steps and restarts; the first restart starts one step after
    the image found at the larger radius (the gradient there is known), scaled to the smaller ball. A start that is a
    success already costs a forward pass. A sample thus costs one failed attack, and successful ones, which are short.

    At radii of success the columns are those of the nearest image found. At the radius of failure they are those of the
    failed attack; at smaller radii the loss is NaN, the prediction y and the distance inf.
    """
    if attack.minimum_norm:
        found = run(replace(attack, eps=math.inf), model, x, y, index, batch_size, mask)
        found |= {name: found[name].expand(-1, len(radii)) for name in _COLUMNS}
        return found | {"success": found["distance"] <= torch.tensor(radii, device=x.device) * (1 + 1e-6)}
    table, gradients = _table(x, len(radii), y), 0
    rows, image, before = torch.arange(len(x), device=x.device), x, 0.0
    for level in reversed(range(len(radii))):
        radius = radii[level]
        if len(rows) == 0 or radius == 0:
            break
        now, own = _at_radius(attack, radius), x[rows]
        start = own + (image - own) * (radius / before) if before and isinstance(now, SearchAttack) else None
        some = None if mask is None else mask[rows]
        result = now(model, own, y[rows], indices=index[rows], batch_size=batch_size, mask=some, start=start)
        gradients += result.gradients
        for name in _COLUMNS:
            value = getattr(result, name)
            table[name][rows, level] = value.to(table[name].dtype)
            fallen = rows[result.success]  # a nearer image is valid at the larger radii too
            table[name][fallen, level:] = value[result.success, None].to(table[name].dtype)
        image = torch.where(result.ahead.isfinite(), result.ahead, result.x_adv)[result.success]
        rows, before = rows[result.success], radius
    return table | {"gradients": torch.tensor(gradients)}


def _table(x: Tensor, width: int, y: Tensor | None = None) -> dict[str, Tensor]:
    """Return the columns of samples (B, ...) that are robust at all radii."""
    shape = (len(x), width)
    prediction = torch.zeros(shape, dtype=torch.int64, device=x.device)
    return {
        "success": torch.zeros(shape, dtype=torch.bool, device=x.device),
        "loss": torch.full(shape, torch.nan, dtype=torch.float64, device=x.device),
        "prediction": prediction if y is None else prediction + y[:, None],
        "distance": torch.full(shape, torch.inf, dtype=torch.float64, device=x.device),
        "gradients": torch.tensor(0),
    }


def _at_radius(attack: Attack, radius: float) -> Attack:
    """Return the attack at a radius, with all lengths scaled."""
    known = {field.name for field in fields(attack)}
    factor = radius / attack.largest_eps if attack.largest_eps else 1.0
    lengths = {name: getattr(attack, name) for name in _LENGTHS if name in known}
    scaled: dict[str, Any] = {name: value * factor for name, value in lengths.items() if value is not None}
    return replace(attack, eps=radius, early_stop=True, **scaled)
