"""Classes that targeted attacks lead to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpass.attacks.noise import make_key, uniform
from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_whole

__all__ = ["Targets", "choose_targets", "likely_wrong"]

Targets = str | int | Callable[[Tensor], Tensor]
_NAMES = ("next", "random", "least-likely", "second")
_TARGET = 7  # what the draw is for


def choose_targets(targets: Targets, y: Tensor, logits: Tensor, index: Tensor, seed: int = 0) -> Tensor:
    """Return the class (N,) that each sample is led to; a target that is the label means that it is left out.

    Args:
        targets: ``"next"``: y + 1, modulo C; ``"random"``: any other class, drawn for the sample's index;
            ``"least-likely"`` and ``"second"``: the wrong class of the smallest and of the largest logit; a class; or
            a function of y (N,).
        y: (N,) labels.
        logits: (N, C) of the clean images.
        index: (N,) places in the data.
        seed: of the random targets.

    Raises:
        BackpassError: a target is no class.
        UnknownNameError: the name is none of the above.
    """
    classes = logits.shape[1]
    if callable(targets):
        found = targets(y)
    elif isinstance(targets, str):
        if targets not in _NAMES:
            raise UnknownNameError("target", targets, _NAMES)
        found = _named(targets, y, logits, index, seed)
    elif is_whole(targets, 0):
        found = torch.full_like(y, targets)
    else:
        raise BackpassError(f"targets must be a name, a class or a function of the labels; got {targets!r}.")
    if not isinstance(found, Tensor) or found.shape != y.shape or found.is_floating_point():
        raise BackpassError(f"targets must be one class per sample, an integer tensor of shape {tuple(y.shape)}.")
    if int(found.min()) < 0 or int(found.max()) >= classes:
        raise BackpassError(
            f"targets must be classes 0 to {classes - 1}; got {int(found.min())} to {int(found.max())}."
        )
    return found.to(y.device).long()


def likely_wrong(logits: Tensor, y: Tensor, rank: Tensor) -> Tensor:
    """Return the class (B,) at place `rank` (B,) among the wrong ones, the most likely first.

    Excluded classes, whose logits are -inf, are no targets. Ranks past the last wrap.
    """
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    count = (wrong > -torch.inf).sum(1).clamp_min(1)
    return wrong.argsort(1, descending=True).gather(1, (rank % count)[:, None]).squeeze(1)


def _named(name: str, y: Tensor, logits: Tensor, index: Tensor, seed: int) -> Tensor:
    classes = logits.shape[1]
    if name == "next":
        return (y + 1) % classes
    if name == "random":
        key = make_key(seed, index, _TARGET, like=index)
        shift = 1 + (uniform(key, key.double()) * (classes - 1)).long().clamp_max(classes - 2)
        return (y + shift) % classes
    if name == "least-likely":
        return logits.scatter(1, y[:, None], torch.inf).argmin(1)
    return logits.scatter(1, y[:, None], -torch.inf).argmax(1)
