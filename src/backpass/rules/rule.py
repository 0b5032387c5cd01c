"""A rule, and a rule in force on a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary, ref

from torch import nn

from backpass.errors import BackpassError, NoSiteError
from backpass.rules import hooks
from backpass.rules.interception import (
    Interception,
    LastCall,
    ModuleCalls,
    TorchFunction,
    announce,
    guard_module_hooks,
    pop_modes,
)
from backpass.rules.sites import Site, SiteTable
from backpass.rules.undisturbed import undisturbed
from backpass.rules.wrappers import named_modules, refuse_scripted, unwrap

__all__ = ["EVERYTHING", "BP", "Attached", "Rule", "attachments", "no_site", "probe"]

EVERYTHING = (0, 2**31)
"""The range of a rule that leaves out no site."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A replacement backward for some torch functions at chosen sites of a model; the forward stays as it is.

    A subclass is a frozen dataclass that names the torch functions it re-defines and what to compute instead.

    Attributes:
        name: the rule's name in its text form.
        functions: the torch functions that are sites of this rule, with the name each has in a site table.
    """

    name: ClassVar[str]
    functions: ClassVar[Mapping[TorchFunction, str]]
    needs_site: ClassVar[bool] = True

    @abstractmethod
    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``func(*args, **kwargs)``, to the bit, with this rule's backward."""

    def selects(self, site: Site) -> bool:
        """Whether the rule acts on a site inside its range."""
        return True

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """First site index the rule may act on, and one past the last; ``sites()`` costs a forward pass."""
        return EVERYTHING

    def intercept(self, attached: Attached, first: int, stop: int, whole: bool) -> Interception:
        """The mode for one call of the model (``whole``) or of a part of it."""
        return Interception(attached, first, stop, whole)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the rule's settings do not fit.

        Raises:
            BackpassError: as the rule says.
        """

    def attach(self, model: nn.Module) -> Attached:
        """Re-define the backward of ``model`` until `Attached.remove` or the end of a ``with`` block.

        Wrappers (``torch.compile``, DDP, DataParallel) are seen through. Of two rules that select the same
        site, the one attached last acts.

        Raises:
            NoSiteError: the model is scripted, so its operations cannot be reached.
            BackpassError: ``model`` is no ``nn.Module``, or does not fit the rule's settings.
        """
        return Attached(self, model)

    def __str__(self) -> str:
        from backpass.rules.text import format_rule

        return format_rule(self)


class Attached:
    """A rule in force on a model: ``with rule.attach(model) as attached: ...``.

    A copy of the model (deepcopy, pickle) carries the rule along; `attachments` finds it there.

    Attributes:
        rule: the rule.
        last_call: the sites of the last whole call as plain tuples, and the indices of those re-defined.
    """

    def __init__(self, rule: Rule, model: nn.Module) -> None:
        model = unwrap(model)
        refuse_scripted(model)
        rule.check(model)
        modules = list(named_modules(model))
        self.rule = rule
        self.last_call: LastCall = ([], [])
        self._hook = hooks.free_identifier(model)
        self._model = ref(model)
        self._hooked = [ref(module) for _, module in modules]
        self._numbering: dict[str, int] = {}
        self._calls_of: dict[str, list[str]] = {}
        self._ranges: dict[bool, tuple[int, int, int | None]] = {}
        self._probing = False
        self._probed = SiteTable()
        self._announce()
        for path, module in modules if rule.functions else ():
            calls = ModuleCalls(self, path)
            hooks.insert(module, self._hook, calls.enter, calls.leave)
        guard_module_hooks()

    @property
    def model(self) -> nn.Module:
        """The attached model, without wrappers."""
        model = self._model()
        if model is None:
            raise BackpassError("the model of this attached rule is gone: keep a reference to the model.")
        return model

    @property
    def seen(self) -> SiteTable:
        """The sites of the rule's functions in the last whole call of the model."""
        return SiteTable(Site(*fields) for fields in self.last_call[0])

    @property
    def sites(self) -> SiteTable:
        """Those of them that the rule re-defined."""
        seen, taken = self.last_call
        return SiteTable(Site(*seen[index]) for index in taken)

    def remove(self) -> None:
        """Give the model its own backward again; a second call does nothing."""
        for reference in self._hooked:
            module = reference()
            if module is not None:
                hooks.remove(module, self._hook)
        self._hooked.clear()
        pop_modes(self)
        guard_module_hooks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        model = self._model()
        return f"Attached({self.rule!r}, {type(model).__name__}, {len(self.sites)} sites)"

    def __getstate__(self) -> dict[str, Any]:
        hooked = [module for reference in self._hooked if (module := reference()) is not None]
        return {**self.__dict__, "_model": self._model(), "_hooked": hooked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = ref(state["_model"])
        self._hooked = [ref(module) for module in state["_hooked"]]
        self._announce()

    def _announce(self) -> None:
        # The same for every time that this rule is attached here, so that compiled code serves again.
        serial = _SERIAL.setdefault(self.model, next(_COUNTER))
        self.token = f"{serial} {self._hook} {self.rule!r}"
        announce(self)

    # What the interception asks, in the order of a call.

    @property
    def idle(self) -> bool:
        """Whether the model's own call is looking for its sites just now."""
        return self._probing

    def resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """The range of site indices for a whole call of the model with these arguments."""
        model = self.model
        if model.training not in self._ranges:
            total: int | None = None

            def sites() -> SiteTable:
                nonlocal total
                self._probing = True
                try:
                    table = probe(model, self.rule.functions, args, kwargs)
                finally:
                    self._probing = False
                total = len(table)
                self._probed = table
                return table

            first, stop = self.rule.range(sites)
            self._ranges[model.training] = (first, stop, total)
        first, stop, _ = self._ranges[model.training]
        return first, stop

    def resume(self, path: str) -> tuple[int, int, str]:
        """Range and key for a call of a part of the model by itself, as activation checkpointing makes it.

        Raises:
            BackpassError: no whole call came before, or several of its calls could be meant.
        """
        if self.model.training not in self._ranges:
            raise BackpassError(
                f"module {path!r} was called by itself, but {self.rule!r} numbers its sites in a call of the whole "
                "model: call the model once first, or attach the rule to that module."
            )
        first, stop, _ = self._ranges[self.model.training]
        seen, taken = self.last_call
        keys = self._calls_of.get(path, [])
        patterns = {
            tuple(
                (fields[-1].removeprefix(start), fields[0] in taken)
                for fields in seen
                if fields[-1].startswith((start + "/", start + ":"))
            )
            for start in keys
        }
        if len(patterns) != 1:
            raise BackpassError(
                f"module {path!r} ran {len(keys)} times in the last whole call, with different sites selected, so a "
                "call of it by itself is ambiguous: select by `where` or a module name, or checkpoint around all calls."
            )
        return first, stop, keys[0]

    def index_of(self, key: str) -> int:
        """The site index that a key had in the last whole call.

        Raises:
            BackpassError: the last whole call had no such site.
        """
        if not self._numbering:
            self._numbering = {fields[-1]: fields[0] for fields in self.last_call[0]}
        if key not in self._numbering:
            raise BackpassError(
                f"site {key!r} was not in the last whole call of the model: call the model again."
            )
        return self._numbering[key]

    def selected_inside(self, path: str, first: int, stop: int) -> bool:
        """Whether the rule selects a site in the module of this path, as far as a probe of the model showed."""
        return any(
            first <= site.index < stop and site.inside(path) and self.rule.selects(site)
            for site in self._probed
        )

    def record(self, mode: Interception) -> None:
        """Take note of a whole call that ended, and see that the rule acted where it should.

        Raises:
            NoSiteError: the rule acted nowhere.
            BackpassError: the number of sites is not what the range was resolved for.
        """
        self.last_call = (mode.seen, mode.taken)
        self._calls_of = mode.calls_of
        self._numbering.clear()
        self.verify(len(mode.seen), len(mode.taken))

    def verify(self, seen: int, taken: int) -> None:
        """See that a call with this many sites, and this many re-defined, is what the rule means.

        Raises:
            NoSiteError, BackpassError: as `record`.
        """
        _, _, total = self._ranges[self.model.training]
        if total is not None and total != seen:
            self._ranges.clear()
            raise BackpassError(
                f"the model had {total} sites when {self.rule} was resolved and {seen} in this call, so its range is "
                "not the one meant: count from the front (start=3) or use `where`; or attach the rule anew per call."
            )
        if self.rule.needs_site and not taken:
            raise no_site(self.rule, seen, self.seen)


def no_site(rule: Rule, count: int, table: SiteTable) -> NoSiteError:
    """The error of a rule that selects none of a model's sites."""
    if count:
        return NoSiteError(f"{rule} selects none of the {count} sites of this model:\n{table}")
    names = ", ".join(sorted(set(rule.functions.values())))
    return NoSiteError(
        f"{rule} finds no site: the model calls none of {names} in Python. A scripted, traced or exported model "
        "shows no sites; attach the rule to the original model."
    )


@dataclass(frozen=True, kw_only=True)
class BP(Rule):
    """Plain backpropagation: re-defines nothing. The rule to compare others with."""

    name: ClassVar[str] = "bp"
    functions: ClassVar[Mapping[TorchFunction, str]] = {}
    needs_site: ClassVar[bool] = False

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function itself."""
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class _Listing(Rule):
    """Sees the sites of some functions and changes nothing."""

    name: ClassVar[str] = "listing"
    needs_site: ClassVar[bool] = False
    listed: Mapping[TorchFunction, str]

    @property
    def functions(self) -> Mapping[TorchFunction, str]:  # type: ignore[override]
        return self.listed

    def selects(self, site: Site) -> bool:
        return False

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def probe(
    model: nn.Module, functions: Mapping[TorchFunction, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SiteTable:
    """The sites of ``functions`` in one call of the model, which leaves no lasting effect."""
    with _Listing(listed=functions).attach(model) as listing, undisturbed(model, args, kwargs) as (a, k):
        model(*a, **k)
        return listing.seen


_COUNTER = count()
_SERIAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attachments(model: nn.Module) -> list[Attached]:
    """The rules in force on a model, in the order in which they were attached."""
    model = unwrap(model)
    return [model._forward_pre_hooks[name].__self__.attached for name in hooks.identifiers(model)]  # type: ignore
