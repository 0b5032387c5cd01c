"""Interception of linear layers for the rules with implicit steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.interception import Interception, choose
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import SiteCall
from backpass.rules.implicit.calls import PRODUCTS, LinearCall, learns, read_call
from backpass.rules.implicit.uses import Call, implicit_layer

if TYPE_CHECKING:
    from backpass.rules.implicit.attached import LayerAttached

__all__ = ["LayerInterception"]


class LayerInterception(Interception):
    """An interception of calls that are linear in a weight."""

    attached: LayerAttached
    _call: LinearCall | BackpassError | None = None
    """Current call, or the error to raise if the rule acts on it."""

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.functions and not self.is_site(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def is_site(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call of one of the rule's functions is a layer: products are with one parameter."""
        try:
            self._call = read_call(func, args, kwargs, self._is_parameter)
        except BackpassError as error:
            self._call = error
        if func not in PRODUCTS or self._call is not None:
            return True
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, Tensor) and x.requires_grad and self._is_parameter(x) for x in leaves):
            self.note_unreachable(self.running[-1].path, f"{PRODUCTS[func]} of parameters is not read as a layer")
        return False

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or a view of one."""
        if isinstance(tensor, nn.Parameter) or (
            not is_dynamo_compiling() and isinstance(tensor._base, nn.Parameter) and tensor.requires_grad
        ):
            return True
        if not torch_internals.transforms():
            return False
        try:
            module = self.attached.model.get_submodule(self.running[-1].path)
        except AttributeError:
            return False
        return any(tensor is p for p in module._parameters.values())

    def _is_plain(self) -> bool:
        """Return whether nothing learns in the call at hand."""
        return self._call is None or (isinstance(self._call, LinearCall) and not learns(self._call))

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer; where nothing in it learns, the rule does not act."""
        excluded = self.attached.excluded
        if self._is_plain():
            excluded.add(site.key)
            site.excluded, site.selected, site.fixed = True, False, True
            return func(*args, **kwargs)
        if site.key in excluded:  # the plan knows it as frozen
            excluded.discard(site.key)
            self.run.plan, site.selected, site.fixed = None, None, False
        if site.selected is None and not self.run.relative:
            self.run.decide_early(site)
        return super().call_site(site, func, args, kwargs)

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None) -> Any:
        """Call a layer with the rule's backward."""
        call = self._call
        try:
            if isinstance(call, BackpassError):
                raise call
            acts = call is not None and learns(call) and self.accepts(call)
        except BackpassError as error:
            if site is None or (site.selected and site.fixed):
                raise
            return self._refuse_if_active(func(*args, **kwargs), site, error)
        if call is None or not acts:
            return func(*args, **kwargs)
        if call.before is not None:
            call = call.before()
        if site is not None and any(
            isinstance(mode, Interception) and func in mode.rule.functions for mode in torch_internals.function_modes()
        ):
            plain = func(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                replaced = self.node(call, None)
            return choose(plain, replaced, site)
        return self.node(call, site)

    def accepts(self, call: LinearCall) -> bool:
        """Return whether a layer gets the rule's backward.

        Raises:
            BackpassError: the rule refuses the layer.
        """
        return True

    def node(self, layer: LinearCall, site: SiteCall | None) -> Any:
        """Return the value of a layer whose gradients come from this attachment in the backward pass."""
        call = Call(layer.text, ("", ()), torch_internals.transforms(), self.attached.token, site)
        z = implicit_layer(layer.x, layer.weight, layer.bias, layer.z, layer.compute, call)
        return z if layer.batched else z.squeeze(0)

    @staticmethod
    def _refuse_if_active(out: Any, site: SiteCall, error: BackpassError) -> Any:
        def refuse(grad: Tensor) -> None:
            if site.active():
                raise error

        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(refuse)  # type: ignore[no-untyped-call]
        return out
