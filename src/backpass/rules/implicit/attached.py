"""Rules with implicit steps attached to a model: its parameters by name, and checks of their uses."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.override import BackwardOverride
from backpass.rules.attaching.wrappers import unwrap
from backpass.rules.implicit.calls import COMPUTED
from backpass.rules.implicit.interception import LayerInterception
from backpass.rules.implicit.uses import Found, Use, register

__all__ = ["LayerAttached", "Named", "holds_something", "world_size"]


class Named(NamedTuple):
    """A parameter of the model and its name there."""

    name: str
    parameter: nn.Parameter


class LayerAttached(Attached):
    """A rule with implicit steps attached to a model.

    Attributes:
        step_name: the kind of step, for errors.
        way_out: advice where several uses of a weight contribute.
        settable: names of the settings that `set` changes.
        excluded: keys of layers in which nothing learns.
    """

    interception: type[Interception] = LayerInterception
    step_name: ClassVar[str]
    way_out: ClassVar[str] = ""
    settable: ClassVar[tuple[str, ...]]
    transient: ClassVar[tuple[str, ...]] = ("_named", "_uses", "_early")
    _early: Any = ()
    rule: Any

    def __init__(self, rule: BackwardOverride, model: nn.Module, strict: bool) -> None:
        _refuse_sharded(rule, unwrap(model))
        self.excluded: set[str] = set()
        super().__init__(rule, model, strict=strict)
        self.start()
        self._early = [
            parameter.register_post_accumulate_grad_hook(self._refuse_early)  # type: ignore[no-untyped-call]
            for parameter in self.model.parameters()
            if parameter.is_leaf and parameter.requires_grad and not is_lazy(parameter)
        ]

    def start(self) -> None:
        """Initialise the state, also in a copy of the model."""
        self._named: dict[int, list[Named]] = {}
        self._uses: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._early: list[Any] = []
        register(self.token, self)

    def gradients(self, use: Use) -> Found:
        """Return the gradients of input, weight and bias that are wanted."""
        raise NotImplementedError

    def set(self, **settings: Any) -> None:
        """Change settings from the next backward pass or step on, for schedules.

        Args:
            settings: values by the rule's names: ``tau`` and ``cg_steps`` of `ProxProp`, all but ``where`` of `SIBP`.

        Raises:
            BackpassError: another setting, or a value out of its range.
        """
        for name in settings:
            if name not in self.settable:
                raise UnknownNameError("setting that can change while the rule is attached", name, self.settable)
        self.rule = replace(self.rule, **settings)

    @property
    def active(self) -> bool:
        """True until the rule is removed."""
        return not self._removed

    def remove(self) -> None:
        """Restore the model's own backward and the optimizer's own step; a second call does nothing."""
        super().remove()
        while self._early:
            self._early.pop().remove()

    def parameter(self, tensor: Tensor) -> Named | None:
        """Return the parameter in whose memory this tensor lies: compiled code knows no other identity."""
        key = tensor.untyped_storage().data_ptr()
        found = self._named.get(key, [])
        if not found or any(one.parameter.untyped_storage().data_ptr() != key for one in found):
            self._named = {}
            for name, p in self.model.named_parameters():
                if not is_lazy(p):
                    self._named.setdefault(p.untyped_storage().data_ptr(), []).append(Named(name, p))
            found = self._named.get(key, [])
        if len(found) > 1:  # parameters that are pieces of one vector
            begin = tensor.storage_offset()
            found = [one for one in found if _extent(one.parameter)[0] <= begin < _extent(one.parameter)[1]]
        return found[0] if found else None

    def describe(self, weight: Tensor) -> str:
        """Return the weight's name, for errors."""
        named = self.parameter(weight)
        return f"the layer of {named.name!r}" if named else f"the layer with a weight of shape {tuple(weight.shape)}"

    def admit(self, use: Use) -> None:
        """Admit the one use of weight and bias whose step is exact.

        Raises:
            BackpassError: the weight has another contribution already, or several processes contribute.
        """
        step = self.step_name
        if world_size() > 1:
            raise BackpassError(
                f"{world_size()} processes contribute to {self.describe(use.weight)}, and the average of their {step} "
                f"steps is not the step of the whole batch: {self.way_out}."
            )
        for tensor, wanted in ((use.weight, use.wants[1]), (use.bias, use.wants[2])):
            if tensor is not None and wanted:
                self._admit(tensor)

    def _admit(self, tensor: Tensor) -> None:
        named = self.parameter(tensor)
        leaf = named.parameter if named else tensor
        if named is None and not (leaf.is_leaf and leaf.requires_grad):
            raise BackpassError(f"{self.describe(tensor)} is computed from other parameters. {COMPUTED}")
        now = torch._C._current_graph_task_id()
        task, before = self._uses.get(id(leaf), (-1, []))
        before = before if task == now and now >= 0 else []
        begin, end = _extent(tensor)
        twice = any(begin < stop and start < end for start, stop in before)
        if twice or holds_something(leaf):
            how = "is used twice in one backward pass" if twice else "has a gradient from a backward pass before"
            raise BackpassError(
                f"{named.name if named else 'a weight'!r} {how}, and the sum of two {self.step_name} steps is not the "
                f"step of both: call optimizer.zero_grad() after each step, or {self.way_out}."
            )
        self._uses[id(leaf)] = (now, [*before, (begin, end)])

    def _refuse_early(self, parameter: Tensor) -> None:
        while self._early:
            self._early.pop().remove()
        if not self.seen:
            raise BackpassError(
                f"{self.describe(parameter)} has a gradient from a forward pass before the rule was attached, which is "
                "plain backpropagation: attach the rule first, then call the model."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in self.transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.start()


def _refuse_sharded(rule: BackwardOverride, model: nn.Module) -> None:
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


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first and one past the last entry of a tensor in its storage."""
    begin = int(tensor.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + int(reach) + 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def holds_something(parameter: Tensor) -> bool:
    """Return whether a parameter's gradient is there and not zero."""
    return parameter.grad is not None and bool(parameter.grad.any())
