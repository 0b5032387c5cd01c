"""SIBP: semi-implicit back propagation (Liu, Zhang, 2020, arXiv 2002.03516)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules import torch_internals
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.implicit.calls import LINEAR, OPAQUE, PRODUCTS, LinearCall
from backpass.rules.implicit.interception import LayerAttached, LayerInterception
from backpass.rules.implicit.uses import Call, implicit_layer
from backpass.rules.rule import Rule
from backpass.rules.semi_implicit.backward import SemiImplicitContributions
from backpass.rules.semi_implicit.checkpoints import checkpointed_without_gradients
from backpass.rules.semi_implicit.elementwise import elementwise
from backpass.rules.semi_implicit.weight_step import SemiImplicitStep
from backpass.rules.sites import Site

__all__ = ["SIBP", "SemiImplicitAttached"]

_LAYERS = {function: name for function, name in LINEAR.items() if name != "embedding"}


@dataclass(frozen=True, kw_only=True)
class SIBP(Rule):
    """Semi-implicit back propagation: explicit steps for neurons, implicit ones for weights.

    A layer z = W a + b, y = s(z) with the gradient g at y gets, instead of its weight gradients, -dW and -db of
    argmin |s(z + dW a + db) - (y - eta g)|^2 + lam |dW|^2 + lam_bias |db|^2 over the batch,
    and its input gets the gradient (W + dW)^T (s'(z) g). SGD with learning rate 1 and without momentum is the algorithm
    of the paper; any optimizer may use the direction. The forward pass is unchanged.

    Layers are F.linear, convolutions (also transposed), matrix products, addmm and einsum with a parameter. s is the
    activation that is called on the layer's own output; where something else stands between (a normalization, pooling,
    a sum), or the activation has weights or is overridden by another rule, s is the identity, g the gradient at z, and
    what stands between is ordinary backpropagation.

    Args:
        eta: step size of the neurons, positive, for a loss that is a sum over the batch; None takes
            1 / (number of layers the rule acts on).
        lam: penalty on the weights' increment, positive. lam -> inf gives eta / lam times the gradient.
        lam_bias: penalty on the biases' increment, positive; None takes lam.
        newton_steps: Gauss-Newton steps on the sub-problem where s is not the identity, at least 1.
        cg_steps: conjugate-gradient iterations in each, at least 1. Without s the solve is direct.
        descent_steps: the Gauss-Newton model does not see the kinks of a piecewise linear s that the step crosses. So
            many of the last ``cg_steps`` iterations, all but one at most, then descend on the sub-problem itself. From
            1 on, no unit takes a step that raises its objective, whatever s is. 0 leaves plain Gauss-Newton steps.
        reduction: how the loss combines the samples of a batch, ``"mean"`` or ``"sum"``. With ``"mean"`` gradients are
            multiplied by the size of the first dimension of the layer's input.
        updated_weights: whether input gradients are propagated through W + dW; False: through W.
        loss_scale: factor by which the loss is multiplied before the backward pass, positive; the steps are those of
            the loss itself, times this factor. For a ``GradScaler`` use ``attach(model, scaler=scaler)`` instead.
        where: which layers are semi-implicit, a function of a `Site`; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no layer is selected.
    """

    name: ClassVar[str] = "sibp"
    functions: ClassVar[Mapping[TorchFunction, str]] = {**_LAYERS, **PRODUCTS}
    observed: ClassVar[Collection[TorchFunction]] = tuple(ACTIVATIONS)
    opaque: ClassVar[Mapping[TorchFunction, str]] = OPAQUE

    eta: float | None = 0.1
    lam: float = 1.0
    lam_bias: float | None = None
    newton_steps: int = 1
    cg_steps: int = 5
    descent_steps: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    updated_weights: bool = True
    loss_scale: float = 1.0
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        for name, optional in (("eta", True), ("lam", False), ("lam_bias", True), ("loss_scale", False)):
            number = getattr(self, name)
            if number is None and optional:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise BackpassError(f"{name} must be positive and finite{', or None' * optional}, got {number!r}.")
        for name, least in (("newton_steps", 1), ("cg_steps", 1), ("descent_steps", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise BackpassError(f"{name} must be an int of at least {least}, got {count!r}.")
        if self.reduction not in ("mean", "sum"):
            raise UnknownNameError("reduction", str(self.reduction), ("mean", "sum"))
        if not isinstance(self.updated_weights, bool):
            raise BackpassError(f"updated_weights must be True or False, got {self.updated_weights!r}.")
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where must be a function of a Site that returns a bool, got {self.where!r}.")

    def attach(self, model: nn.Module, scaler: Any = None, *, strict: bool = False) -> SemiImplicitAttached:
        """Override the backward of ``model``; see `Rule.attach`.

        Args:
            model: the model.
            scaler: the ``torch.amp.GradScaler`` that scales the loss, if there is one. A semi-implicit step is no
                linear function of the loss's scale, so the rule must know it.
            strict: as in `Rule.attach`.

        Raises:
            BackpassError: the parameters are sharded.
        """
        return SemiImplicitAttached(self, model, scaler, strict)

    def step(self, depth: int) -> SemiImplicitStep:
        """The settings of the solve in a network with ``depth`` layers."""
        eta = 1 / max(depth, 1) if self.eta is None else float(self.eta)
        lam_bias = float(self.lam if self.lam_bias is None else self.lam_bias)
        fixed = (self.newton_steps, self.cg_steps, self.descent_steps, self.reduction, self.updated_weights)
        return SemiImplicitStep(eta, float(self.lam), lam_bias, *fixed, float(self.loss_scale))


class SemiImplicitInterception(LayerInterception):
    """An interception that gives layers their semi-implicit backward, together with the activation that follows.

    Attributes:
        outputs: of the layers no activation was called on so far, with the layer and where it was called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[tuple[Tensor, LinearCall, Any]] = []
        self.recomputed: list[tuple[ref[Tensor], Any]] = []

    def other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no layer; an activation on a layer's output takes over its backward."""
        if func in ACTIVATIONS and (self.outputs or self.recomputed) and not _is_overridden(func):
            found = elementwise(func, args, kwargs)
            if found is not None:
                self._refuse_parted(found[1], found[0].name)
                for at, (z, layer, _) in enumerate(self.outputs):
                    if z is found[1] and torch.is_grad_enabled():
                        self.outputs.pop(at)
                        return self._activate(layer, *found)
        return super().other(caller, func, args, kwargs)

    def at(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer; without gradients, note where a checkpoint will call it again."""
        z = super().at(site, func, args, kwargs)
        if not torch.is_grad_enabled() and site.selected:
            place = checkpointed_without_gradients(self.running)
            if place is not None:
                self.recomputed.append((ref(z), place))
        return z

    def check_layer(self, layer: LinearCall) -> None:
        """Refuse float16 without a scaler that is known."""
        if not isinstance(self.attached, SemiImplicitAttached) or not self.attached.scaled:
            _refuse_half(layer)

    def node(
        self,
        layer: LinearCall,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: SiteCall | None,
    ) -> Any:
        """Return the value of a layer; its input gradient is used unless an activation follows."""
        z = self._call(layer, None, layer.compute, layer.rest, ("", ()))
        if not layer.batched:
            return z.squeeze(0)
        self.outputs.append((z, layer, None if is_dynamo_compiling() else torch_internals.checkpoint_hooks()))
        return z

    def _refuse_parted(self, z: Tensor, name: str) -> None:
        """Refuse an activation that a recomputation would find without its layer, or its layer without it."""
        if is_dynamo_compiling():
            return
        here = checkpointed_without_gradients(self.running)
        parted = any(one() is z and place is not here for one, place in self.recomputed)
        for output, _, hooks in self.outputs:
            if output is z:
                now = torch_internals.checkpoint_hooks()
                parted |= here is not None or (now is not None and now is not hooks)
        if parted:
            raise BackpassError(
                f"{name!r} in module {self.running[-1].path or '(model)'!r} and the layer it is called on lie on two "
                "sides of a checkpoint's border: recomputed apart, they would not be one sub-problem. Checkpoint them "
                "in the same block."
            )

    def _activate(self, layer: LinearCall, s: Any, z: Tensor, in_place: bool) -> Tensor:
        before = z.detach().clone() if in_place else z.detach()
        y = self._call(layer, before, s.value, (), (s.name, s.numbers))
        # Cut off from the layer's own node, which no longer acts.
        return z.detach_().copy_(y) if in_place else y

    def _call(self, layer: LinearCall, z: Tensor | None, compute: Any, rest: Any, activation: Any) -> Tensor:
        call = Call(layer.text, activation, torch_internals.transforms(), self.attached.token)
        return implicit_layer(layer.x, layer.weight, layer.bias, z, compute, rest, call)


def _is_overridden(func: TorchFunction) -> bool:
    """Whether a rule around this one overrides the function."""
    modes = torch_internals.function_modes()
    return any(isinstance(mode, Interception) and func in mode.rule.functions for mode in modes)


def _refuse_half(layer: LinearCall) -> None:
    kind = layer.weight.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if autocast or layer.weight.dtype == torch.float16:
        raise BackpassError(
            "float16 needs a scaled loss, and a semi-implicit step is no linear function of the loss's scale: attach "
            "the rule with attach(model, scaler=scaler), or use bfloat16 (torch.autocast with dtype=torch.bfloat16), "
            "which needs none."
        )


class SemiImplicitAttached(LayerAttached):
    """`SIBP` in force on a model.

    Attributes:
        scaled: whether a GradScaler is known.
    """

    interception: type[Interception] = SemiImplicitInterception
    rule: SIBP

    def __init__(self, rule: SIBP, model: nn.Module, scaler: Any, strict: bool) -> None:
        super().__init__(rule, model, strict)
        self.contribute(scaler)
        self.contributions.watch()

    def contribute(self, scaler: Any = None) -> None:
        """Make `contributions` anew."""
        attached = ref(self)

        def step() -> SemiImplicitStep:
            found = attached()
            if found is None:
                raise BackpassError("the attached rule is gone.")
            return found.rule.step(len(found.sites) if found.rule.eta is None else 1)

        self.scaled = scaler is not None
        self.contributions = SemiImplicitContributions(self, step, scaler)

    def set(self, **settings: Any) -> None:
        """Change settings of the step from the next backward pass on, for schedules.

        Args:
            settings: of `SIBP`, all but ``where``.

        Raises:
            BackpassError: another setting, or a value out of its range.
        """
        known = [field.name for field in fields(self.rule) if field.name != "where"]
        for name in settings:
            if name not in known:
                raise UnknownNameError("setting that can change while the rule is attached", name, known)
        self.rule = replace(self.rule, **settings)
