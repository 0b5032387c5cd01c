"""Gradients of trained networks with respect to images: agreement of two rules, and the gain of one signed step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.victims import Victim, load_victim
from backpass.lab.placements import parse_rule_for
from backpass.lab.subjects import Subject
from backpass.rules import BP, Rule

__all__ = ["Directions", "compare_gradients", "measure_steps"]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Settings of gradients of the cross-entropy at clean images that a network classifies correctly.

    Attributes:
        victim: the network.
        rule: text form of the backward rule.
        images: number of test images, the first ones; None: all.
        lengths: step lengths in pixels of [0, 1], for `measure_steps`.
    """

    victim: Victim
    rule: str
    images: int | None
    lengths: tuple[float, ...] = ()


def compare_gradients(settings: Directions, seed: int, context: Context) -> Outcome:
    """Compare the gradient of the rule with that of plain backpropagation.

    Returns:
        ``agreement``, entries of equal sign; ``asleep``, negative inputs of the rule's sites; ``blind``, images at
        which the plain gradient is zero; all in per cent. ``cosine``, the mean over the images; ``loss`` in nats.
    """
    subject, rule, x, y = _prepare(settings, seed, context)
    plain, losses = _gradient(subject, BP(), x, y)
    ours, _ = _gradient(subject, rule, x, y)
    flat, flat_ours = plain.flatten(1).double(), ours.flatten(1).double()
    return {
        "agreement": _percent(flat.sign() == flat_ours.sign()),
        "cosine": F.cosine_similarity(flat, flat_ours, dim=1, eps=1e-300).mean().item(),
        "asleep": _asleep(subject, rule, x),
        "blind": _percent((flat == 0).all(1)),
        "loss": losses.double().mean().item(),
    }


def measure_steps(settings: Directions, seed: int, context: Context) -> Outcome:
    r"""Measure the gain of one signed step along the gradient of the rule.

    Returns:
        ``gain``: by length r, the mean rise of the loss at :math:`x + r\,\mathrm{sign}(g)`, kept in [0, 1].
    """
    subject, rule, x, y = _prepare(settings, seed, context)
    gradient, losses = _gradient(subject, rule, x, y)
    gains = []
    for length in settings.lengths:
        with torch.no_grad():
            moved = (x + length * gradient.sign()).clamp(0, 1)
            gains.append((F.cross_entropy(subject.model(moved), y, reduction="none") - losses).double().mean().item())
    return {"gain": gains}


def _prepare(settings: Directions, seed: int, context: Context) -> tuple[Subject, Rule, Tensor, Tensor]:
    subject, _, test = load_victim(settings.victim, seed, context)
    images = test.first(settings.images).images
    x, y = images.x.to(context.device), images.y.to(context.device)
    with torch.no_grad():
        right = subject.model(x).argmax(1) == y
    return subject, parse_rule_for(settings.victim.model, settings.rule), x[right], y[right]


def _gradient(subject: Subject, rule: Rule, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient (N, ...) of a rule, and the losses (N,)."""
    x = x.detach().requires_grad_()
    with rule.attach(subject.network):
        losses = F.cross_entropy(subject.model(x), y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return gradient, losses.detach()


def _asleep(subject: Subject, rule: Rule, x: Tensor) -> float:
    """Return the negative inputs of the modules of the rule's sites, in per cent."""
    with rule.attach(subject.network) as attached, torch.no_grad():
        subject.model(x[:1])
        paths = [site.module for site in attached.sites]
    counts: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts.append(torch.stack([(args[0] < 0).sum(), torch.tensor(args[0].numel(), device=x.device)]))

    handles = [subject.network.get_submodule(path).register_forward_pre_hook(note) for path in paths]
    try:
        with torch.no_grad():
            subject.model(x)
    finally:
        for handle in handles:
            handle.remove()
    negative, everything = torch.stack(counts).sum(0)
    return 100 * float(negative / everything)  # nan without an image


def _percent(true: Tensor) -> float:
    return 100 * true.double().mean().item()
