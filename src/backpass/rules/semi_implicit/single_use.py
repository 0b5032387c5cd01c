"""Semi-implicit steps are exact for one use of each weight per optimizer step; here is where others are refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.proximal.contributions import holds_something, world_size

__all__ = ["SingleUse"]


class SingleUse:
    """The weights of an attached model, and in which backward pass each was last used.

    Args:
        model: gives the model, which is not kept alive.
    """

    def __init__(self, model: Callable[[], nn.Module | None]) -> None:
        self._model = model
        self._named: dict[int, tuple[str, nn.Parameter]] = {}
        self._last_pass: dict[str, int] = {}

    def admit(self, weight: Tensor) -> None:
        """Let a backward pass write the step of a weight.

        Raises:
            BackpassError: it would be added to another: of this pass, of a pass before, or of another process.
        """
        if world_size() > 1:
            raise BackpassError(
                f"{world_size()} processes contribute to {self.describe(weight)}, and the average of their "
                "semi-implicit steps is not the step of the whole batch: train in one process, or use "
                "ProxProp(union=True), which solves over all processes."
            )
        named = self._find(weight)
        if named is None:
            return
        name, parameter = named
        now = torch._C._current_graph_task_id()
        twice = now >= 0 and self._last_pass.get(name) == now
        if twice or holds_something(parameter):
            how = "is used twice in one backward pass" if twice else "has a gradient from a backward pass before"
            raise BackpassError(
                f"{name!r} {how}, and the sum of two semi-implicit steps is not the step of both: call "
                "optimizer.zero_grad() after each step, and make one larger batch of several small ones. For a weight "
                "that is shared, leave its layers out by `where`, or use ProxProp(union=True)."
            )
        self._last_pass[name] = now

    def describe(self, weight: Tensor) -> str:
        """The layer's name, for errors."""
        name = self.name(weight)
        return f"the layer of {name!r}" if name else f"the layer with a weight of shape {tuple(weight.shape)}"

    def name(self, weight: Tensor) -> str | None:
        """The name of the model's parameter that this is, if it is one."""
        named = self._find(weight)
        return named[0] if named else None

    def _find(self, weight: Tensor) -> tuple[str, nn.Parameter] | None:
        """The model's parameter in this tensor's memory: in compiled code there is no other way to tell."""
        at = weight.data_ptr()
        found = self._named.get(at)
        if found is None or found[1].data_ptr() != at:
            model = self._model()
            parameters = model.named_parameters() if model is not None else ()
            self._named = {parameter.data_ptr(): (name, parameter) for name, parameter in parameters}
            found = self._named.get(at)
        return found
