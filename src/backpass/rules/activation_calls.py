"""Interception of activations: single functions, products ``x * gate(x)``, and modules that compute one activation."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from backpass.rules import torch_internals
from backpass.rules.activations import ACTIVATIONS, copied, read_call, writes_in_place
from backpass.rules.attaching.interception import Interception, outer_interceptions
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import Decision, ModuleCall, SiteCall
from backpass.rules.compositions import (
    CHOICES,
    ELEMENTWISE,
    JOINS,
    LAYERS,
    MATRIX_PRODUCTS,
    MIXES,
    NONLINEAR,
    POWERS,
    PRODUCTS,
    REDUCTIONS,
    SUMS,
    VIEWS,
    Origin,
    Origins,
    common_path,
    composes,
    constants,
    gates,
    guarded,
    is_of_parameters,
    is_query,
    limits,
    rectifies,
)
from backpass.rules.nonlinear import unexplained

__all__ = ["ActivationInterception"]


class _Watched:
    """A running module that may compute a single activation.

    Attributes:
        call: the call of the module.
        x: input of the module.
        given: tensor that the module computes with: x, or a copy if the module may modify it in place.
        begin: number of calls that the run had recorded before.
        elementwise: True as long as it has called elementwise functions only.
        nonlinear: True if one of them is nonlinear.
    """

    def __init__(self, call: ModuleCall, x: Tensor, given: Tensor, begin: int) -> None:
        self.call, self.x, self.given, self.begin = call, x, given, begin
        self.elementwise = True
        self.nonlinear = False


class ActivationInterception(Interception):
    """Interception that recognises gates and activations composed of several calls.

    The first call of a model analyses every function call, and the backward pass decides. Later calls follow the plan
    and analyse only modules that compose activations. Compiled code follows the plan without analysis.

    Attributes:
        masked: graph nodes of calls that apply a mask computed from the output of a layer.
    """

    follows = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watched: list[_Watched] = []
        self.masked: set[Any] = set()
        self.compositions = self.rule.compositions

    def _analyses(self, caller: ModuleCall) -> bool:
        if is_dynamo_compiling():  # first, so that compiled code has no guard on the conditions below
            return False
        if caller.analysed or self.run.plan is not None or self.replayed is not None:
            return caller.analysed
        return bool(self.compositions)

    def _origins(self, call: ModuleCall) -> Origins:
        if call.origins is None:
            call.origins = Origins()
        origins: Origins = call.origins
        return origins

    # --- Functions --------------------------------------------------------------------------------------------------

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an activation by the decision for its site, and record the origin of its output."""
        if self.partial and not self.rule.covers(func, args, kwargs):
            site.covered = site.counted = False
            return func(*args, **kwargs)
        if not self._analyses(self.running[-1]):
            return super().call_site(site, func, args, kwargs)
        x = args[0] if args else kwargs["input"]
        origin = self._origins(self.running[-1]).of(x)
        if is_of_parameters(x, origin):
            site.counted = False
            return func(*args, **kwargs)
        out = super().call_site(site, func, args, kwargs)
        self._note_nonlinear()
        _adopt(out)
        direct = site if origin.base is x else None
        nonlinear, sites = site.function, (*origin.sites, site)
        self._origins(self.running[-1]).note(
            out, Origin(origin.source, nonlinear, sites, out.numel(), direct, learns=origin.learns, path=origin.path)
        )
        return out

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None) -> Any:
        """Call an activation with the rule's backward."""
        if site is None:
            return self.rule.replace(func, args, kwargs)
        return self.rule.replace_call(func, args, kwargs, site)

    def replace_planned(
        self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Call an activation with the rule's backward, where the plan predicts that the rule acts."""
        if site is None:
            return self.rule.replace(func, args, kwargs)
        return self.rule.replace_planned(func, args, kwargs, site)

    def plain_in_graph(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an activation with its plain backward in compiled code."""
        if func not in ACTIVATIONS:
            return func(*args, **kwargs)
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        return func(*args, **kwargs) if in_place else activation.compute(x, *parameters)

    def note_hidden(self, caller: ModuleCall, name: str) -> None:
        """Record an activation that is called without gradients."""
        super().note_hidden(caller, name)
        self._note_nonlinear()

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no activation, but may be a part of one."""
        if not self._analyses(caller):
            return super().call_other(caller, func, args, kwargs)
        if func not in ELEMENTWISE and func not in VIEWS and not is_query(func):
            for watched in self.watched:
                watched.elementwise = False
        if caller.grad_enabled != torch.is_grad_enabled():
            if func in NONLINEAR:
                self.note_hidden(caller, func.__name__)
            return func(*args, **kwargs)
        if func in VIEWS:
            out = func(*args, **kwargs)
            self._arranged(args, out)
            return out
        if func not in ELEMENTWISE and func not in MIXES:
            if func in REDUCTIONS and args and isinstance(args[0], Tensor):
                _recount_power(self._origins(caller).of(args[0]))
            out = super().call_other(caller, func, args, kwargs)
            self._note_mask(func, args, kwargs, out)
            if func in LAYERS and isinstance(out, Tensor):
                for site in self._origins(caller).of(args[0]).sites if args else ():
                    site.enters_layer = True
                    site.counted |= site.gates
                self._origins(caller).note(out, Origin(out, "", (), out.numel(), path=(out,), layer=True))
            elif func in JOINS:
                self._joined(func, args, out)
            return out
        if func in NONLINEAR:
            self._note_nonlinear()
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        origins = [self._origins(caller).of(x) for x in operands]
        fixed = constants(func, operands, origins)
        parameters = [
            x for x, constant in zip(operands, fixed, strict=True) if constant and isinstance(x, nn.Parameter)
        ]
        learns = any(x.requires_grad for x in parameters)
        _discount(guarded(func, operands, origins))
        origins = [origin for origin, constant in zip(origins, fixed, strict=True) if not constant]
        source = origins[0].source if origins and all(one.source is origins[0].source for one in origins) else None
        if source is not None and not isinstance(source, nn.Parameter):
            between = limits(func, args, kwargs)
            layer = len(origins) == 1 and not origins[0].nonlinear and self._is_layer(origins[0])
            if composes(func, origins, bool(parameters)) or (layer and rectifies(between)):
                return self._compose(caller, source, origins, learns, func, args, kwargs)
        out = func(*args, **kwargs)
        self._note_mask(func, args, kwargs, out)
        if isinstance(out, Tensor) and origins:
            if func in MATRIX_PRODUCTS:
                origins = [
                    origin
                    for x, origin in zip(operands, map(self._origins(caller).of, operands), strict=True)
                    if x.requires_grad and not is_of_parameters(x, origin)
                ]
            self._follow(func, source, origins, learns, out)
        return out

    def _note_mask(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record a call that applies a mask which is a function of a tensor."""
        out = args[0] if func is Tensor.__setitem__ else out
        if func in SUMS or not isinstance(out, Tensor) or out.grad_fn is None:
            return
        given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.requires_grad)
        if any(_is_mask(x, self._origins(self.running[-1]).of(x)) for x in given):
            self.masked.add(out.grad_fn)

    def _note_unexplained(self, call: ModuleCall, output: Any) -> None:
        """Record the nonlinear operations of the finished call that are no sites."""
        if self.run.plan is not None or self.replayed is not None or torch_internals.transforms():
            return
        leaves = [one for leaf in tree_leaves(output) for one in (leaf, *getattr(leaf, "__dict__", {}).values())]
        given = [x for x in leaves if isinstance(x, Tensor) and x.grad_fn is not None]
        self.run.graphless = not given
        nodes = [x.grad_fn for x in [x for x in given if x.dim()] or given]  # without a loss beside the output
        known = {*self.attached.unreachable, *self.run.unreachable}
        for number, reason in unexplained(nodes, self.masked, self.left_plain, self.rule.gates):
            inside = [one for one in self.run.entered if one.begin <= number < one.end]
            path = max(inside, key=lambda one: one.depth, default=call).path
            if path not in known:
                self.note_unreachable(path, reason)

    def _is_layer(self, origin: Origin) -> bool:
        """Return True if a tensor is the output of a layer, including layers called by an enclosing module."""
        source = origin.source
        return origin.layer or (
            source is not None and any(call.origins.of(source).layer for call in self.running if call.origins)
        )

    def _follow(
        self, func: TorchFunction, source: Tensor | None, origins: list[Origin], learns: bool, out: Tensor
    ) -> None:
        """Record the origin of the output of an elementwise function, or that it multiplies by a gate."""
        if func in ELEMENTWISE and (source is not None or len(origins) == 1):
            sites = tuple(site for origin in origins for site in origin.sites)
            names = [one.nonlinear for one in origins if one.nonlinear]
            nonlinear = func.__name__ if func in NONLINEAR or func in CHOICES else (*names, "")[0]
            learns = learns or any(origin.learns for origin in origins)
            path = common_path(origins) if nonlinear else (*common_path(origins), out)
            layer = not nonlinear and any(one.layer for one in origins)
            origin = Origin(source, nonlinear, sites, origins[0].numel, learns=learns, path=path, layer=layer)
            self._origins(self.running[-1]).note(out, origin)
        elif func not in PRODUCTS and func not in MIXES and any(origin.layer for origin in origins):
            self._origins(self.running[-1]).note(out, Origin(out, "", (), out.numel(), path=(out,), layer=True))
        elif (func in PRODUCTS or func in MIXES) and not self.rule.gates:
            for site in (site for origin in gates(func, origins, out) for site in origin.sites):
                site.gates |= site.counted
                site.counted &= site.enters_layer

    def _compose(
        self,
        caller: ModuleCall,
        source: Tensor,
        origins: list[Origin],
        learns: bool,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the product that completes an activation of ``source``, or scales one."""
        nonlinear = next((origin.nonlinear for origin in origins if origin.nonlinear), func.__name__)
        path = common_path(origins)
        begin = path[-1] if path else source
        site = origins[0].direct if len(origins) == 1 and func not in POWERS else None
        if site is None:
            parts = [site for origin in origins for site in origin.sites]
            _discount(parts)
            site = self.record(caller, _name(func, nonlinear), begin)
            if func in POWERS:
                site.power_of = parts
            site.by_hand = len(origins) == 1 and not origins[0].nonlinear
        self._note_nonlinear()
        self.run.composing.update((caller.path, *(one.module for origin in origins for one in origin.sites)))
        learns = learns or any(origin.learns for origin in origins)
        if not writes_in_place(func, args, kwargs):
            out = self.at_value(site, begin, func(*args, **kwargs), learns)
        else:
            before = copied(begin) if begin is args[0] else begin
            x = before if begin is args[0] else args[0]
            out = args[0].copy_(self.at_value(site, before, func(copied(x), *args[1:], **kwargs), learns))
        self._origins(caller).note(out, Origin(source, nonlinear, (site,), out.numel(), site, True, learns, path))
        return out

    def at_value(self, site: SiteCall, source: Tensor, plain: Tensor, learns: bool = False) -> Tensor:
        """Apply the rule's backward to a value computed from ``source``, by the decision for its site."""
        if (site.selected is False and site.fixed) or not torch.is_grad_enabled():
            return plain
        if site.selected is None and torch_internals.forward_mode():
            self.run.decide_early(site)
            return self.at_value(site, source, plain, learns)
        if learns:
            value = self.rule.replace_learned(source, plain, site)
        else:
            kept = (plain.detach(), None) if site.fixed and not self.rule.needs_plain else (plain, site)
            value = self.rule.replace_value(source, *kept)
        _adopt(value)
        return value  # type: ignore[no-any-return]

    def _arranged(self, args: tuple[Any, ...], out: Any) -> None:
        origin = self._origins(self.running[-1]).of(args[0]) if args and isinstance(args[0], Tensor) else None
        if origin is not None and (origin.sites or origin.layer):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    numel = min(origin.numel, leaf.numel())
                    if origin.layer:
                        one = Origin(leaf, "", (), numel, path=(leaf,), layer=True)
                    else:
                        one = Origin(None, origin.nonlinear, origin.sites, numel)
                    self._origins(self.running[-1]).note(leaf, one)

    def _joined(self, func: TorchFunction, args: tuple[Any, ...], out: Any) -> None:
        known = [self._origins(self.running[-1]).of(x) for x in tree_leaves(args) if isinstance(x, Tensor)]
        sites = tuple(site for origin in known for site in origin.sites)
        if isinstance(out, Tensor) and (sites or any(origin.layer for origin in known)):
            # A mean has fewer elements than its input. That alone does not make it a gate.
            one = Origin(None, "", sites, sys.maxsize if func.__name__ == "mean" else out.numel())
            if not sites:
                one = Origin(out, "", (), out.numel(), path=(out,), layer=True)
            self._origins(self.running[-1]).note(out, one)

    def _note_nonlinear(self) -> None:
        for watched in self.watched:
            watched.nonlinear = True

    # --- Modules ----------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...], activation: bool) -> Any:
        """Record the start of a module call, and watch the module if it may compute a single activation."""
        super().enter(module, path, key, args, activation)
        call = self.running[-1]
        if is_dynamo_compiling():
            if activation and self.attached.is_composed(key):
                call.plain, call.x = True, args[0]
            return None
        known = self.run if self.replayed is not None else self.run.plan
        call.analysed = self.compositions and (known is None or path in known.composing)
        call.begin = torch_internals.next_sequence_number()
        if not activation or call.plain or len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        x = args[0]
        if known is None:
            writes, begin = True, len(self.run.sites)  # unknown yet: assume so
        elif key in known.composed:
            call.plain, call.x = True, x
            writes, begin = key in known.writing, 0
        else:
            return None
        with torch._C.DisableTorchFunction():
            given = copied(x) if writes else x
        self.watched.append(_Watched(call, x, given, begin))
        return (given,) if writes else None

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Record the end of a module call, and apply the rule if the module computed a single activation."""
        if is_dynamo_compiling():
            if call.x is None:
                return output
            planned = self.attached.planned(f"{call.key}:{type(module).__name__}")
            self.traced += 1
            return self.rule.replace_value(call.x, output.detach(), None) if planned else output
        call.end = torch_internals.next_sequence_number()
        if len(self.running) == 1 and self.compositions:
            self._note_unexplained(call, output)
        if not (self.watched or call.hidden or call.origins):
            return output
        watched = self.watched.pop() if self.watched and self.watched[-1].call is call else None
        if watched is not None and isinstance(output, Tensor):
            with torch._C.DisableTorchFunction():
                output = self._whole(module, watched, self._origins(call).of(output), output)
        output = super().leave(module, call, output)
        if call.origins is not None and len(self.running) > 1:
            call.origins.pass_on(tree_leaves(output), self._origins(self.running[-2]))
        return output

    def _whole(self, module: nn.Module, watched: _Watched, origin: Origin, output: Tensor) -> Tensor:
        """Apply the rule's backward to the output of a module that computed a single activation."""
        call, x, given = watched.call, watched.x, watched.given
        wrote = output is given and given is not x and _was_written(given, x)
        if output is given and not wrote:
            return x
        if not call.plain and not self._is_activation(watched, origin, output):
            return x.copy_(output) if wrote else output
        if not call.plain:
            _discount(self.run.sites[watched.begin :])
            self.run.composed.add(call.key)
            if wrote:
                self.run.writing.add(call.key)
            call.hidden = ()
        call.plain = False
        name = type(module).__name__
        site = self.record(call, name, x, f"{call.key}:{name}")
        output = self.at_value(site, x.clone() if wrote else x, output)
        output = x.copy_(output) if wrote else output
        self._origins(call).note(output, Origin(x, name, (site,), output.numel(), site, path=(x,)))
        return output

    def _is_activation(self, watched: _Watched, origin: Origin, output: Tensor) -> bool:
        """Return True if a module composed an elementwise activation, rather than calling an existing one."""
        if not (watched.elementwise and watched.nonlinear and output.shape == watched.x.shape):
            return False
        sites = [site for site in self.run.sites[watched.begin :] if site.counted]
        if len(self.running) == 1 and sites:
            return False  # the model itself
        alone = len(sites) == 1 and origin.base is watched.given and origin.direct is sites[0]
        return origin.product or not alone  # in compiled code a composed activation is visible only as a module


def _is_mask(x: Tensor, origin: Origin) -> bool:
    weighs = x.is_floating_point() or x.dtype == torch.bool
    return weighs and bool(origin.nonlinear) and origin.source is not None and origin.source.requires_grad


def _name(func: TorchFunction, nonlinear: str) -> str:
    """Return the name of a composed activation in a table of sites."""
    if func in PRODUCTS:
        return f"x*{nonlinear}"
    return f"{nonlinear}**n" if func in POWERS else func.__name__.strip("_")


def _adopt(out: Any) -> None:
    """Pass the origin of a value on to outer rules, which recorded it before this rule replaced it."""
    for mode in outer_interceptions():
        if isinstance(mode, ActivationInterception) and mode._analyses(mode.running[-1]):
            mode._origins(mode.running[-1]).adopt(out)


def _was_written(given: Tensor, x: Tensor) -> bool:
    return not torch.equal(given, x) if given.is_inference() else given._version > 0


def _discount(sites: Iterable[SiteCall]) -> None:
    for site in sites:
        site.counted = False


def _recount_power(origin: Origin) -> None:
    """Count a power of an activation as a part of a norm, not as an activation."""
    power = origin.direct
    if power is not None and power.power_of:
        power.counted = False
        for site in power.power_of:
            site.counted = True
