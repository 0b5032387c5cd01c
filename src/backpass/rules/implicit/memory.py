"""A running average of each layer's Gram matrix, whose damped inverse is applied for several steps.

With t the steps since the last refresh, M <- memory^t M + (1 - memory^t) A^T A / N at a refresh and
D = (M + lambda I)^{-1} G in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpass.rules.implicit.collected import Collected
from backpass.rules.implicit.layers import Gradients
from backpass.rules.implicit.proximal import ProximalStep, as_gradients, as_matrix
from backpass.rules.implicit.systems import NotFiniteError, solve
from backpass.rules.implicit.uses import layer_of

__all__ = ["LONGEST", "Memory"]

LONGEST = 10
"""Largest number of steps between two refreshes where none is given."""
_FLOOR = 3e-5


@dataclass
class _Layer:
    """Memory of one layer (see `layer_of`), with the names of weight and bias.

    Attributes:
        mean: M, (blocks, columns, columns).
        samples: number of samples per row.
        turn: the layer is refreshed at ages a for which the interval divides a + turn; -1 before it is known.
        age: number of steps.
        last: age at the last refresh.
        inverse: (M + lambda I)^{-1}, times the scale of the direction; None until it is needed.
        of_bias: that number for a bias alone.
    """

    text: str
    shape: tuple[int, ...]
    names: tuple[str | None, str | None]
    mean: Tensor
    samples: float
    turn: int = -1
    age: int = 0
    last: int = 0
    inverse: Tensor | None = None
    of_bias: float = 1.0


class Memory:
    """Memory of all layers.

    Args:
        decay: share of the average that a step keeps.
        refresh: steps between two refreshes; None: a tenth of a layer's age, from 1 to 10.
        step: how the systems are solved.
    """

    def __init__(self, decay: float, refresh: int | None, step: ProximalStep) -> None:
        self.decay, self.refresh, self.step = decay, refresh, step
        self.layers: dict[str, _Layer] = {}

    def take(self, step: ProximalStep) -> None:
        """Change how the systems are solved."""
        self.step = step
        for layer in self.layers.values():
            layer.inverse = None

    def is_due(self, name: str) -> bool:
        """Return whether the next step of a layer needs its Gram matrix."""
        layer = self.layers.get(name)
        if layer is None:
            return True
        interval = self.refresh or min(LONGEST, 1 + layer.age // 10)
        return (layer.age + layer.turn) % interval == 0

    def update(self, name: str, collected: Collected) -> None:
        """Refresh the average of a layer.

        Raises:
            NotFiniteError: the Gram matrix is not finite; the memory stays as it was.
        """
        collected.to_gram()
        assert collected.gram is not None  # noqa: S101  there was a use
        gram = collected.gram / collected.count
        if not bool(gram.sum().isfinite()):
            raise NotFiniteError("a Gram matrix is not finite")
        layer = self.layers.get(name)
        samples = collected.samples / collected.count
        if layer is None or layer.mean.shape != gram.shape:
            weight, bias = collected.parameters
            names = (weight.name if weight else None, bias.name if bias else None)
            self.layers[name] = _Layer(collected.text, collected.layer.shape, names, gram, samples)
        else:
            layer.mean = layer.mean.to(gram).lerp_(gram, 1 - self.decay ** (layer.age - layer.last))
            layer.samples, layer.last, layer.inverse = samples, layer.age, None

    def spread(self) -> None:
        """Assign turns to new layers, so that refreshes spread evenly over the steps."""
        loads = [0.0] * (self.refresh or LONGEST)
        new = [layer for layer in self.layers.values() if layer.turn < 0]
        for layer in sorted(new, key=lambda one: -one.mean.numel() * one.mean.shape[-1]):
            layer.turn = loads.index(min(loads))
            loads[layer.turn] += layer.mean.numel() * layer.mean.shape[-1]

    def direction(self, name: str, plain: Gradients) -> Gradients:
        """Return D of a layer."""
        one = self.layers[name]
        layer = layer_of(one.text, one.shape)
        if one.inverse is None:
            one.inverse = self._inverse(one)
        one.age += 1
        right = as_matrix(layer, plain, one.inverse.shape[-1]).to(one.inverse.dtype)
        solution = torch.bmm(right.mT, one.inverse).mT
        weight, bias = as_gradients(layer, solution, (plain[0] is not None, plain[1] is not None))
        if bias is None and plain[1] is not None:  # in pieces: the bias is a system of its own
            bias = plain[1] * one.of_bias
        return weight, bias

    def _inverse(self, one: _Layer) -> Tensor:
        added = self.step.added(1, one.samples)

        def system(dtype: torch.dtype) -> tuple[Tensor, None]:
            return one.mean.to(dtype, copy=True), None

        inverse, damping = solve(system, added, one.mean.dtype, _FLOOR)
        scale = self.step.scale(1, one.samples, damping)
        one.of_bias = scale / (1 + damping)
        return (inverse * scale).to(one.mean.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and turns; inverses follow from them."""
        fields = ("text", "shape", "names", "mean", "samples", "turn", "age", "last")
        return {name: {field: getattr(layer, field) for field in fields} for name, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a `state_dict`."""
        self.layers = {name: _Layer(**{**saved, "mean": saved["mean"].clone()}) for name, saved in state.items()}

    def pays(self, one: Collected) -> bool:
        """Return whether memory costs a layer fewer multiplications in a step than the exact step."""
        layer, rows = one.layer, one.count
        d, weights = layer.columns(one.wants[1]), torch.Size(layer.shape).numel()
        o, side = weights // layer.columns(False), d / layer.parts(self.step.max_side)
        build = rows * d * side + d * side**2
        exact = 2 * rows * (rows * (d + o) + d * o) + rows**3 / 3 if one.has_rows else build + 2 * d * side * o
        return 2 * d * side * o + build / (self.refresh or LONGEST) < exact
