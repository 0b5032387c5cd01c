"""ProxProp: proximal backpropagation (Frerix, Moellenhoff, Moeller, Cremers, ICLR 2018, arXiv 1706.04638)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.dynamo import constant_while_tracing
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.redefinition import TorchFunction, no_site
from backpass.rules.layers.linear_calls import LINEAR, OPAQUE, linear_call
from backpass.rules.layers.normalizations import NORMALIZATIONS, normalization
from backpass.rules.proximal.backward import Call, announce, proximal_affine, proximal_linear
from backpass.rules.proximal.contributions import Contributions
from backpass.rules.proximal.direction import ProximalStep
from backpass.rules.proximal.union import Union
from backpass.rules.ranges import Place, check_paths, check_places, resolve_range
from backpass.rules.rule import Rule
from backpass.rules.sites import Site, SiteTable

__all__ = ["ProxProp", "ProximalAttached"]


@dataclass(frozen=True, kw_only=True)
class ProxProp(Rule):
    """Proximal backpropagation: implicit steps in the weights of linear layers.

    z = A Theta forward and what flows down to A stay as they are; in the place of the gradient A^T g the weights get
    D = Theta - argmin_T 1/2 |A T - (A Theta - g)|^2 + 1/(2 tau) |T - Theta|^2 = (A^T A + I/tau)^{-1} A^T g,
    which any optimizer then uses. Linear layers are F.linear, convolutions (also transposed), embeddings and the
    weights of normalizations, with their biases.

    Args:
        tau: step size of the proximal step, positive. tau -> 0 gives tau times the gradient, tau -> inf the
            least-squares solution of A T = A Theta - g.
        solver: ``"exact"``; ``"cg"``, a few conjugate-gradient steps on the same system as in the paper; or
            ``"toeplitz"``, exact but for convolutions, whose A^T A is replaced by the larger block-Toeplitz one that
            ignores the border, which is cheaper and still a descent direction.
        cg_steps: iterations of ``solver="cg"``, at least 1.
        damping: ``"sum"``, A^T A as above, for which the effect of tau depends on the batch size if the loss is a
            mean; or ``"mean"``, A^T A / rows.
        union: False solves in the backward pass, for one use of each weight per step; True solves before the
            optimizer's step over everything accumulated since the last: micro-batches, shared weights, processes.
        start: first site, as in `LinBP`.
        stop: one past the last site; -1 leaves the last layer plain, which is the paper's setting.
        where: which of the sites from ``start`` to ``stop`` are proximal, a function of a `Site`; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    name: ClassVar[str] = "proxprop"
    functions: ClassVar[Mapping[TorchFunction, str]] = {**LINEAR, **NORMALIZATIONS, **OPAQUE}

    tau: float = 1.0
    solver: Literal["exact", "cg", "toeplitz"] = "exact"
    cg_steps: int = 3
    damping: Literal["sum", "mean"] = "sum"
    union: bool = False
    start: Place = None
    stop: Place = None
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not number or not 0 < self.tau < math.inf:
            raise BackpassError(f"tau is a positive finite number, got {self.tau!r}.")
        for name, value, known in (
            ("solver", self.solver, ("exact", "cg", "toeplitz")),
            ("damping", self.damping, ("sum", "mean")),
        ):
            if value not in known:
                raise UnknownNameError(name, str(value), known)
        if isinstance(self.cg_steps, bool) or not isinstance(self.cg_steps, int) or self.cg_steps < 1:
            raise BackpassError(f"cg_steps is an int of at least 1, got {self.cg_steps!r}.")
        if not isinstance(self.union, bool):
            raise BackpassError(f"union is True or False, got {self.union!r}.")
        check_places(self.start, self.stop)
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where is a function of a Site that gives a bool, got {self.where!r}.")

    def check(self, model: nn.Module) -> None:
        """Refuse a module path that the model does not have."""
        check_paths(model, self.start, self.stop)

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """The site indices from ``start`` to ``stop``."""
        table = SiteTable()

        def look() -> SiteTable:
            table.extend(sites())
            return table

        first, stop = resolve_range(self.start, self.stop, look)
        if not stop:
            raise no_site(self, len(table), table)
        return first, stop

    def attach(self, model: nn.Module, optimizer: Optimizer | None = None) -> ProximalAttached:
        """As `Rule.attach`.

        Args:
            model: the model.
            optimizer: whose step solves, with ``union=True``; must be one that has the model's parameters.

        Raises:
            BackpassError: ``union=True`` without an optimizer, or an optimizer without ``union=True``.
        """
        if self.union and not isinstance(optimizer, Optimizer):
            raise BackpassError(
                "union=True solves in the optimizer's step: ProxProp(union=True).attach(model, optimizer=optimizer), "
                f"got optimizer={optimizer!r}."
            )
        if optimizer is not None and not self.union:
            raise BackpassError("an optimizer is for union=True; without it the backward pass solves: leave it out.")
        return ProximalAttached(self, model, optimizer)

    @property
    def step(self) -> ProximalStep:
        """The settings of the solve."""
        return ProximalStep(float(self.tau), self.solver, self.cg_steps, self.damping == "mean")


