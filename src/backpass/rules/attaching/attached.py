"""A rule in force on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, ref

from torch import nn

from backpass.errors import BackpassError
from backpass.rules.attaching import hooks
from backpass.rules.attaching.dynamo import guard_module_hooks
from backpass.rules.attaching.interception import Intercept, Interception, ModuleCalls, interceptions_aside, pop_modes
from backpass.rules.attaching.numbering import Numbering
from backpass.rules.attaching.redefinition import Redefinition
from backpass.rules.attaching.undisturbed import undisturbed
from backpass.rules.attaching.wrappers import named_modules, refuse_scripted, unwrap

__all__ = ["Attached", "attachments"]


class Attached(Numbering):
    """A rule in force on a model: ``with rule.attach(model) as attached: ...``.

    A copy of the model (deepcopy, pickle) carries the rule along; `attachments` finds it there.

    Attributes:
        rule: the rule.
        sites: the sites that the rule re-defined in the last whole call of the model.
        seen: all sites of the rule's functions in that call.
    """

    def __init__(self, rule: Redefinition, model: nn.Module, intercept: Intercept = Interception) -> None:
        model = unwrap(model)
        refuse_scripted(model)
        rule.check(model)
        super().__init__(rule)
        self._identifier = hooks.free_identifier(model)
        self._model = ref(model)
        # A rule that re-defines nothing costs nothing.
        modules = [
            (path, module)
            for path, module in named_modules(model)
            if rule.functions and (type(module) not in rule.silent or not path)
        ]
        self._hooked = [ref(module) for _, module in modules]
        self._suspensions = 0
        self._removed = False
        for path, module in modules:
            calls = ModuleCalls(self, intercept, path)
            hooks.insert(module, self._identifier, calls.enter, calls.leave, with_kwargs=not path)
        self.announce(self._token())
        guard_module_hooks()

    @property
    def model(self) -> nn.Module:
        """The attached model, without wrappers.

        Raises:
            BackpassError: the model is gone; the rule does not keep it alive.
        """
        model = self._model()
        if model is None:
            raise BackpassError("the model of this attached rule is gone: keep a reference to the model.")
        return model

    def remove(self) -> None:
        """Give the model its own backward again; a second call does nothing."""
        for reference in self._hooked:
            module = reference()
            if module is not None:
                hooks.remove(module, self._identifier)
        self._hooked.clear()
        self._removed = True
        pop_modes(self)
        guard_module_hooks()

    @contextmanager
    def suspended(self) -> Iterator[Self]:
        """Out of force in a ``with`` block, and in force again after it, in its old place among other rules.

        Nothing that the rule keeps is lost: its range of sites, what `ProxProp` collected for the next step, compiled
        code. Blocks may be nested; after `remove` they do nothing. A graph built outside the block keeps the rule's
        backward inside it, and a copy of the model made inside is plain.
        """
        silenced = self._silence() if not self._suspensions else []
        self._suspensions += 1
        try:
            yield self
        finally:
            self._suspensions -= 1
            if self._hooked:  # not removed meanwhile
                for module, pair in silenced:
                    hooks.swap(module, self._identifier, pair)

    def _silence(self) -> list[tuple[nn.Module, hooks.Pair]]:
        """Put silence in the place of the hooks; which they were."""
        modules = [module for reference in self._hooked if (module := reference()) is not None]
        pairs = [(module, hooks.swap(module, self._identifier, None)) for module in modules]
        pop_modes(self)
        return [(module, pair) for module, pair in pairs if pair is not None]

    def __enter__(self) -> Self:
        if self._removed:
            raise BackpassError(f"{self.rule} was removed from this model, and acts no more: attach the rule anew.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attached({self.rule!r}, {type(self._model()).__name__}, {len(self.sites)} sites)"

    def probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model once more with these arguments, leaving no lasting effect."""
        with undisturbed(self.model, args, kwargs) as (copies, named), interceptions_aside():
            self.model(*copies, **named)

    def _token(self) -> str:
        serial = _SERIAL.setdefault(self.model, next(_COUNTER))
        return f"{serial} {self._identifier} {self.rule!r}"

    def __getstate__(self) -> dict[str, Any]:
        hooked = [module for reference in self._hooked if (module := reference()) is not None]
        return {**self.__dict__, "_model": self._model(), "_hooked": hooked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = ref(state["_model"])
        self._hooked = [ref(module) for module in state["_hooked"]]
        self.announce(self._token())


_COUNTER = count()
_SERIAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attachments(model: nn.Module) -> list[Attached]:
    """The rules in force on a model, in the order in which they were attached."""
    return [enter.__self__.numbering for enter in hooks.of(unwrap(model))]
