"""BPA: backward propagation attack (Wang, Tong, He, NeurIPS 2023, arXiv 2306.12685)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.activation_rule import ActivationRule
from backpass.rules.activations import WITHOUT_ACTIVATION, activations, is_relu
from backpass.rules.attaching.run import Decision
from backpass.rules.kernels import computed, replaced
from backpass.rules.pooling import MAX_POOLS, OPAQUE_MAX_POOLS, read_pool

__all__ = ["BPA"]


@dataclass(frozen=True, kw_only=True)
class BPA(ActivationRule):
    """Backward propagation attack: SiLU gradients for ReLU and softmax gradients for max pooling.

    With s(x) = 1 / (1 + exp(-x)):

    - ReLU and ReLU6: dL/dx = s(x) (1 + x (1 - s(x))) dL/dy, the derivative of SiLU.
    - Max pooling: each window distributes its gradient by softmax(temperature * x) over its elements.

    The forward pass is unchanged. Activations and max poolings share one index in call order. The paper selects the
    ReLUs from a chosen layer on and also the max pooling near the input; ``where`` selects such a set.

    Source: Wang, Tong, He, NeurIPS 2023, arXiv 2306.12685.

    Args:
        start: as in `ActivationRule`.
        stop: as in `ActivationRule`.
        where: as in `ActivationRule`.
        gates: as in `ActivationRule`.
        temperature: temperature of the softmax over a pooling window, positive; it multiplies x.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    name: ClassVar[str] = "bpa"
    functions = {**activations("relu", "relu6", "hardtanh"), **MAX_POOLS}  # noqa: RUF012
    opaque: ClassVar[Any] = OPAQUE_MAX_POOLS
    skipped = WITHOUT_ACTIVATION - {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}

    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        t = self.temperature
        if isinstance(t, bool) or not isinstance(t, int | float) or not (math.isfinite(t) and t > 0):
            raise BackpassError(f"temperature must be a finite number above 0, got {t!r}.")

    def covers(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if a call is a max pooling or a ReLU; ``nn.ReLU6`` calls hardtanh."""
        return func in MAX_POOLS or is_relu(func, args, kwargs)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return SiLU'(x) dL/dy."""
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))

    def replace_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Return the value with the plain graph and this rule's backward; see `ActivationRule.replace_call`."""
        if func in MAX_POOLS:
            return self._pool(func, args, kwargs, site)
        return super().replace_call(func, args, kwargs, site)

    def replace_planned(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Return the value with this rule's backward, or with the plain one if ``site`` is not active."""
        if func in MAX_POOLS:
            return self._pool(func, args, kwargs, site)
        return super().replace_planned(func, args, kwargs, site)

    def _pool(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        read = read_pool(func, args, kwargs, self.temperature)
        if read is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        x, pool = read
        if site is None:
            return computed(pool, None, x, pool.compute)
        return replaced(pool, site, x, func(*args, **kwargs))
