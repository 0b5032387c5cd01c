"""Listing of the sites of a model that a rule can act on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from backpass.errors import UnknownNameError
from backpass.rules.activation_rule import ActivationRule
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.override import BackwardOverride, TorchFunction
from backpass.rules.attaching.run import SiteCall
from backpass.rules.implicit.calls import LINEAR, NORMALIZATIONS, OPAQUE, PRODUCTS
from backpass.rules.implicit.interception import LayerInterception
from backpass.rules.sites import SiteTable

__all__ = ["list_sites"]

_KINDS = ("activation", "linear")


def list_sites(model: nn.Module, *args: Any, kind: str = "activation", **kwargs: Any) -> SiteTable:
    """Return the sites of a model in call order, as a printable table that also lists unreachable parts.

    Costs one forward pass. Buffers, random states and hooks are restored.

    Args:
        model: any module.
        args: arguments of the model's call, for instance ``x``.
        kind: ``"activation"``, the sites of `LinBP`, or ``"linear"``, those of `ProxProp`.
        kwargs: keyword arguments of the model's call.

    Raises:
        UnknownNameError: ``kind`` is unknown.
        NoSiteError: the model is scripted.
    """
    if kind not in _KINDS:
        raise UnknownNameError("kind of site", kind, _KINDS)
    attached = _Activations(stop=0).attach(model) if kind == "activation" else _LinearAttached(_Linear(), model)
    with attached:
        attached.learn(*args, **kwargs)
        table = attached.seen
        table.unreachable = attached.unreachable
    return table


class _Listing(BackwardOverride):
    """Override that records the sites of some functions and changes nothing."""

    name = "listing"
    needs_site = False
    stop = 0

    def __str__(self) -> str:
        return "a rule"


class _Activations(ActivationRule):
    name = "listing"
    needs_site = False

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad

    def __str__(self) -> str:
        return "a rule"


class _Linear(_Listing):
    functions: ClassVar[Mapping[TorchFunction, str]] = {**LINEAR, **PRODUCTS, **NORMALIZATIONS}
    opaque = OPAQUE


class _LinearInterception(LayerInterception):
    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class _LinearAttached(Attached):
    interception = _LinearInterception
