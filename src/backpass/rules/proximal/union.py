"""One proximal step over everything that contributed since the last optimizer step.

Backward passes leave the plain gradient P in ``.grad`` and collect what the solve needs: the rows A and their g while
these are few, else A^T A. A hook before the optimizer's step puts D = (A^T A + I/tau)^{-1} P in the place of P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from backpass.errors import BackpassError
from backpass.rules.damped import NotFiniteError
from backpass.rules.layers.linear_layer import Gradients
from backpass.rules.proximal.collected import Collected
from backpass.rules.proximal.contributions import Contributions, Named, Use, holds_something, world_size
from backpass.rules.proximal.direction import ProximalStep
from backpass.rules.proximal.gathering import gather

__all__ = ["Union"]


class Union(Contributions):
    """Collects the uses of every weight, and solves before the optimizer's step.

    Attributes:
        optimizer: whose step it is; None in a copy of the model, which no optimizer knows.
    """

    def __init__(self, model: Callable[[], nn.Module | None], step: ProximalStep, optimizer: Optimizer | None) -> None:
        super().__init__(model, step)
        self.optimizer = optimizer
        self._collected: dict[str, Collected] = {}
        self._hook = optimizer.register_step_pre_hook(self._before_step) if optimizer else None

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        super().remove()
        if self._hook:
            self._hook.remove()
        self._collected.clear()

    def take(self, use: Use) -> Gradients:
        """The plain gradients, which ``.grad`` accumulates; what the solve needs is collected.

        Raises:
            BackpassError: no step of the optimizer would solve for this weight.
        """
        named = self._learning(use)
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
            collected = self._collected[named.name] = Collected(use, self.parameter, self.step)
        collected.add(use, now)
        return use.layer.gradients(
            use.x.to(use.grad.dtype) if use.x.is_floating_point() else use.x, use.grad, *use.wants
        )

    def _learning(self, use: Use) -> Named:
        """The parameter that learns, the bias where the weight is frozen."""
        learning = use.weight if use.wants[0] else use.bias
        named = self.parameter(learning) if learning is not None else None
        if use.functional or named is None:
            raise BackpassError(
                f"union=True solves in the optimizer's step, and {self.describe(use.weight)} is no parameter that it "
                "would reach: gradients are taken by torch.func, or the weight is computed from other parameters. "
                "Use union=False there, or leave the layer out by `where`."
            )
        groups = self.optimizer.param_groups if self.optimizer else []
        if not any(named.parameter is p for group in groups for p in group["params"]):
            raise BackpassError(
                f"union=True solves in the step of the optimizer it was attached with, which does not have "
                f"{named.name!r}: attach with the optimizer that does; to a copy of a model attach the rule anew."
            )
        return named

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if kwargs.get("closure") is not None or any(a is not None for a in args[1:]):
            raise BackpassError(
                "union=True cannot act in optimizer.step(closure): the closure computes gradients only after the "
                "solve. Call loss.backward() first and then optimizer.step()."
            )
        collected, self._collected = self._collected, {}
        if world_size() > 1:
            gather([one.name for one in self.named_parameters()], collected)
        for name, one in collected.items():
            try:
                one.solve()
            except NotFiniteError:
                raise NotFiniteError(
                    f"the inputs of the layer of {name!r} are not finite, so it has no proximal step: the network has "
                    "diverged. Lower the learning rate or tau, and look at the losses of the steps before."
                ) from None
