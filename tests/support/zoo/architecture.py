"""One row of the zoo: a network with random weights, its inputs, and what LinBP must find in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from support.straight_through import Rewritten

__all__ = ["Architecture", "outputs_of"]

Inputs = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network of the zoo.

    Attributes:
        build: makes the network.
        sites: how many activations one call has, counted by reading the network's code.
        shape: of an image batch, where ``inputs`` is None.
        inputs: the keyword arguments of a call.
        gates: patterns of the paths of modules that are gates: they look like activations and are none.
        gate_functions: names of functions that are gates throughout the model.
        elementwise: the model's own classes of activation modules.
        unreachable: paths of the modules in which a rule cannot reach an activation.
        reference: a function (model, start, stop) that gives the rewritten model, where `Rewritten` does not know
            the model's activations.
        fused: without gradients torch calls a fused kernel, and a rule may refuse that.
        slow: left out of `make test`.
    """

    build: Callable[[], nn.Module]
    sites: int
    shape: tuple[int, ...] = (2, 3, 32, 32)
    inputs: Inputs | None = None
    gates: tuple[str, ...] = ()
    gate_functions: tuple[str, ...] = ()
    elementwise: tuple[type[nn.Module] | str, ...] = ()
    unreachable: frozenset[str] = field(default_factory=frozenset)
    reference: Callable[[nn.Module, int, int | None], Callable[..., Any]] | None = None
    fused: bool = False
    slow: bool = False

    def make(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network in eval mode, without any weight at a constant, and the arguments of a call."""
        torch.manual_seed(0)
        model = self.build().eval().to(dtype)
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                with torch.no_grad():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
        given = {"x": torch.randn(self.shape)} if self.inputs is None else dict(self.inputs())
        return model, tree_map(lambda t: t.to(dtype).requires_grad_() if t.is_floating_point() else t, given)

    def call(self, model: Callable[..., Any], given: Mapping[str, Tensor]) -> Any:
        """Call the network, or what stands for it."""
        return model(given["x"]) if self.inputs is None else model(**given)

    def rewritten(self, model: nn.Module, start: int, stop: int | None = None) -> Callable[..., Any]:
        """The network with straight-through activations from number ``start`` on."""
        if self.reference is not None:
            return self.reference(model, start, stop)
        return Rewritten(
            model,
            start,
            stop=stop,
            gates=self.gates,
            gate_functions=self.gate_functions,
            elementwise=self.elementwise,
        )


def outputs_of(out: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output: a tensor, a tuple, or a ModelOutput."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else ()
    return [tensor for part in parts for tensor in outputs_of(part)]
