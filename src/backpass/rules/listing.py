"""`list_sites`: what a rule could act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from backpass.errors import UnknownNameError
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.redefinition import Redefinition, TorchFunction
from backpass.rules.implicit.calls import LINEAR, NORMALIZATIONS, OPAQUE
from backpass.rules.sites import SiteTable

__all__ = ["list_sites"]

_KINDS = {"activation": ACTIVATIONS, "linear": {**LINEAR, **NORMALIZATIONS, **OPAQUE}}


def list_sites(model: nn.Module, *args: Any, kind: str = "activation", **kwargs: Any) -> SiteTable:
    """The sites of a model, in call order; prints as a table.

    Costs one forward pass, after which buffers, random states and hooks are what they were.

    Args:
        model: any module.
        args: what the model is called with, for instance ``x``.
        kind: ``"activation"``, the sites of `LinBP`, or ``"linear"``, those of `ProxProp`.
        kwargs: keyword arguments of the model's call.

    Raises:
        UnknownNameError: ``kind`` is not known.
        NoSiteError: the model is scripted.
    """
    if kind not in _KINDS:
        raise UnknownNameError("kind of site", kind, _KINDS)
    with Attached(_Listing(_KINDS[kind]), model) as listing:
        listing.probe(args, kwargs)
        return listing.seen


class _Listing(Redefinition):
    """Sees the sites of some functions and changes nothing."""

    name = "listing"
    needs_site = False

    def __init__(self, functions: Mapping[TorchFunction, str]) -> None:
        self.functions = functions  # type: ignore[misc]

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        return 0, 0
