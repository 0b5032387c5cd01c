"""Base class of all rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from backpass.errors import BackpassError
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.override import BackwardOverride
from backpass.rules.text import format_settings

__all__ = ["BP", "Rule"]


@dataclass(frozen=True, kw_only=True)
class Rule(BackwardOverride):
    """A replacement backward for some torch functions at chosen sites of a model; the forward is unchanged.

    A subclass is a frozen dataclass with a ``name``, the ``functions`` that it overrides, and `replace`.
    """

    def attach(self, model: nn.Module, *, strict: bool = False) -> Attached:
        """Override the backward of ``model`` until `Attached.remove` or the end of a ``with`` block.

        Wrappers (``torch.compile``, DDP, DataParallel) are unwrapped. If two rules select the same
        site, the one attached last acts. Call the model itself, not its ``forward``.

        Args:
            model: the model.
            strict: True to raise an error if the rule cannot reach a part of the model; False warns and lists the part
                in `Attached.unreachable`.

        Raises:
            NoSiteError: the model is scripted, so its operations cannot be reached; or, with ``strict``, a part of it.
            BackpassError: ``model`` is no ``nn.Module``, or does not fit the rule's settings.
        """
        if self.functions and type(self).replace is Rule.replace:
            raise BackpassError(f"{type(self).__name__} names functions and would leave them plain: define replace().")
        return Attached(self, model, strict=strict)

    def __str__(self) -> str:
        return format_settings(self.name, self)


@dataclass(frozen=True, kw_only=True)
class BP(Rule):
    """Plain backpropagation: overrides nothing. Baseline of comparisons."""

    name: ClassVar[str] = "bp"
    functions = {}  # noqa: RUF012
    needs_site: ClassVar[bool] = False
