"""LinBP by rewriting the model: every activation becomes x + (s(x) - x).detach(), one call after the other.

Slow, and by other means than the library's: the forward of known activation modules is exchanged, and the attributes
of torch that compute activations (``F.relu``, ``torch.tanh``, ``Tensor.sigmoid_``) are patched while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Rewritten", "renormalized", "straight_through"]

Compute = Callable[[Tensor], Tensor]

_NAMES = (
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "gelu", "mish", "softplus", "hardswish"),
    *("hardtanh", "hardsigmoid", "threshold", "tanh", "sigmoid"),
)
_PLACES = (F, torch, Tensor)

_OF_TORCH = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Threshold, nn.Tanh, nn.Sigmoid),
)
_BY_NAME = frozenset(
    (
        *("Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "HardMish", "PReLU", "GELU", "GELUTanh"),
        *("QuickGELU", "SwishMe", "MishMe", "HardSigmoidMe", "HardSwishMe", "HardMishMe"),  # timm's up to here
        *("NewGELUActivation", "GELUActivation", "SiLUActivation", "FastGELUActivation", "QuickGELUActivation"),
        *("ClippedGELUActivation", "AccurateGELUActivation", "MishActivation", "ReLUSquaredActivation"),
    )
)
_PACKAGES = ("timm", "transformers")


def straight_through(x: Tensor, compute: Compute) -> Tensor:
    """x + (s(x) - x).detach(), with the bits of s(x); parameters inside s keep their own gradient."""
    return compute(x.detach()) + (x - x.detach())


def renormalized(x: Tensor, compute: Compute) -> Tensor:
    """s(x), whose gradient g at the output becomes g |s'(x) g| / |g| at the input, the norms per sample."""
    path = x - x.detach()
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        value = compute(z)

    def scaled(grad: Tensor) -> Tensor:
        (plain,) = torch.autograd.grad(value, z, grad, retain_graph=True)
        factors = [p.norm() / g.norm() if g.norm() > 0 else g.norm() for p, g in zip(plain, grad, strict=True)]
        return torch.stack([factor * g for factor, g in zip(factors, grad, strict=True)])

    if path.requires_grad:
        path.register_hook(scaled)
    return value.detach() + path


class Rewritten:
    """A model whose activations from number ``start`` on are straight-through.

    Args:
        model: called as it is; only inside `running` are its activations rewritten.
        start: the number of the first rewritten activation, in the order of the calls.
        stop: one past the last; None: all from ``start`` on.
        gates: patterns of the paths of modules that are gates, not activations.
        gate_functions: names of functions that are gates wherever the model calls them.
        elementwise: more classes of modules that are activations as a whole, or their names.
        rewrite: gives s(x) another gradient, from x and s.

    Attributes:
        count: how many activations the last call had.
    """

    def __init__(
        self,
        model: nn.Module,
        start: int,
        *,
        stop: int | None = None,
        gates: Sequence[str] = (),
        gate_functions: Sequence[str] = (),
        elementwise: tuple[type[nn.Module] | str, ...] = (),
        rewrite: Callable[[Tensor, Compute], Tensor] = straight_through,
    ) -> None:
        self.model = model
        self.start, self.stop = start, float("inf") if stop is None else stop
        self.gates, self.gate_functions, self.rewrite = gates, gate_functions, rewrite
        self.elementwise = (*_OF_TORCH, *elementwise)
        self.count = 0
        self._inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the rewritten model."""
        with self.running():
            return self.model(*args, **kwargs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Rewrite the activations inside."""
        self.count = 0
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                gate = any(fnmatch(path, pattern) for pattern in self.gates)
                if gate or self._is_activation(module):
                    forward = self._rewrite(module.forward, getattr(module, "inplace", False), gate)
                    stack.enter_context(patch.object(module, "forward", forward))
            rewritten = {}
            for place in _PLACES:
                for name in (*_NAMES, *(f"{name}_" for name in _NAMES)):
                    if hasattr(place, name):
                        plain = getattr(place, name)
                        gate = name.rstrip("_") in self.gate_functions
                        rewritten[plain] = self._rewrite(plain, name.endswith("_"), gate)
                        stack.enter_context(patch.object(place, name, rewritten[plain]))
            for module in self.model.modules():  # functions that a module was given when it was made
                for name, value in list(vars(module).items()):
                    if callable(value) and value in rewritten:
                        stack.enter_context(patch.object(module, name, rewritten[value]))
            yield

    def _is_activation(self, module: nn.Module) -> bool:
        kind = type(module)
        of_package = kind.__module__.split(".")[0] in _PACKAGES and kind.__name__ in _BY_NAME
        return kind in self.elementwise or kind.__name__ in self.elementwise or of_package

    def _rewrite(self, compute: Callable[..., Any], in_place: bool, gate: bool) -> Callable[..., Any]:
        def rewritten(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return compute(*args, **kwargs)
            self._inside = True
            try:
                if gate:
                    return compute(*args, **kwargs)
                number, self.count = self.count, self.count + 1
                if not self.start <= number < self.stop:
                    return compute(*args, **kwargs)
                x, *rest = args or (kwargs.pop(next(iter(kwargs))),)
                z = x.clone()

                def value(z: Tensor) -> Tensor:
                    return compute(z.clone(), *rest, **kwargs)

                y = self.rewrite(z, value)
                return x.copy_(y) if in_place or kwargs.get("inplace", False) else y
            finally:
                self._inside = False

        return rewritten
