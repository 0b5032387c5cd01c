"""What the uses of an attached model's weights contribute to one optimizer step, and whether that is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from backpass.errors import BackpassError
from backpass.rules.damped import NotFiniteError
from backpass.rules.layers.linear_layer import Gradients, LinearLayer
from backpass.rules.proximal.direction import ProximalStep, direction

__all__ = ["Contributions", "Named", "Use", "holds_something", "world_size"]


class Use(NamedTuple):
    """One use of a weight in a backward pass: z = A Theta.

    Attributes:
        layer: what kind of layer it is.
        x: its input.
        grad: the gradient of z, in the precision to solve in.
        weight: the weight.
        bias: the bias, or None.
        wants: whether weight and bias learn.
        functional: whether ``torch.func`` returns the gradients instead of accumulating them.
        borrowed: whether someone may write into ``x`` later.
    """

    layer: LinearLayer
    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    wants: tuple[bool, bool]
    functional: bool
    borrowed: bool


class Named(NamedTuple):
    """A parameter of the model and its name there."""

    name: str
    parameter: nn.Parameter


class Contributions:
    """The default: each use of a weight gives its direction at once, which is exact if it is the only one.

    Attributes:
        step: how to solve.
    """

    def __init__(self, model: Callable[[], nn.Module | None], step: ProximalStep) -> None:
        self._model = model
        self.step = step
        self._named: dict[tuple[int, torch.Size], Named] = {}
        self._pass: dict[str, int] = {}

    def remove(self) -> None:
        """Forget everything; the rule is taken off the model."""
        self._named.clear()

    def named_parameters(self) -> list[Named]:
        """The parameters of the model, which is not kept alive."""
        model = self._model()
        return [Named(name, p) for name, p in model.named_parameters()] if model is not None else []

    def parameter(self, tensor: Tensor) -> Named | None:
        """The model's parameter that shares this tensor's memory: in compiled code there is no other way to tell."""
        key = (tensor.data_ptr(), tensor.shape)
        found = self._named.get(key)
        if found is None or found.parameter.data_ptr() != key[0]:
            self._named = {(one.parameter.data_ptr(), one.parameter.shape): one for one in self.named_parameters()}
            found = self._named.get(key)
        return found

    def take(self, use: Use) -> Gradients:
        """What the use passes to the gradients of its weight and bias.

        Raises:
            BackpassError: the weight has another contribution already, or several processes contribute.
        """
        if not use.functional:
            self._admit(use)
        try:
            return direction(use.layer, use.x, use.grad, use.wants, self.step)
        except NotFiniteError:
            raise NotFiniteError(
                f"the inputs of {self.describe(use.weight)} are not finite, so it has no proximal step: the network "
                "has diverged. Lower the learning rate or tau, and look at the losses of the steps before."
            ) from None

    def describe(self, weight: Tensor) -> str:
        """The weight's name, for errors."""
        named = self.parameter(weight)
        return f"the layer of {named.name!r}" if named else f"the layer with a weight of shape {tuple(weight.shape)}"

    def _admit(self, use: Use) -> None:
        if world_size() > 1:
            raise BackpassError(
                f"{world_size()} processes contribute to {self.describe(use.weight)}, and the average of their "
                "proximal steps is not the proximal step of the whole batch: use "
                "ProxProp(union=True).attach(model, optimizer=optimizer)."
            )
        named = self.parameter(use.weight)
        if named is None:
            return
        now = torch._C._current_graph_task_id()
        twice = self._pass.get(named.name) == now and now >= 0
        if twice or holds_something(named.parameter):
            how = "is used twice in one backward pass" if twice else "has a gradient from a backward pass before"
            raise BackpassError(
                f"{named.name!r} {how}, and the sum of two proximal steps is not the proximal step of both: call "
                "optimizer.zero_grad() after each step, or, to accumulate gradients or share a weight, use "
                "ProxProp(union=True).attach(model, optimizer=optimizer)."
            )
        self._pass[named.name] = now


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def holds_something(parameter: nn.Parameter) -> bool:
    """Whether a parameter's gradient is there and not zero."""
    return parameter.grad is not None and bool(parameter.grad.any())
