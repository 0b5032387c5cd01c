"""What the two gradients of one image have in common, and what a single step along each of them gains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.lab.experiments.linbp.victims import Victim
from backpass.lab.placements import parse_rule_for
from backpass.rules import BP, Rule

__all__ = ["compare_gradients"]


def compare_gradients(victim: Victim, rule: str, *, images: int | None, lengths: Sequence[float]) -> dict[str, float]:
    r"""Compares the gradients of the cross-entropy at the clean images that the network has right.

    Args:
        victim: the network.
        rule: LinBP, in its text form.
        images: how many test images, from the first.
        lengths: of single steps :math:`x + r\,\mathrm{sign}(g)`, kept in [0, 1].

    Returns:
        Numbers by name: ``agreement``, entries of equal sign in per cent; ``cosine``; ``asleep``, activations of the
        linear sites with a negative input, in per cent; ``blind``, images whose plain gradient is zero, in per cent;
        ``loss`` at the clean images; ``bp 0.01`` and ``linbp 0.01``, the mean rise of the loss after a step of 0.01.
    """
    data = victim.test.first(images).images
    x, y = data.x.to(victim.device), data.y.to(victim.device)
    network = victim.network
    linear = parse_rule_for(victim.training.model, rule)
    with torch.no_grad():
        right = network(x).argmax(1) == y
    x, y = x[right], y[right]
    if len(x) == 0:
        return {}
    plain, clean = _gradient(network, BP(), x, y)
    ours, _ = _gradient(network, linear, x, y)
    flat, flat_ours = plain.flatten(1).double(), ours.flatten(1).double()
    found = {
        "agreement": 100 * (flat.sign() == flat_ours.sign()).double().mean().item(),
        "cosine": F.cosine_similarity(flat, flat_ours, dim=1, eps=1e-300).mean().item(),
        "asleep": _asleep(network, linear, x),
        "blind": 100 * (flat == 0).all(1).double().mean().item(),
        "loss": clean.double().mean().item(),
    }
    for length in lengths:
        for name, gradient in (("bp", plain), ("linbp", ours)):
            with torch.no_grad():
                moved = (x + length * gradient.sign()).clamp(0, 1)
                rise = F.cross_entropy(network(moved), y, reduction="none") - clean
            found[f"{name} {length:g}"] = rise.double().mean().item()
    return found


def _gradient(network: nn.Module, rule: Rule, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(N, ...) the gradient by a rule, and (N,) the losses."""
    x = x.detach().requires_grad_()
    with rule.attach(network):
        losses = F.cross_entropy(network(x), y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return gradient, losses.detach()


def _asleep(network: nn.Module, rule: Rule, x: Tensor) -> float:
    """Negative inputs of the linear sites' modules, in per cent of all; the lab's networks have a module per site."""
    with rule.attach(network) as attached, torch.no_grad():
        network(x[:1])
        paths = [site.module for site in attached.sites]
    counts: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts.append(torch.stack([(args[0] < 0).sum(), torch.tensor(args[0].numel(), device=x.device)]))

    handles = [network.get_submodule(path).register_forward_pre_hook(note) for path in paths]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    negative, everything = torch.stack(counts).sum(0)
    return 100 * int(negative) / int(everything)
