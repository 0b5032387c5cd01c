"""Averages of the weights over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.training.processes import like, whole

__all__ = ["Average", "Averaging"]


@dataclass(frozen=True)
class Average:
    """Average of the weights theta_k over the steps k.

    ``"ema:d"``: a_1 = theta_1, a_k = d a_{k-1} + (1 - d) theta_k, 0 < d < 1.
    ``"polyak:f"``: the mean over the last part f of all steps, 0 < f <= 1.
    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992).
    """

    kind: Literal["ema", "polyak"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Average:
        """Read the text form.

        Raises:
            BackpassError: the text has another form.
        """
        kind, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        if kind == "ema" and 0 < amount < 1:
            return cls("ema", amount)
        if kind == "polyak" and 0 < amount <= 1:
            return cls("polyak", amount)
        raise BackpassError(
            f'average is "ema:d" with 0 < d < 1, or "polyak:f" with 0 < f <= 1 (the last part f of the steps), '
            f"for instance ema:0.999; got {text!r}."
        )


class Averaging:
    """The running average of a model's parameters and floating-point buffers (BatchNorm's statistics).

    It is kept in float32 at least. Other buffers are those of the model.

    Args:
        average: kind of average.
        model: model whose weights are averaged.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, average: Average, model: nn.Module, steps: int) -> None:
        self._average = average
        self._names, self._tensors = _averaged(model)
        self._skip = steps - max(1, round(average.amount * steps)) if average.kind == "polyak" else 0
        self.count = 0
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after ``step`` steps."""
        if step <= self._skip:
            return
        self.count += 1
        now = [tensor.detach().to(_wide(tensor)) for tensor in self._tensors]
        if self.count == 1:
            self.values = [tensor.clone() for tensor in now]
            return
        weight = 1 - self._average.amount if self._average.kind == "ema" else 1 / self.count
        torch._foreach_lerp_(self.values, now, weight)

    @property
    def begun(self) -> bool:
        """Return whether there is an average yet."""
        return self.count > 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights, and its own again afterwards."""
        own = [tensor.detach().clone() for tensor in self._tensors]
        try:
            self._write(self.values)
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"count": self.count, "values": dict(zip(self._names, map(whole, self.values), strict=False))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.count, values = state["count"], state["values"]
        pairs = zip(self._names, self._tensors, strict=True)
        self.values = [like(values[name], tensor) for name, tensor in pairs] if values else []

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)


def _averaged(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    chosen = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    return [name for name, _ in chosen], [tensor for _, tensor in chosen]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
