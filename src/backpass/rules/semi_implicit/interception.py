"""Interception for `SIBP`: a layer and the activation on its output get a joint backward."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.implicit.calls import LinearCall
from backpass.rules.implicit.interception import LayerInterception
from backpass.rules.implicit.uses import Call, implicit_layer
from backpass.rules.semi_implicit.elementwise import elementwise

__all__ = ["SemiImplicitInterception"]


class SemiImplicitInterception(LayerInterception):
    """Interception that applies the semi-implicit backward to layers, jointly with the following activation.

    Attributes:
        outputs: outputs of layers without an activation so far, with the layer and its module call.
        recomputed: outputs that a checkpoint will recompute, with its module call.
    """

    attached: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[tuple[Tensor, LinearCall, Any]] = []
        self.recomputed: list[tuple[ref[Tensor], Any]] = []

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no layer; an activation on a layer's output joins the backward of the layer."""
        if func in ACTIVATIONS and (self.outputs or self.recomputed) and not _is_overridden(func):
            found = elementwise(func, args, kwargs)
            if found is not None:
                self._refuse_parted(found[1], found[0].name)
                for at, (z, layer, _) in enumerate(self.outputs):
                    if z is found[1] and torch.is_grad_enabled():
                        self.outputs.pop(at)
                        return self._activate(layer, *found)
        return super().call_other(caller, func, args, kwargs)

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer; without gradients, record the checkpoint that will recompute it."""
        z = super().call_site(site, func, args, kwargs)
        if not torch.is_grad_enabled() and site.selected:
            place = _checkpointed_without_gradients(self.running)
            if place is not None:
                self.recomputed.append((ref(z), place))
        return z

    def accepts(self, call: LinearCall) -> bool:
        """Return True.

        Raises:
            BackpassError: float16 inputs without ``attach(model, scaler=...)``.
        """
        kind = call.weight.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if (autocast or call.weight.dtype == torch.float16) and self.attached.scaler is None:
            raise BackpassError(
                "float16 needs a scaled loss, and a semi-implicit step is no linear function of the loss's scale: "
                "attach the rule with attach(model, scaler=scaler), or use bfloat16 (torch.autocast with "
                "dtype=torch.bfloat16), which needs none."
            )
        return True

    def node(self, layer: LinearCall, site: SiteCall | None) -> Any:
        """Return the output of a layer with its own backward, which is unused if an activation follows."""
        z = super().node(layer, site)
        if layer.batched:
            self.outputs.append((z, layer, None if is_dynamo_compiling() else torch_internals.checkpoint_hooks()))
        return z

    def _refuse_parted(self, z: Tensor, name: str) -> None:
        """Raise an error if a checkpoint separates an activation from its layer."""
        if is_dynamo_compiling():
            return
        here = _checkpointed_without_gradients(self.running)
        parted = any(one() is z and place is not here for one, place in self.recomputed)
        for output, _, hooks in self.outputs:
            if output is z:
                now = torch_internals.checkpoint_hooks()
                parted |= here is not None or (now is not None and now is not hooks)
        if parted:
            raise BackpassError(
                f"{name!r} in module {self.running[-1].path or '(model)'!r} and the layer it is called on lie on two "
                "sides of a checkpoint's border: recomputed apart, they would not be one sub-problem. Checkpoint them "
                "in the same block."
            )

    def _activate(self, layer: LinearCall, s: Any, z: Tensor, in_place: bool) -> Tensor:
        before = z.detach().clone() if in_place else z.detach()
        call = Call(layer.text, (s.name, s.numbers), torch_internals.transforms(), self.attached.token)
        y = implicit_layer(layer.x, layer.weight, layer.bias, before, s.value, call)
        # Detach from the node of the layer, which is replaced by the joint one.
        return z.detach_().copy_(y) if in_place else y


def _is_overridden(func: TorchFunction) -> bool:
    """Return True if an outer rule overrides the function."""
    modes = torch_internals.function_modes()
    return any(isinstance(mode, Interception) and func in mode.rule.functions for mode in modes)


def _checkpointed_without_gradients(running: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the module call that a reentrant checkpoint runs without gradients and will recompute, or None.

    Args:
        running: the chain of module calls, the outermost first.
    """
    if torch.is_grad_enabled() or not running[0].grad_enabled:
        return None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return next((call for call in running if not call.grad_enabled), None)
    return None
