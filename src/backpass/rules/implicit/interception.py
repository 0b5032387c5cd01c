"""How layers reach the rules with implicit steps: the seam to the mechanism of `attaching`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception, choose
from backpass.rules.attaching.override import BackwardOverride, TorchFunction
from backpass.rules.attaching.run import SiteCall
from backpass.rules.attaching.wrappers import unwrap
from backpass.rules.implicit.calls import PRODUCTS, LinearCall, learns, linear_call, product_call
from backpass.rules.implicit.uses import Contributions

__all__ = ["LayerAttached", "LayerInterception"]


def _refuse_sharded(rule: BackwardOverride, model: nn.Module) -> None:
    """Refuse a model whose parameters no process has as a whole.

    Raises:
        BackpassError: the parameters are sharded.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    tensors = sys.modules.get("torch.distributed.tensor")
    sharded = any(isinstance(module, kinds) for module in model.modules()) or (
        tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())
    )
    if sharded:
        raise BackpassError(
            f"the parameters of this model are sharded (FSDP or tensor parallel), and {type(rule).__name__} solves "
            "with whole weight matrices, which no process has: use DistributedDataParallel with "
            'ProxProp(solve="step").attach(model, optimizer=optimizer).'
        )


class LayerAttached(Attached):
    """A rule with implicit steps in force on a model.

    Attributes:
        contributions: what the weights' uses contribute.
        excluded: keys of layers in which nothing learns.
    """

    contributions: Contributions

    def __init__(self, rule: BackwardOverride, model: nn.Module, strict: bool) -> None:
        _refuse_sharded(rule, unwrap(model))
        self.excluded: set[str] = set()
        super().__init__(rule, model, strict=strict)

    def remove(self) -> None:
        """Give the model its own backward again, and the optimizer its own step; a second call does nothing."""
        super().remove()
        self.contributions.remove()

    def contribute(self) -> None:
        """Make `contributions` anew, for a copy of the model."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["contributions"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.contribute()


class LayerInterception(Interception):
    """An interception of calls that are linear in a weight."""

    attached: LayerAttached
    _product: LinearCall | BackpassError | None = None

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.rule.functions and not self.is_site(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def is_site(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call of one of the rule's functions is a layer: products are with one parameter."""
        if func not in PRODUCTS:
            return True
        try:
            self._product = product_call(func, args, kwargs, self._is_parameter)
        except BackpassError as error:
            self._product = error  # raised where the rule acts on the call
        if self._product is None and any(
            isinstance(x, Tensor) and x.requires_grad and self._is_parameter(x) for x in tree_leaves((args, kwargs))
        ):
            name = PRODUCTS[func]
            self.note_unreachable(
                self.running[-1].path, f"{name} of several parameters is linear in none of them alone"
            )
        return self._product is not None

    def _is_parameter(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        if not torch_internals.transforms():
            return False
        try:
            module = self.attached.model.get_submodule(self.running[-1].path)
        except AttributeError:
            return False
        return any(tensor is p for p in module._parameters.values())

    def at(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer; where nothing in it learns, the rule does not act."""
        excluded = self.attached.excluded
        if not learns(func, args, kwargs, self._product):
            excluded.add(site.key)
            site.excluded, site.selected, site.fixed = True, False, True
            return func(*args, **kwargs)
        if site.key in excluded:  # the plan knows it as frozen
            excluded.discard(site.key)
            self.run.plan, site.selected = None, site.selected if site.fixed else None
        if site.selected is None and not self.run.relative:
            self.run.decide_early(site)
        return super().at(site, func, args, kwargs)

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None) -> Any:
        """Call a layer with the rule's backward."""
        try:
            layer = self._layer(func, args, kwargs)
        except BackpassError as error:
            if site is None or (site.selected and site.fixed):
                raise
            return self._refuse_if_active(func(*args, **kwargs), site, error)
        if layer is None:
            return func(*args, **kwargs)
        if site is not None and any(
            isinstance(mode, Interception) and func in mode.rule.functions for mode in torch_internals.function_modes()
        ):
            plain = func(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                replaced = self.node(layer, func, args, kwargs, None)
            return choose(plain, replaced, site)
        return self.node(layer, func, args, kwargs, site)

    def node(
        self,
        layer: LinearCall,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: SiteCall | None,
    ) -> Any:
        """Return the value of a layer with the rule's backward."""
        raise NotImplementedError

    def check_layer(self, layer: LinearCall) -> None:
        """Refuse a layer.

        Raises:
            BackpassError: as the rule says.
        """

    def _layer(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall | None:
        """Return the call as a layer with something to learn, or None."""
        call = self._product if func in PRODUCTS else linear_call(func, args, kwargs)
        if isinstance(call, BackpassError):
            raise call
        if call is None or not call.learns:
            return None
        self.check_layer(call)
        return call

    @staticmethod
    def _refuse_if_active(out: Any, site: SiteCall, error: BackpassError) -> Any:
        def refuse(grad: Tensor) -> None:
            if site.active():
                raise error

        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(refuse)  # type: ignore[no-untyped-call]
        return out
