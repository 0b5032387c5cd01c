"""One call of an attached model: its sites in order, and which of them the rule selects.

A range that is counted from the end is known only when the call has ended. A site whose selection is not known when its
function is called gets a kernel that asks `SiteCall.active` in the backward pass. What a call showed is kept as a `Plan`:
the next call follows it, key by key, and checks at its end that the plan was right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from backpass.errors import BackpassError
from backpass.rules.attaching.override import BackwardOverride, no_site
from backpass.rules.places import Place, counts_from_end
from backpass.rules.sites import Site, SiteTable

__all__ = ["Plan", "Run", "SiteCall"]


class SiteCall:
    """One call of a function that may be a site.

    Attributes:
        run: the call of the model that it belongs to.
        key: the chain of module calls that leads here, the function and its call index; the same in a recomputation.
        module: path of the innermost running module.
        function: name of the function.
        shape: shape of its input.
        counted: whether it is a site; False for a gate, or for a part of a composed activation.
        excluded: whether the rule leaves the site plain although it is in its range.
        selected: whether the rule acts here; None while that is not known.
        kernel: whether the call went through the rule's kernel.
        fixed: whether the decision was taken when the function was called, and cannot be revised.
        hooked: whether the rule acts by a hook on the graph node of the plain call.
        node: graph node of a plain call that may yet turn out to be selected.
        delegate: the site of a rule further in that may act in the place of this one.
    """

    __slots__ = (
        "counted",
        "delegate",
        "excluded",
        "fixed",
        "function",
        "hooked",
        "kernel",
        "key",
        "module",
        "node",
        "run",
        "selected",
        "shape",
    )

    def __init__(self, run: Run, key: str, module: str, function: str, shape: tuple[int, ...]) -> None:
        self.run = run
        self.key = key
        self.module = module
        self.function = function
        self.shape = shape
        self.counted = True
        self.excluded = False
        self.selected: bool | None = None
        self.kernel = False
        self.fixed = False
        self.hooked = False
        self.node: Any = None
        self.delegate: SiteCall | None = None

    def active(self) -> bool:
        """Return whether the rule acts here; the backward pass asks.

        Raises:
            BackpassError: a gradient is computed inside the model's own forward, where the range is not known yet.
        """
        if self.selected is None:
            self.run.decide_early(self)
        if self.run.plain or not self.selected:
            return False
        return self.delegate is None or not self.delegate.active()

    def inside(self, module: str) -> bool:
        """Return whether the call happens in the module of this path or below it."""
        return module in ("", self.module) or self.module.startswith(module + ".")


class Plan:
    """The sites of a finished call, to follow in the next one.

    Attributes:
        keys: of all calls that were noted, in order.
        by_key: what each call was.
        composed: keys of module calls that were one activation as a whole.
        composing: paths of modules whose own forward composes an activation of several calls.
    """

    def __init__(self, run: Run) -> None:
        self.keys = [site.key for site in run.sites]
        self.by_key = {site.key: (site.counted, bool(site.selected)) for site in run.sites}
        self.composed = run.composed
        self.composing = run.composing
        self._tables = run.table(), run.selected()

    def table(self) -> SiteTable:
        """Return all sites."""
        return self._tables[0]

    def selected(self) -> SiteTable:
        """Return the sites where the rule acts."""
        return self._tables[1]


class Run:
    """The sites of one call of an attached model, in the order of their calls.

    Attributes:
        rule: the rule.
        plan: the sites of the last call, as long as this one is the same; else None.
        sites: the sites, and calls that turned out to be none.
        entered: path and key of each module call.
        unreachable: what the rule cannot reach, by module.
        composed: as in `Plan`.
        composing: as in `Plan`.
        relative: whether the range is counted from the end.
        plain: whether the backward pass leaves all sites plain, for the time being.
    """

    def __init__(self, rule: BackwardOverride, plan: Plan | None) -> None:
        self.rule = rule
        self.plan = plan
        self.sites: list[SiteCall] = []
        self.entered: list[tuple[str, str]] = []
        self.unreachable: dict[str, list[str]] = {}
        self.composed: set[str] = set(plan.composed) if plan else set()
        self.composing: set[str] = set(plan.composing) if plan else set()
        self.relative = counts_from_end(rule.start) or counts_from_end(rule.stop)
        self.plain = False
        self._count = 0
        self._first_inside: dict[str, int] = {}
        self._calls: Counter[tuple[str, str]] = Counter()

    def meet(self, key: str, module: str, function: str, shape: tuple[int, ...]) -> SiteCall:
        """Note a call, and decide about it if that can be done now."""
        site = SiteCall(self, key, module, function, shape)
        self.sites.append(site)
        if self.plan is not None:
            known = self.plan.by_key.get(key)
            if known is None:
                self.plan = None  # another number of sites than in the last call
            else:
                site.counted, planned = known
                if not site.counted:
                    site.selected, site.fixed = False, True
                elif self.relative:
                    site.selected = planned
                else:
                    site.selected, site.fixed = self._selects(site), True
        return site

    def _selects(self, site: SiteCall) -> bool:
        """Select a site of a range that is counted from the front; called once for each site, in order."""
        index, self._count = self._count, self._count + 1
        start, stop = self._known(self.rule.start, site, index), self._known(self.rule.stop, site, index)
        if index < (0 if self.rule.start is None else start) or (self.rule.stop is not None and index >= stop):
            return False
        where = self.rule.where
        if where is None:
            return True
        call = self._calls[site.module, site.function]
        self._calls[site.module, site.function] += 1
        return bool(where(Site(index, site.module, site.function, call, site.shape, site.key)))

    def _known(self, place: Place, site: SiteCall, index: int) -> int:
        if isinstance(place, str):
            if place not in self._first_inside and site.inside(place):
                self._first_inside[place] = index
            return self._first_inside.get(place, 2**62)
        return place if isinstance(place, int) else 0

    def table(self) -> SiteTable:
        """Return all sites."""
        counted = [site for site in self.sites if site.counted]
        calls: Counter[tuple[str, str]] = Counter()
        table = SiteTable()
        for index, site in enumerate(counted):
            place = (site.module, site.function)
            table.append(Site(index, *place, calls[place], tuple(site.shape), site.key))
            calls[place] += 1
        return table

    def selected(self) -> SiteTable:
        """Return the sites where the rule acts, less those that a rule further in took over."""
        counted = [site for site in self.sites if site.counted]
        return SiteTable(row for row, site in zip(self.table(), counted, strict=True) if site.active())

    def finish(self, unreachable: Mapping[str, list[str]]) -> None:
        """Decide about every site, now that their number is known.

        Args:
            unreachable: what is known to be out of reach, for the error.

        Raises:
            NoSiteError: the rule selects no site.
            BackpassError: a decision that was already acted on turns out to be wrong.
        """
        followed = self.plan is not None and [site.key for site in self.sites] == self.plan.keys
        if not followed:
            table = self.table()
            chosen = {row.key for row in table if self._in_range(row, table)}
            for site in self.sites:
                self._settle(site, site.counted and not site.excluded and site.key in chosen)
        for site in self.sites:
            site.node = None  # a graph that refers to its nodes would never be freed
        if self.rule.needs_site and not any(site.selected for site in self.sites):
            raise no_site(self.rule, self.table(), {**unreachable, **self.unreachable})

    def settle(self, plan: Plan) -> None:
        """Decide about every site as in another call, where compiled code has passed a part of them."""
        for site in self.sites:
            self._settle(site, all(plan.by_key.get(site.key, (False,))))
            site.node = None

    def abandon(self) -> None:
        """Let go of the graph after an exception."""
        for site in self.sites:
            site.node = None

    def _settle(self, site: SiteCall, chosen: bool) -> None:
        if site.selected is not None and site.selected != chosen:
            if site.fixed:
                raise BackpassError(
                    f"a gradient inside the model's forward was computed with {self.rule} "
                    f"{'acting' if site.selected else 'not acting'} on {site.function!r} in {site.module or '(model)'!r}, "
                    "which the finished call shows to be wrong: select this site by `where`."
                )
            if chosen and site.node is not None:
                override: Any = self.rule
                site.node.register_hook(override.on_node)
                site.hooked = True
        site.selected = chosen

    def _in_range(self, row: Site, table: SiteTable) -> bool:
        def index(place: Place, default: int) -> int:
            if place is None:
                return default
            if isinstance(place, str):
                return next((one.index for one in table if one.inside(place)), len(table))
            if isinstance(place, float):
                return int(place * len(table))
            return place if place >= 0 else max(len(table) + place, -1)

        first, end = index(self.rule.start, 0), index(self.rule.stop, len(table))
        if not 0 <= first <= row.index < end:
            return False
        return self.rule.where is None or bool(self.rule.where(row))

    def decide_early(self, site: SiteCall) -> None:
        """Decide about a site before the call has ended, because a gradient inside the model's forward needs it.

        Raises:
            BackpassError: the range is counted from the end.
        """
        if self.relative:
            raise BackpassError(
                f"a gradient is computed inside the model's forward, before the number of its sites is known, and "
                f"{self.rule} counts from the end: count from the front (start=3), or give a module path."
            )
        table = self.table()
        chosen = {row.key for row in table if self._in_range(row, table)}
        site.selected, site.fixed = site.counted and site.key in chosen, True
