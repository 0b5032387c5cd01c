"""How layers reach the rules with implicit steps: the seam to the mechanism of `attaching`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.attaching.attached import attachments
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.override import BackwardOverride, TorchFunction
from backpass.rules.implicit.calls import OPAQUE, PRODUCTS, LinearCall, linear_call, product_call
from backpass.rules.torch_internals import constant_while_tracing

__all__ = ["LayerInterception", "is_functional", "refuse_model"]


@constant_while_tracing
def is_functional() -> bool:
    """Whether ``torch.func`` takes the gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_model(rule: BackwardOverride, model: nn.Module) -> None:
    """Refuse a model to which a rule with implicit steps cannot be attached.

    Raises:
        BackpassError: an equal rule is attached, or the parameters are sharded.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    tensors = sys.modules.get("torch.distributed.tensor")
    sharded = any(isinstance(module, kinds) for module in model.modules()) or (
        tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())
    )
    if sharded:
        raise BackpassError(
            f"the parameters of this model are sharded (FSDP or tensor parallel), and {type(rule).__name__} solves with "
            "whole weight matrices, which no process has: use DistributedDataParallel with "
            'ProxProp(solve="step").attach(model, optimizer=optimizer).'
        )
    if any(attached.rule == rule for attached in attachments(model)):
        raise BackpassError(f"{rule} is attached to this model already: remove it first, or do not attach it again.")


class LayerInterception(Interception):
    """An interception of calls that are linear in a weight."""

    _product: LinearCall | BackpassError | None = None

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.rule.functions or not self.is_site(func, args, kwargs):
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def is_site(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of one of the rule's functions is a layer: matrix products are with one parameter."""
        if func not in PRODUCTS:
            return True
        try:
            self._product = product_call(func, args, kwargs, self._is_parameter)
        except BackpassError as error:
            self._product = error  # raised where the rule acts on the call
        return self._product is not None

    def _is_parameter(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        if not is_functional():
            return False
        try:
            module = self.attached.model.get_submodule(self.running[-1].path)  # type: ignore[attr-defined]
        except AttributeError:
            return False
        return any(tensor is p for p in module._parameters.values())

    def layer(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall | None:
        """The call as a layer with something to learn, or None, and then the rule does not act on it.

        Raises:
            BackpassError: the layer is out of reach, or has no implicit step.
        """
        if func in OPAQUE:
            raise BackpassError(
                f"{OPAQUE[func]!r} in module {self.running[-1].path or '(model)'!r} computes its linear layers out of "
                f"sight, so {type(self.rule).__name__} cannot act on them. Leave it plain by "
                f"where=lambda site: site.function != {OPAQUE[func]!r}, or write it with nn.Linear."
            )
        call = self._product if func in PRODUCTS else linear_call(func, args, kwargs)
        if isinstance(call, BackpassError):
            raise call
        if call is None or not call.learns:
            return None
        return call
