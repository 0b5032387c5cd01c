"""`list_sites`: what a rule could act on."""

from __future__ import annotations

from typing import Any

from torch import nn

from backpass.errors import UnknownNameError
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attached import probe
from backpass.rules.linear_calls import LINEAR, OPAQUE
from backpass.rules.normalizations import NORMALIZATIONS
from backpass.rules.sites import SiteTable
from backpass.rules.wrappers import unwrap

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
    return probe(unwrap(model), _KINDS[kind], args, kwargs)
