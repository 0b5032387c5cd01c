"""SIBP: semi-implicit back propagation (Liu, Zhang, 2020, arXiv 2002.03516)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.dynamo import constant_while_tracing, show_to_modes
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.redefinition import EVERYTHING, TorchFunction
from backpass.rules.layers.linear_calls import LINEAR, OPAQUE, LinearCall, linear_call
from backpass.rules.rule import Rule
from backpass.rules.semi_implicit.backward import Call, Steps, announce, semi_implicit_layer
from backpass.rules.semi_implicit.checkpoints import checkpoint_hooks, checkpointed_without_gradients
from backpass.rules.semi_implicit.divergence import StepSizes
from backpass.rules.semi_implicit.elementwise import elementwise
from backpass.rules.semi_implicit.single_use import SingleUse
from backpass.rules.semi_implicit.weight_step import SemiImplicitStep
from backpass.rules.sites import Site, SiteTable

__all__ = ["SIBP", "SemiImplicitAttached"]

_LAYERS = {function: name for function, name in LINEAR.items() if name != "embedding"}


@dataclass(frozen=True, kw_only=True)
class SIBP(Rule):
    """Semi-implicit back propagation: explicit steps for neurons, implicit ones for weights.

    A layer z = W a + b, y = s(z) with the gradient g at y gets, in the place of its weight gradients, -dW and -db of
    argmin |s(z + dW a + db) - (y - eta g)|^2 + lam |dW|^2 + lam_bias |db|^2 over the batch,
    and passes (W + dW)^T (s'(z) g) down to a. SGD with learning rate 1 is the algorithm of the paper; any optimizer
    may use the direction. The forward pass stays as it is.

    Layers are F.linear and convolutions (also transposed). s is the activation that is called on the layer's own
    output; where something else stands between (a normalization, pooling, a sum), or the activation has weights or a
    rule of its own, s is the identity, g the gradient at z, and what stands between is ordinary backpropagation.

    Args:
        eta: step size of the neurons, positive, for a loss that is a sum over the batch; None takes
            1 / (number of layers the rule acts on).
        lam: penalty on the weights' increment, positive. lam -> inf gives eta / lam times the gradient.
        lam_bias: penalty on the biases' increment, positive; None takes lam.
        newton_steps: Gauss-Newton steps on the sub-problem where s is not the identity, at least 1.
        cg_steps: conjugate-gradient iterations in each, at least 1. Without s the solve is direct.
        corrections: where s is piecewise linear the Gauss-Newton model does not see the kinks that the step crosses.
            So many of the last ``cg_steps`` iterations, all but one at most, descend on the sub-problem itself, each
            unit only where that lowers its objective. 0 leaves the plain Gauss-Newton steps.
        reduction: what the loss is over the batch, ``"mean"`` or ``"sum"``. With ``"mean"`` gradients are multiplied
            by the size of the first dimension of the layer's input.
        updated_weights: whether gradients flow down through W + dW; False: through W.
        where: which layers are semi-implicit, a function of a `Site`; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no layer is selected.
    """

    name: ClassVar[str] = "sibp"
    functions: ClassVar[Mapping[TorchFunction, str]] = {**_LAYERS, **OPAQUE}

    eta: float | None = 0.1
    lam: float = 1.0
    lam_bias: float | None = None
    newton_steps: int = 1
    cg_steps: int = 5
    corrections: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    updated_weights: bool = True
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        for name, optional in (("eta", True), ("lam", False), ("lam_bias", True)):
            number = getattr(self, name)
            if number is None and optional:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise BackpassError(f"{name} is a positive finite number{' or None' * optional}, got {number!r}.")
        for name, least in (("newton_steps", 1), ("cg_steps", 1), ("corrections", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise BackpassError(f"{name} is an int of at least {least}, got {count!r}.")
        if self.reduction not in ("mean", "sum"):
            raise UnknownNameError("reduction", str(self.reduction), ("mean", "sum"))
        if not isinstance(self.updated_weights, bool):
            raise BackpassError(f"updated_weights is True or False, got {self.updated_weights!r}.")
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where is a function of a Site that gives a bool, got {self.where!r}.")

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """All sites; `where` chooses among them."""
        show_to_modes(ACTIVATIONS)
        return EVERYTHING

    def attach(self, model: nn.Module) -> SemiImplicitAttached:
        """As `Rule.attach`."""
        return SemiImplicitAttached(self, model)

    def step(self, depth: int) -> SemiImplicitStep:
        """The settings of the solve in a network with ``depth`` layers."""
        eta = 1 / max(depth, 1) if self.eta is None else float(self.eta)
        lam_bias = float(self.lam if self.lam_bias is None else self.lam_bias)
        fixed = (self.newton_steps, self.cg_steps, self.corrections, self.reduction, self.updated_weights)
        return SemiImplicitStep(eta, float(self.lam), lam_bias, *fixed)


class SemiImplicitInterception(Interception):
    """An interception that gives layers their semi-implicit backward, together with the activation that follows.

    Attributes:
        outputs: of the layers no activation was called on so far, with the layer and where it was called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[tuple[Tensor, LinearCall, Any]] = []
        self.recomputed: list[tuple[ref[Tensor], Any]] = []

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ACTIVATIONS and (self.outputs or self.recomputed) and not _has_rule_of_its_own(func):
            found = elementwise(func, args, kwargs)
            if found is not None:
                self._refuse_parted(found[1], found[0].name)
                for at, (z, layer, _) in enumerate(self.outputs):
                    if z is found[1] and torch.is_grad_enabled():
                        self.outputs.pop(at)
                        return self._activate(layer, *found)
        return super().__torch_function__(func, types, args, kwargs)

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's value; what it passes on serves unless an activation follows."""
        if func in OPAQUE:
            raise BackpassError(
                f"{OPAQUE[func]!r} in module {self.running[-1].path or '(model)'!r} computes its linear layers out of "
                "sight, so SIBP cannot act on them. Leave it plain by "
                f"where=lambda site: site.function != {OPAQUE[func]!r}, or write it with nn.Linear."
            )
        layer = linear_call(func, args, kwargs)
        learns = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
        if not torch.is_grad_enabled() or not learns:
            z = func(*args, **kwargs)
            if learns and not is_dynamo_compiling() and (place := checkpointed_without_gradients(self.running)):
                self.recomputed.append((ref(z), place))
            return z
        _refuse_half(layer)
        z = semi_implicit_layer(layer, None, layer.compute, layer.rest, self._call(layer, "", ()))
        if layer.batched:
            self.outputs.append((z, layer, None if is_dynamo_compiling() else checkpoint_hooks()))
            return z
        return z.squeeze(0)

    def _refuse_parted(self, z: Tensor, name: str) -> None:
        """Refuse an activation that a recomputation would find without its layer, or its layer without it."""
        if is_dynamo_compiling():
            return
        here = checkpointed_without_gradients(self.running)
        parted = any(one() is z and place is not here for one, place in self.recomputed)
        for output, _, hooks in self.outputs:
            if output is z:
                now = checkpoint_hooks()
                parted |= here is not None or (now is not None and now is not hooks)
        if parted:
            raise BackpassError(
                f"{name!r} in module {self.running[-1].path or '(model)'!r} and the layer it is called on lie on two "
                "sides of a checkpoint's border: recomputed apart, they would not be one sub-problem. Checkpoint them "
                "in the same block."
            )

    def _activate(self, layer: LinearCall, s: Any, z: Tensor, in_place: bool) -> Tensor:
        before = z.detach().clone() if in_place else z.detach()
        y = semi_implicit_layer(layer, before, s.value, (), self._call(layer, s.name, s.numbers))
        # Cut off from the layer's own node, which no longer acts.
        return z.detach_().copy_(y) if in_place else y

    def _call(self, layer: LinearCall, activation: str, numbers: tuple[float, ...]) -> Call:
        kind, geometry = type(layer.layer).__name__, layer.layer.geometry
        return Call(self.numbering.token, kind, geometry, activation, numbers, _functional())


def _has_rule_of_its_own(func: TorchFunction) -> bool:
    """Whether a rule around this one re-defines the function."""
    modes = (torch._C._get_function_stack_at(depth) for depth in range(torch._C._len_torch_function_stack()))
    return any(isinstance(mode, Interception) and func in mode.numbering.rule.functions for mode in modes)


def _refuse_half(layer: LinearCall) -> None:
    kind = layer.weight.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if autocast or layer.weight.dtype == torch.float16:
        raise BackpassError(
            "float16 needs a scaled loss, and a semi-implicit step is no linear function of the loss's scale: use "
            "bfloat16 (torch.autocast with dtype=torch.bfloat16), which needs none."
        )


@constant_while_tracing
def _functional() -> bool:
    """Whether ``torch.func`` takes the gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class SemiImplicitAttached(Attached):
    """`SIBP` in force on a model."""

    def __init__(self, rule: SIBP, model: nn.Module) -> None:
        super().__init__(rule, model, SemiImplicitInterception)
        self._announce_steps()

    def _announce_steps(self) -> None:
        rule = self.rule
        assert isinstance(rule, SIBP)  # noqa: S101  it was made with one
        attached = ref(self)

        def step() -> SemiImplicitStep:
            found = attached()
            return rule.step(len(found.last_call[1]) if found else 0)

        uses = SingleUse(self._model)
        self._steps = Steps(step, uses, StepSizes(uses))
        announce(self.token, self._steps)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_steps"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._announce_steps()
