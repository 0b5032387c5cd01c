"""Where the paper on linear backpropagation places it in its networks: ``linbp:start=paper``."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from backpass.errors import BackpassError
from backpass.lab.placement_search import is_automatic
from backpass.models import MODELS
from backpass.models.lookup import is_the_labs
from backpass.models.text import read_model
from backpass.rules import LinBP, ProxProp, Rule, parse_rule
from backpass.rules.registry import PLACEHOLDERS

__all__ = ["PAPER", "parse_rule_for"]

PAPER = "paper"
"""The name that stands for the paper's placement, as ``start`` of ``linbp``."""

_ATTACK: dict[str, int | str] = {
    "densenet161": "features.transition3",
    "lenet5": -2,
    "mlp": -2,
    "mobilenetv2": "features.17",
    "resnet50": "layer4",
    "vgg16": -5,
    "wrn-28-10": -1,
}
_TRAINING = {**_ATTACK, "densenet161": "features.denseblock4"}
_HIDDEN = 3  # layers of the paper's MLP


def parse_rule_for(model: str, text: str, *, use: Literal["attack", "training", "listing"] = "attack") -> Rule:
    """Parse a rule; ``start=paper`` of LinBP becomes the paper's first linear site in this network.

    Args:
        model: the network's specification, for instance ``"resnet50:activation=silu"`` or ``"my_nets:Net"``.
        text: the rule's text form, for instance ``"linbp:start=paper"``.
        use: what for: attacks refuse rules for weights alone, and only they can choose ``start=auto``; the paper's
            placement for training differs from the others for DenseNet-161.

    Raises:
        UnknownNameError: no rule, or no setting of the rule, has that name.
        BackpassError: the text has another form, the paper does not say where to place it in this network, or the rule
            does not go with this use.

    Source: Li, Guo, Liu, Zhang (arXiv 2112.11018), Section 4.2, as their code has it.
    """
    rule = parse_rule(text, placeholders=PLACEHOLDERS)
    if use == "attack" and isinstance(rule, ProxProp):
        raise BackpassError(
            f"{text!r} changes the gradients of weights alone, and an attack follows that of the image, which would "
            "stay plain: attack with linbp or sibp."
        )
    if use != "attack" and is_automatic(rule):
        raise BackpassError(
            f"{text!r} is chosen by the success of attacks, for attacks: elsewhere say where, as in linbp:start=-2."
        )
    if isinstance(rule, LinBP) and rule.start == PAPER:
        return replace(rule, start=_paper_start(model, text, _TRAINING if use == "training" else _ATTACK))
    return rule


def _paper_start(model: str, text: str, starts: dict[str, int | str]) -> int | str:
    name, options = read_model(model, MODELS) if is_the_labs(model) else (model, {})
    if name not in starts or (name == "mlp" and len(options.get("widths", range(_HIDDEN))) != _HIDDEN):
        raise BackpassError(
            f"{text!r} names the paper's placement, which is known for {', '.join(sorted(starts))} (mlp with three "
            f"hidden layers) and not for {model!r}: say where, as in linbp:start=-2 or linbp:start=0.7; `backpass "
            "sites` lists the sites."
        )
    return starts[name]
