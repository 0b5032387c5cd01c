"""The numbers of an attached model's sites: which range a rule acts on, and what the last call showed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

from backpass.errors import BackpassError
from backpass.rules.attaching.dynamo import constant_while_tracing, show_to_modes
from backpass.rules.attaching.redefinition import Redefinition, no_site
from backpass.rules.sites import Seen, Site, SiteTable, sites_of

__all__ = ["Numbering", "resolve", "resolve_while_tracing", "verify_while_tracing"]


class Numbering(ABC):
    """The site numbers of one attached model.

    Attributes:
        token: names the model and the rule; the same each time that this rule is attached to this model, so that
            compiled code, which finds the numbering by it, serves again.
        probing: the threads in which the model is being called just to find its sites, and what was found.
        last_call: what was seen in the last whole call, and the indices of the sites that the rule re-defined.
    """

    def __init__(self, rule: Redefinition) -> None:
        self.rule = rule
        self.token = ""
        self.probing: dict[int, SiteTable] = {}
        self.last_call: tuple[list[Seen], list[int]] = ([], [])
        self._by_key: dict[str, Site] = {}
        self._entered: list[tuple[str, str]] = []
        self._probed = SiteTable()
        self._resolved: tuple[int, int, int | None] | None = None
        self._training: bool | None = None

    @property
    def seen(self) -> SiteTable:
        """The sites of the rule's functions in the last whole call of the model."""
        return sites_of(self.last_call[0])

    @property
    def sites(self) -> SiteTable:
        """Those of them that the rule re-defined."""
        seen = self.seen
        return SiteTable(seen[index] for index in self.last_call[1])

    @abstractmethod
    def probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model once more with these arguments, leaving no lasting effect."""

    def announce(self, token: str) -> None:
        """Be found under ``token``."""
        self.token = token
        _BY_TOKEN[token] = self

    def resolve(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """The range of site indices for a whole call of the model with these arguments."""
        show_to_modes(self.rule.functions)
        if self._resolved is None or training != self._training:
            total: int | None = None

            def sites() -> SiteTable:
                nonlocal total
                self.probing[get_ident()] = SiteTable()
                try:
                    self.probe(args, kwargs)
                finally:
                    self._probed = self.probing.pop(get_ident())
                total = len(self._probed)
                return self._probed

            self._resolved, self._training = (*self.rule.range(sites), total), training
        return self._resolved[:2]

    def resume(self, path: str) -> tuple[int, int, str]:
        """Range and key for a call of a part of the model by itself, as activation checkpointing makes it.

        Raises:
            BackpassError: no whole call came before, or several of its calls could be meant.
        """
        keys = [key for entered, key in self._entered if entered == path]
        if self._resolved is None or not keys:
            raise BackpassError(
                f"module {path!r} was called by itself, but {self.rule} numbers its sites in a call of the whole "
                "model: call the model once first, or attach the rule to that module."
            )
        seen, taken = self.seen, self.last_call[1]
        patterns = {
            tuple(
                (site.key.removeprefix(start), site.index in taken)
                for site in seen
                if site.key.startswith((start + "/", start + ":"))
            )
            for start in keys
        }
        if len(patterns) != 1:
            raise BackpassError(
                f"module {path!r} ran {len(keys)} times in the last whole call, with different sites "
                "selected, so a call of it by itself is ambiguous: select by `where` or a module path instead."
            )
        return *self._resolved[:2], keys[0]

    def site_at(self, key: str) -> Site:
        """The site that had this key in the last whole call.

        Raises:
            BackpassError: the last whole call had no such site.
        """
        if not self._by_key:
            self._by_key = {site.key: site for site in self.seen}
        if key not in self._by_key:
            raise BackpassError(f"site {key!r} was not in the last whole call of the model: call the model again.")
        return self._by_key[key]

    def selects_inside(self, path: str) -> bool:
        """Whether the rule selects a site in the module of this path, as far as a probe of the model showed."""
        first, stop, _ = self._resolved or (0, 0, None)
        where = self.rule.where
        return any(
            first <= site.index < stop and site.inside(path) and (where is None or bool(where(site)))
            for site in self._probed
        )

    @property
    def is_probing(self) -> bool:
        """Whether this thread calls the model just to find its sites."""
        return bool(self.probing) and get_ident() in self.probing

    def record(self, seen: list[Seen], taken: list[int], selected: int, entered: list[tuple[str, str]]) -> None:
        """Take note of a whole call that ended."""
        if self.is_probing:
            self.probing[get_ident()] = sites_of(seen)
        else:
            self.last_call, self._entered, self._by_key = (seen, taken), entered, {}
            self.verify(len(seen), selected)

    def verify(self, seen: int, selected: int) -> None:
        """See that a call with this many sites, and this many selected, is what the rule means.

        Raises:
            NoSiteError: no site was selected.
            BackpassError: the number of sites is not what the range was resolved for.
        """
        total = self._resolved[2] if self._resolved else None
        if total is not None and total != seen:
            self._resolved = None
            raise BackpassError(
                f"the model had {total} sites when {self.rule} was resolved and {seen} in this call, so its range is "
                "not the one meant: count from the front (start=3) or use `where`; or attach the rule anew per call."
            )
        if self.rule.needs_site and not selected:
            raise no_site(self.rule, seen, self.seen)


_BY_TOKEN: WeakValueDictionary[str, Numbering] = WeakValueDictionary()


def resolve(token: str, training: bool, /, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """`Numbering.resolve` of the numbering with this token."""
    return _BY_TOKEN[token].resolve(training, args, kwargs)


@constant_while_tracing
def resolve_while_tracing(token: str, training: bool, /, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """The same while Dynamo traces, with the real arguments."""
    return _BY_TOKEN[token].resolve(training, args, kwargs)


@constant_while_tracing
def verify_while_tracing(token: str, seen: int, selected: int) -> None:
    """`Numbering.verify` of the numbering with this token, while Dynamo traces."""
    _BY_TOKEN[token].verify(seen, selected)
