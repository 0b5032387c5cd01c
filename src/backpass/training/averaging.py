"""Weight averaging over the steps of a run: EMA and Polyak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.training.processes import like, whole

__all__ = ["Averaging", "read_average"]


def read_average(text: str) -> tuple[Literal["ema", "polyak"], float]:
    """Parse the text form of an average of the weights theta_k over the steps k into kind and parameter.

    ``"ema:d"``: a_1 = theta_1, a_k = d a_{k-1} + (1 - d) theta_k, 0 < d < 1.
    ``"polyak:f"``: the mean over the last part f of all steps, 0 < f <= 1.
    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992).

    Raises:
        BackpassError: the text has another form.
    """
    kind, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if kind == "ema" and 0 < amount < 1:
        return "ema", amount
    if kind == "polyak" and 0 < amount <= 1:
        return "polyak", amount
    raise BackpassError(
        f'average is "ema:d" with 0 < d < 1, or "polyak:f" with 0 < f <= 1 (the last part f of the steps), for '
        f"instance ema:0.999; got {text!r}."
    )


class Averaging:
    """Running average of a model's parameters and floating-point buffers (BatchNorm's statistics).

    It is kept in float32 at least. Other buffers are those of the model.

    Args:
        average: text form of the average.
        model: model whose weights are averaged.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, average: str, model: nn.Module, steps: int) -> None:
        kind, self._amount = read_average(average)
        self._decays = kind == "ema"
        self._skip = 0 if self._decays else steps - max(1, round(self._amount * steps))
        named = [*model.named_parameters(), *model.named_buffers()]
        self._of = {name: tensor for name, tensor in named if tensor.is_floating_point()}
        self.count = 0
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after ``step`` steps."""
        if step <= self._skip:
            return
        self.count += 1
        now = [one.detach().to(torch.promote_types(one.dtype, torch.float32)) for one in self._of.values()]
        if self.count == 1:
            self.values = [tensor.clone() for tensor in now]
            return
        weight = 1 - self._amount if self._decays else 1 / self.count
        for sharded in (False, True):  # buffers are never sharded, and are averaged separately
            pairs = [pair for pair in zip(self.values, now, strict=True) if hasattr(pair[0], "full_tensor") == sharded]
            if pairs:
                torch._foreach_lerp_([one for one, _ in pairs], [one for _, one in pairs], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Load the averaged weights into the model in a context, and restore its own afterwards."""
        own = [tensor.detach().clone() for tensor in self._of.values()]
        try:
            self._write(self.values)
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"count": self.count, "values": dict(zip(self._of, map(whole, self.values), strict=False))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.count, values = state["count"], state["values"]
        self.values = [like(values[name], tensor) for name, tensor in self._of.items()] if values else []

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._of.values(), values, strict=True):
            tensor.copy_(value)