class ProximalInterception(Interception):
    """An interception that gives linear layers proximal weight gradients."""

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's value; in the backward pass its weights contribute to this attachment."""
        if func in OPAQUE:
            raise BackpassError(
                f"{OPAQUE[func]!r} in module {self.running[-1].path or '(model)'!r} computes its linear layers out of "
                "sight, so ProxProp cannot act on them. Leave it plain by "
                f"where=lambda site: site.function != {OPAQUE[func]!r}, or write it with nn.Linear."
            )
        call: Call = (self.numbering.token, _functional())
        if call[1] and torch.compiler.is_dynamo_compiling():
            # Dynamo does not know then which arguments gradients are asked for.
            raise BackpassError(
                "ProxProp does not work in a compiled torch.func.grad: take torch.func.grad of the compiled model, or "
                "leave out torch.compile."
            )
        if func in NORMALIZATIONS:
            return _normalize(func, args, kwargs, call)
        found = linear_call(func, args, kwargs)
        if _learns(found.weight, found.bias):
            layer = found.layer
            fixed = (found.compute, found.rest, type(layer).__name__, layer.geometry, call)
            z = proximal_linear(found.x, found.weight, found.bias, *fixed)
        else:
            z = found.compute(found.x, found.weight, found.bias, *found.rest)
        return z if found.batched else z.squeeze(0)


@constant_while_tracing
def _functional() -> bool:
    """Whether ``torch.func`` takes the gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias))


def _normalize(func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
    norm = normalization(func, args, kwargs)
    weight, bias = norm.weight, norm.bias
    if not _learns(weight, bias):
        return norm.compute(norm.x, weight, bias, True)
    if weight is None:
        assert bias is not None  # noqa: S101  one of them learns
        weight = torch.ones_like(bias).detach()
    # First without moving the running statistics, on which the second may depend.
    normalized = norm.compute(norm.x, None, None, False)
    with torch.no_grad():
        value = norm.compute(norm.x, norm.weight, bias, True)
    return proximal_affine(normalized, value, weight, bias, norm.last, call)


class ProximalAttached(Attached):
    """`ProxProp` in force on a model.

    Attributes:
        contributions: what the weights' uses contributed since the last step.
    """

    def __init__(self, rule: ProxProp, model: nn.Module, optimizer: Optimizer | None) -> None:
        super().__init__(rule, model, ProximalInterception)
        self._contribute(rule, optimizer)

    def _contribute(self, rule: ProxProp, optimizer: Optimizer | None) -> None:
        step = rule.step
        self.contributions = Union(self._model, step, optimizer) if rule.union else Contributions(self._model, step)
        announce(self.token, self.contributions)

    def remove(self) -> None:
        """Give the model its own backward again, and the optimizer its own step; a second call does nothing."""
        super().remove()
        self.contributions.remove()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["contributions"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        assert isinstance(self.rule, ProxProp)  # noqa: S101  it was made with one
        self._contribute(self.rule, None)
