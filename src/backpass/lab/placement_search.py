"""Where to place linear backpropagation in a network, chosen on images of its own: ``linbp:start=auto``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks import Attack, Rate, evaluate
from backpass.errors import BackpassError
from backpass.rules import LinBP, Rule, list_sites, parse_rule
from backpass.rules.registry import PLACEHOLDERS

__all__ = ["Choice", "choose_start", "is_automatic"]

_AUTO = "auto"


class Choice(NamedTuple):
    """The placement found, and what it was chosen by.

    Attributes:
        rule: with a concrete start, counted from the end.
        rates: by start, the images fooled.
        plain: the images that plain gradients fool; where that is the highest, no placement is a gain.
    """

    rule: LinBP
    rates: dict[int, Rate]
    plain: Rate


def is_automatic(rule: Rule | str) -> bool:
    """Return whether a rule, or its text form, is LinBP with ``start=auto``, which stands for the search."""
    rule = parse_rule(rule, placeholders=PLACEHOLDERS) if isinstance(rule, str) else rule
    return isinstance(rule, LinBP) and rule.start == _AUTO


def choose_start(
    rule: LinBP,
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    model: nn.Module | None = None,
    most: int = 12,
    batch_size: int = 500,
) -> Choice:
    """The first linear site with which an attack fools most images; ties go to the larger mean loss, then to fewer.

    To judge the choice, use other images: on these its success is the largest of several, which flatters it.

    Args:
        rule: whose other settings stay.
        network: to which the rule is attached.
        x: (N, ...) images to choose by, in the attack's bounds.
        y: (N,) their labels.
        attack: by whose success to choose.
        model: what the attack sees, where that is not the network itself.
        most: how many starts to try at most, at least 1; from the last site to the first, the nearer the denser.
        batch_size: images searched at a time.

    Raises:
        BackpassError: there is no image, or `most` is below 1.
        NoSiteError: the network has no activation.
    """
    if most < 1 or len(x) == 0:
        raise BackpassError(f"a search needs an image and a start to try, got {len(x)} images and most={most}.")
    seen = network if model is None else model
    network.eval()
    count = len(list_sites(seen, x[:1].to(_device(network))))
    plain = evaluate(seen, (x, y), attack, batch_size=batch_size)
    rates: dict[int, Rate] = {}
    scores: dict[int, tuple[float, float]] = {}
    for depth in _depths(max(count, 1), most):
        start = -depth
        with replace(rule, start=start).attach(network):
            report = evaluate(seen, (x, y), attack, batch_size=batch_size)
        (record,) = report.attacks.values()
        rates[start] = report.fooled()
        loss = torch.nanmean(record.loss).item()
        scores[start] = (rates[start].hits, loss if math.isfinite(loss) else -math.inf)
    best = max(scores, key=lambda start: scores[start])
    return Choice(replace(rule, start=best), rates, plain.fooled())


def _depths(count: int, most: int) -> list[int]:
    """Numbers of linear sites to try, from 1 to all, evenly spaced on a logarithmic scale where there are many."""
    if count <= most:
        return list(range(1, count + 1))
    if most == 1:
        return [1]
    return sorted({round(count ** (step / (most - 1))) for step in range(most)})


def _device(network: nn.Module) -> torch.device:
    return next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))
