"""Ensembles of models, attacked as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from backpass.errors import BackpassError, UnknownNameError

__all__ = ["Ensemble"]

_MEANS = ("logits", "losses", "gradients")


class Ensemble(nn.Module):
    """Several models as one source of adversarial images; rules are attached to its members.

    Args:
        members: models (B, ...) -> (B, C), with the same classes.
        mean: quantity that is averaged: ``"logits"`` (Liu et al. 2017 average probabilities), ``"losses"``, or
            ``"gradients"``, each divided by its mean absolute value, so that no member dominates. The prediction is
            that of the mean logits in every case.

    Raises:
        BackpassError: there are no members, or one is no module.
        UnknownNameError: no mean has this name.

    Source:
        Liu et al., Delving into transferable adversarial examples (2017), section 4; Dong et al., Boosting adversarial
        attacks with momentum (2018), section 3.2.
    """

    def __init__(self, members: Sequence[nn.Module], *, mean: str = "logits") -> None:
        super().__init__()
        members = [] if isinstance(members, nn.Module) else list(members)
        if not members or not all(isinstance(member, nn.Module) for member in members):
            raise BackpassError(f"an ensemble needs a list of at least one torch.nn.Module; got {members!r}.")
        if mean not in _MEANS:
            raise UnknownNameError("mean", str(mean), _MEANS)
        self.members, self.mean = nn.ModuleList(members), mean

    def forward(self, x: Tensor) -> list[Any]:
        """Return the members' outputs."""
        return [member(x.clone()) for member in self.members]
