"""A rule attached to a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import get_ident
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from backpass.errors import BackpassError, NoSiteError
from backpass.preserved import preserved
from backpass.rules import torch_internals
from backpass.rules.attaching import hooks
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.module_calls import FUSED, ModuleCalls, asks_for_gradients, pop_interceptions
from backpass.rules.attaching.override import BackwardOverride
from backpass.rules.attaching.run import Plan, Run
from backpass.rules.attaching.wrappers import named_modules, out_of_reach, unwrap
from backpass.rules.sites import SiteTable
from backpass.rules.torch_internals import constant_while_tracing

__all__ = ["Attached", "attachments"]


class Attached:
    """A rule attached to a model: ``with rule.attach(model) as attached: ...``.

    A copy of the model (deepcopy, pickle) includes the rule; `attachments` returns it.

    Attributes:
        rule: the rule.
        operators: names of the functions of the rule.
        unreachable: parts that the rule cannot reach: a list of reasons by module path. Complete after the first call
            of the model.
    """

    interception: type[Interception] = Interception

    def __init__(self, rule: BackwardOverride, model: nn.Module, *, strict: bool = False) -> None:
        model = unwrap(model)
        rule.check(model)
        beyond = out_of_reach(model)
        self.rule = rule
        self.strict = strict
        self.unreachable: dict[str, list[str]] = {}
        self._model = ref(model)
        self._identifier = hooks.free_identifier(model)
        self._hooked = []
        self._suspensions = 0
        self._removed = False
        self.operators = frozenset(rule.functions.values())
        self._forget_calls()
        if any(other.rule == rule and not other._suspensions for other in attachments(model)) and rule.functions:
            warnings.warn(f"{rule} is in force on this model already: the one attached last acts.", stacklevel=4)
        if rule.functions:  # no hooks for a rule that overrides nothing
            modules = [(path, one) for path, one in named_modules(model) if type(one) not in rule.skipped or not path]
            self._hooked = [ref(module) for _, module in modules]
            for path, module in modules:
                calls = ModuleCalls(
                    self, path, rule.compositions and _may_be_activation(module), isinstance(module, FUSED)
                )
                with_kwargs = not path or calls.fused
                hooks.insert(module, self._identifier, calls.enter, calls.leave, with_kwargs=with_kwargs)
            self._report(beyond)
        self.token = self._token()

    def _forget_calls(self) -> None:
        self._last: Run | Plan | None = None
        self._plans: dict[tuple[bool, bool], Plan] = {}
        self._served = ""
        self._shown = False
        self._aside: dict[int, tuple[str, list[Any]]] = {}
        self._training = False
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._reported = False

    @property
    def model(self) -> nn.Module:
        """The attached model, without wrappers.

        Raises:
            BackpassError: the model was garbage collected; only a weak reference is kept.
        """
        model = self._model()
        if model is None:
            raise BackpassError("the model of this attached rule is gone: keep a reference to the model.")
        return model

    @property
    def seen(self) -> SiteTable:
        """All sites of the last complete call of the model."""
        last = self._last_call()
        return last.table() if last else SiteTable()

    @property
    def sites(self) -> SiteTable:
        """Sites where the rule acted in the last complete call of the model."""
        last = self._last_call()
        return last.selected() if last else SiteTable()

    def remove(self) -> None:
        """Detach the rule and restore the plain backward; a second call does nothing."""
        for reference in self._hooked:
            module = reference()
            if module is not None:
                hooks.remove(module, self._identifier)
        self._hooked.clear()
        self._removed = True
        pop_interceptions(self)

    @contextmanager
    def suspended(self) -> Iterator[Self]:
        """Suspend the rule in a ``with`` block; its position among other rules is restored afterwards.

        The state of the rule is kept: sites, contributions to the next step, compiled code. Blocks may be nested. After
        `remove` they do nothing. A graph built outside the block keeps the rule's backward inside it. A copy of the
        model made inside the block is plain.
        """
        disabled = self._disable() if not self._suspensions else []
        self._suspensions += 1
        try:
            yield self
        finally:
            self._suspensions -= 1
            if self._hooked:  # not removed inside the block
                for module, pair in disabled:
                    hooks.swap(module, self._identifier, pair)

    def _disable(self) -> list[tuple[nn.Module, hooks.Pair]]:
        modules = [module for reference in self._hooked if (module := reference()) is not None]
        pairs = [(module, hooks.swap(module, self._identifier, None)) for module in modules]
        pop_interceptions(self)
        return [(module, pair) for module, pair in pairs if pair is not None]

    def __enter__(self) -> Self:
        if self._removed:
            raise BackpassError(f"{self.rule} was removed from this model, and acts no more: attach the rule anew.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        removed = self._removed
        self.remove()
        called = self._last is not None or self._served
        if error is None and not removed and self.rule.functions and self.rule.needs_site and not called:
            warnings.warn(
                f"the model was not called while {self.rule} was attached: gradients of an earlier call, or of code "
                "that was compiled around the model before, are plain.",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"Attached({self.rule!r}, {type(self._model()).__name__}, {len(self.sites)} sites)"

    def learn(self, *args: Any, **kwargs: Any) -> None:
        """Call the model once without side effects to find its sites, which compiled code needs beforehand.

        Raises:
            BackpassError: the model has uninitialized lazy modules.
        """
        model = self.model
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            raise BackpassError("the model has lazy modules without a shape: call it once before attaching a rule.")
        args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        modes = torch_internals.function_modes()
        pop_interceptions()
        try:
            with preserved(model, training=None):
                torch_internals.without_tracing(lambda: model(*args, **kwargs))
        finally:
            torch_internals.restore_modes(modes)

    # --- Calls of the model; invoked by the hooks -------------------------------------------------------------------

    def begin(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interception:
        """Return the interception of a call of the model, or of a recomputed part of it."""
        if torch.compiler.is_dynamo_compiling():
            self.prepare(module.training, *args, **kwargs)
            return self.interception(self, Run(self.rule, None))
        if path:
            return self._begin_again(path)
        if torch_internals.forward_mode() and not torch.is_grad_enabled():
            raise BackpassError(f"{self.rule} gives no forward-mode derivative under no_grad: enable gradients.")
        # If this call compiles code, its sites are found before the compilation.
        if not self._shown and torch_internals.dynamo_has_run():
            torch_internals.show_to_modes((*self.rule.functions, *self.rule.observed))
            self._shown = True
        self._training, self._arguments = module.training, (args, kwargs)
        plan = self._plans.get((module.training, torch.is_grad_enabled()))
        if plan is not None and plan.graphless and asks_for_gradients(module, args, kwargs):
            plan = None
        return self.interception(self, Run(self.rule, plan))

    @constant_while_tracing
    def prepare(self, training: bool, /, *args: Any, **kwargs: Any) -> None:
        """Make sure that the sites are known; called while Dynamo traces."""
        self._training, self._arguments = training, (args, kwargs)
        torch_internals.show_to_modes((*self.rule.functions, *self.rule.observed))
        self._plan()

    @constant_while_tracing
    def planned(self, key: str) -> bool:
        """Return True if the rule acts on a call; called while Dynamo traces."""
        by_key = self._plan().by_key
        if key not in by_key:
            raise BackpassError(
                f"tracing meets {key!r}, which an eager call of the model did not: the model does something else when "
                "it is compiled. Attach the rule to the model without torch.compile."
            )
        return by_key[key].counted and by_key[key].selected

    @constant_while_tracing
    def is_composed(self, key: str) -> bool:
        """Return True if a module call computes a single activation; called while Dynamo traces."""
        return key in self._plan().composed

    @constant_while_tracing
    def verify(self, traced: int, met: frozenset[str] = frozenset()) -> str:
        """Check that compiled code contains all sites, and return the name of the plan that it follows.

        Args:
            traced: number of calls in compiled code.
            met: keys of calls outside compiled code.
        """
        plan = self._plan()
        hidden = {one.key: one for one in plan.order if one.is_composed and one.function not in self.operators}
        for one in hidden.values():
            if one.selected and one.key not in met:
                raise BackpassError(
                    f"compiled code does not show {one.function!r}, an activation that module "
                    f"{one.module or '(model)'!r} composes and {self.rule} selects: put it into a module of its own, "
                    "or attach the rule to the model without torch.compile."
                )
        seen, passed = len(plan.order) - len(hidden), traced + len(met - set(hidden))
        if passed != seen:
            raise BackpassError(
                f"compiled code passes {passed} of the {seen} calls that {self.rule} saw in an eager call "
                "of the model: attach the rule to the model without torch.compile."
            )
        return "train" if self._training else "eval"

    def _plan(self) -> Plan:
        """Return the plan of the running call; without one, make an eager call of the model first."""
        if (self._training, True) not in self._plans:
            self.learn(*self._arguments[0], **self._arguments[1])
        return self._plans[self._training, True]

    def end(self, mode: Interception, failed: bool) -> None:
        """Process the end of a call, regular or by an exception."""
        if torch.compiler.is_dynamo_compiling():
            self._served = self.verify(mode.traced)
            return
        if mode.replayed is not None:
            return
        if failed:
            mode.run.abandon()
            return
        training = self.model.training
        if mode.traced:
            plan = self._plan()
            self._last, self._served = plan, ""
            self.verify(mode.traced, frozenset(site.key for site in mode.run.seen_from_outside()))
            mode.run.settle(plan)
            return
        run, self._arguments = mode.run, ((), {})
        run.finish(self.unreachable)
        self._served = ""
        self._last = run
        if run.plan is None:
            self._plans[training, torch.is_grad_enabled()] = Plan(run)
            self._report(run.unreachable)

    def is_aside(self) -> bool:
        """Return True if this thread is inside a module whose calls are not intercepted."""
        return get_ident() in self._aside

    def step_aside(self, mode: Interception) -> None:
        """Remove the interception from the stack until `step_back`."""
        if not self.is_aside():
            modes = torch_internals.function_modes()
            self._aside[get_ident()] = (mode.running[-1].path, modes)
            torch_internals.restore_modes(one for one in modes if one is not mode)

    def step_back(self, path: str) -> None:
        """Restore the interception that `step_aside` removed in the module of this path."""
        if self._aside.get(get_ident(), (None,))[0] == path:
            torch_internals.restore_modes(self._aside.pop(get_ident())[1])

    def replayed_key(self, path: str) -> str:
        """Return the key of the module call that a separate call of this submodule recomputes.

        Raises:
            BackpassError: there was no complete call of the model before, or the call is ambiguous.
        """
        run = self._last
        keys = [call.key for call in run.entered if call.path == path] if isinstance(run, Run) else []
        if not isinstance(run, Run) or not keys:
            raise BackpassError(
                f"module {path!r} was called by itself, but {self.rule} numbers its sites in a call of the whole "
                "model: call the model once first, or attach the rule to that module."
            )
        patterns = {
            tuple(
                (site.key.removeprefix(start), site.selected)
                for site in run.sites
                if site.key.startswith((start + "/", start + ":"))
            )
            for start in keys
        }
        if len(patterns) != 1:
            raise BackpassError(
                f"module {path!r} ran {len(keys)} times in the last whole call, with different sites "
                "selected, so a call of it by itself is ambiguous: select by `where` or a module path instead."
            )
        return keys[0]

    def _begin_again(self, path: str) -> Interception:
        self.replayed_key(path)
        run = self._last
        assert isinstance(run, Run)  # noqa: S101  replayed_key would have raised
        return self.interception(self, run, {site.key: site for site in run.sites})

    def _last_call(self) -> Run | Plan | None:
        return self._plans.get((self._served == "train", True)) if self._served else self._last

    def _report(self, unreachable: dict[str, list[str]]) -> None:
        for path, reasons in unreachable.items():
            known = self.unreachable.setdefault(path, [])
            known += [reason for reason in reasons if reason not in known]
        if not self.unreachable:
            return
        listing = "; ".join(f"{path or '(model)'}: {', '.join(reasons)}" for path, reasons in self.unreachable.items())
        message = f"{self.rule} cannot reach all of this model, which stays plain there: {listing}."
        if self.strict:
            self.remove()
            raise NoSiteError(message + " Without strict=True this is a warning.")
        if not self._reported and self._last is not None:
            self._reported = True
            warnings.warn(message + " See attached.unreachable.", stacklevel=5)

    # --- Copies -----------------------------------------------------------------------------------------------------

    def _token(self) -> str:
        serial = _SERIAL.setdefault(self.model, next(_COUNTER))
        return f"{serial} {self._identifier} {self.rule!r}"

    def __getstate__(self) -> dict[str, Any]:
        hooked = [module for reference in self._hooked if (module := reference()) is not None]
        kept = {name: value for name, value in self.__dict__.items() if name not in _OF_CALLS}
        return {**kept, "_model": self._model(), "_hooked": hooked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_calls()
        self._model = ref(state["_model"])
        self._hooked = [ref(module) for module in state["_hooked"]]
        self.token = self._token()


_OF_CALLS = frozenset(("_last", "_plans", "_served", "_aside", "_training", "_arguments", "_reported", "token"))
_COUNTER = count()
_SERIAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attachments(model: nn.Module) -> list[Attached]:
    """Return the rules attached to a model, in the order of attachment."""
    return [enter.__self__.attached for enter in hooks.of(unwrap(model))]


def _may_be_activation(module: nn.Module) -> bool:
    """Return True for modules without own tensors, except those of torch, whose calls are intercepted directly."""
    return not type(module).__module__.startswith("torch.") and not any(
        one._parameters or one._buffers for one in module.modules()
    )
