"""`ProxProp` in force on a model that solves at the optimizer's step, over all uses of a weight since the last.

Backward passes leave the plain gradient P in ``.grad`` and collect what the solve needs: the rows A and
their g while these are few, else A^T A. A hook before the optimizer's step puts D = (A^T A + I/tau)^{-1} P in the place
of P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from backpass.errors import BackpassError
from backpass.rules.implicit.attached import LayerAttached, holds_something, world_size
from backpass.rules.implicit.calls import COMPUTED
from backpass.rules.implicit.collected import Collected, Parameters, gather
from backpass.rules.implicit.layers import Gradients
from backpass.rules.implicit.memory import Memory
from backpass.rules.implicit.proximal import ProximalAttached, diverged
from backpass.rules.implicit.systems import NotFiniteError
from backpass.rules.implicit.uses import Use

__all__ = ["ProximalAtStep", "optimizers_of"]

_STATE = "backpass"


def optimizers_of(given: Any) -> list[Optimizer]:
    """Return the torch optimizers in one or several, also in the wrappers of Accelerate and Lightning.

    Raises:
        BackpassError: something else was given.
    """
    found = []
    for optimizer in given if isinstance(given, Iterable) and not isinstance(given, Optimizer) else [given]:
        while optimizer is not None and "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}):
            optimizer = getattr(optimizer, "optimizer", None)
        if not isinstance(optimizer, Optimizer):
            raise BackpassError(
                'solve="step" solves in the optimizer\'s step: '
                'ProxProp(solve="step").attach(model, optimizer=optimizer), with one torch.optim.Optimizer or a list '
                f"of them, got optimizer={given!r}."
            )
        found.append(optimizer)
    return found


class ProximalAtStep(ProximalAttached):
    """`ProxProp` in force on a model; it solves at the optimizer's step.

    Attributes:
        optimizers: whose steps solve; none in a copy of the model.
        memory: where averages are kept; None for the exact step.
    """

    transient = (*LayerAttached.transient, "optimizers", "memory", "_collected", "_exact", "_written", "_hooks")
    _hooks: Any = ()

    def __init__(self, rule: Any, model: nn.Module, optimizers: list[Optimizer], strict: bool) -> None:
        super().__init__(rule, model, strict)
        self.optimizers = optimizers
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        if self.memory is not None:
            self._hooks.append(optimizers[0].register_state_dict_post_hook(self._save))
            self._hooks.append(optimizers[0].register_load_state_dict_pre_hook(self._load))

    def start(self) -> None:
        """Initialise the state, also in a copy of the model."""
        super().start()
        rule, self.optimizers, self._hooks = self.rule, [], []
        self.memory = Memory(rule.share, rule.refresh, rule.memory_step) if rule.remembers else None
        self._collected: dict[str, Collected] = {}
        self._exact: set[str] = set()
        self._written: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def set(self, **settings: Any) -> None:
        """Change settings of the solve; see `LayerAttached.set`."""
        super().set(**settings)
        if self.memory is not None:
            self.memory.take(self.rule.memory_step)

    def remove(self) -> None:
        """Restore the model's own backward and the optimizer's own step; a second call does nothing."""
        super().remove()
        for hook in self._hooks:
            hook.remove()
        self._collected = {}

    def is_due(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether the next step needs the rows of a layer; else its calls can stay plain."""
        if self.memory is None:
            return True
        named = self.parameter(weight if weight.requires_grad or bias is None else bias)
        return named is None or self._is_due(named.name)

    def _is_due(self, name: str) -> bool:
        return self.memory is None or name in self._exact or self.memory.is_due(name)

    def directions(self, use: Use) -> Gradients:
        """Return the plain gradients, which ``.grad`` accumulates, and collect what the solve needs.

        Raises:
            BackpassError: no step of an optimizer would solve for this weight.
        """
        layer, grad = use.layer, use.grad
        parameters = self._learning(use)
        named = next(p for p in parameters if p is not None)
        x = use.x.to(grad.dtype) if use.x.is_floating_point() else use.x
        if not self._is_due(named.name):
            return layer.gradients(x, grad, *use.wants[1:])
        now = torch._C._current_graph_task_id()
        collected = self._collected.get(named.name)
        if not holds_something(named.parameter):
            # Nothing accumulated: what was collected before this pass was zeroed without a step, say by a GradScaler.
            if collected is not None and collected.last_pass != now:
                collected = None
        elif collected is None:
            raise BackpassError(
                f"the gradient of {named.name!r} holds something from before its first use since the last step: call "
                "optimizer.zero_grad() after each step."
            )
        if collected is None:
            self._refuse_shared(named.name, parameters)
            keep_rows = self.memory is None or (self.rule.chooses and named.name not in self.memory.layers)
            collected = Collected(use, parameters, self.step, keep_rows)
            self._collected[named.name] = collected
        collected.add(use, parameters, now)
        return layer.gradients(x, grad, *use.wants[1:])

    def _refuse_shared(self, name: str, parameters: Parameters) -> None:
        mine = {one.name for one in parameters if one is not None}
        for other, collected in self._collected.items():
            shared = mine.intersection(one.name for one in collected.parameters if one is not None)
            if other != name and shared:
                raise BackpassError(
                    f"{shared.pop()!r} belongs to the layers of {other!r} and {name!r}, which have no common Gram "
                    "matrix: leave one out by `where`."
                )

    def _learning(self, use: Use) -> Parameters:
        """Return weight and bias, those that learn."""
        named = [
            self.parameter(tensor) if want and tensor is not None else None
            for tensor, want in zip((use.weight, use.bias), use.wants[1:], strict=True)
        ]
        for one, tensor, want in zip(named, (use.weight, use.bias), use.wants[1:], strict=True):
            if want and tensor is not None and (one is None or use.functional or tensor.shape != one.parameter.shape):
                raise BackpassError(
                    f'solve="step" solves in the optimizer\'s step, and {self.describe(tensor)} is no parameter that '
                    "it would reach: gradients are taken by torch.func, or it is a part of a parameter, or computed "
                    f'from one. {COMPUTED} Or use solve="backward".'
                )
            held = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
            if one is not None and not any(one.parameter is p for p in held):
                raise BackpassError(
                    'solve="step" solves in the step of the optimizer it was attached with, which does not have '
                    f"{one.name!r}: attach with the optimizers that do, optimizer=[first, second]; to a copy of a "
                    "model attach the rule anew."
                )
        return named[0], named[1]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._solve(optimizer)
            return None

        def closure_and_solve() -> Any:
            loss = closure()
            self._solve(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_solve}
        return (args[0], closure_and_solve, *args[2:]), kwargs

    @torch.no_grad()
    def _solve(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = dict(self.model.named_parameters())
        mine = {
            name: one
            for name, one in self._collected.items()
            if any(p is not None and id(p.parameter) in held for p in one.parameters)
        }
        for name in mine:
            del self._collected[name]
        if world_size() > 1:
            gather([name for name, p in named.items() if id(p) in held], mine)
        for name, one in mine.items():
            try:
                if self._remembers(name, one):
                    assert self.memory is not None  # noqa: S101  it remembers
                    self.memory.update(name, one)
                else:
                    self._write(one.direction, *(p and p.parameter for p in one.parameters))
            except NotFiniteError:
                raise diverged(f"the layer of {name!r}") from None
        if self.memory is not None:
            self.memory.spread()
            for name, layer in self.memory.layers.items():
                learning = [named.get(one) if one else None for one in layer.names]
                if any(id(p) in held for p in learning):
                    self._write(partial(self.memory.direction, name), *learning)

    def _remembers(self, name: str, one: Collected) -> bool:
        """Return whether a layer has a memory; decided at its first step."""
        if self.memory is None or name in self._exact:
            return False
        if name in self.memory.layers or not self.rule.chooses or self.memory.pays(one):
            return True
        self._exact.add(name)
        return False

    def _write(
        self, direction: Callable[[Gradients], Gradients], weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> None:
        """Replace the plain gradients in ``.grad`` by D, once."""
        plain = tuple(None if p is None else p.grad for p in (weight, bias))
        if any(p is not None and g is None for p, g in zip((weight, bias), plain, strict=True)):
            return  # zeroed after the backward pass: the optimizer passes it over
        for gradient in plain:
            if gradient is not None and self._is_written(gradient):
                return
        for gradient, value in zip(plain, direction((plain[0], plain[1])), strict=True):
            if gradient is not None and value is not None:
                if value.data_ptr() != gradient.data_ptr():
                    gradient.copy_(value.view_as(gradient))
                self._written[gradient] = gradient._version

    def _is_written(self, gradient: Tensor) -> bool:
        """Return whether a gradient is a direction already: of a step before, or of another optimizer."""
        return gradient in self._written and bool(self._written[gradient] == gradient._version)

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        assert self.memory is not None  # noqa: S101  the hook is there with it
        state[_STATE] = {"memory": self.memory.state_dict(), "exact": sorted(self._exact)}

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved = state.pop(_STATE, None)
        if saved is not None and self.memory is not None:
            self.memory.load_state_dict(saved["memory"])
            self._exact = set(saved["exact"])
