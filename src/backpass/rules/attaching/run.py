"""One call of an attached model: its sites in order, and which of them the rule selects.

A range that is counted from the end is known only when the call has ended. A site whose selection is not known when
its function is called gets a kernel that asks `SiteCall.active` in the backward pass. What a call showed is kept as a
`Plan`: the next call follows it, key by key, and checks at its end that the plan was right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from backpass.errors import BackpassError
from backpass.rules.attaching.override import BackwardOverride, no_site
from backpass.rules.places import Place, counts_from_end
from backpass.rules.sites import Site, SiteTable

__all__ = ["Plan", "Planned", "Run", "SiteCall"]


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
        undecided: whether it was called before the rule's selection was known.
        kernel: whether the call went through the rule's kernel.
        fixed: whether the decision was taken when the function was called, and cannot be revised.
        hooked: whether the rule acts by a hook on the graph node of the plain call.
        node: graph node of a plain call that may yet turn out to be selected.
        delegate: the site of a rule further in that may act in the place of this one.
        power_of: activations of which it is a power.
    """

    counted = True
    excluded = False
    selected: bool | None = None
    undecided = False
    kernel = False
    fixed = False
    hooked = False
    node: Any = None
    delegate: SiteCall | None = None
    power_of: list[SiteCall] | tuple[()] = ()

    def __init__(self, run: Run, key: str, module: str, function: str, shape: tuple[int, ...]) -> None:
        self.run = run
        self.key = key
        self.module = module
        self.function = function
        self.shape = shape

    def active(self) -> bool:
        """Return whether the rule acts here; the backward pass asks.

        A gradient that the model computes inside its own forward is a part of the forward, which no rule changes.
        """
        if not self.run.finished:
            self.run.inner = True
        if self.run.plain or not self.selected or not self.run.finished:
            return False
        return self.delegate is None or not self.delegate.active()

    def inside(self, module: str) -> bool:
        """Return whether the call happens in the module of this path or below it."""
        return module in ("", self.module) or self.module.startswith(module + ".")


class Planned(NamedTuple):
    """A call of the last run, to be met again.

    Attributes:
        key: as in `SiteCall`.
        caller: key of the module call that makes it.
        module: as in `SiteCall`.
        function: as in `SiteCall`.
        counted: whether it is a site.
        selected: whether the rule acted.
    """

    key: str
    caller: str
    module: str
    function: str
    counted: bool
    selected: bool


class Plan:
    """The sites of a finished call, to follow in the next one.

    Attributes:
        order: all calls that were noted, but for those inside a module that was one activation as a whole.
        by_key: the same by key.
        composed: keys of module calls that were one activation as a whole.
        composing: paths of modules whose own forward composes an activation of several calls.
        writing: those of ``composed`` that write into their input.
        inner: whether the model computes gradients inside its forward.
    """

    def __init__(self, run: Run) -> None:
        self.inner = run.inner
        self.order = [
            Planned(
                site.key, site.key.rpartition(":")[0], site.module, site.function, site.counted, bool(site.selected)
            )
            for site in run.seen_from_outside()
        ]
        self.by_key = {planned.key: planned for planned in self.order}
        self.composed = run.composed
        self.composing = run.composing
        self.writing = run.writing
        self._tables = run.table(), run.selected()

    def table(self) -> SiteTable:
        """Return all sites."""
        return self._tables[0]

    def selected(self) -> SiteTable:
        """Return the sites where the rule acts."""
        return self._tables[1]


class Run:
    """The sites of one call of an attached model, in the order of their calls.

    As long as a call does the same as the last one, its sites are those of the plan. What a range counted from the
    front selects is then certain; what a range counted from the end selects is so if the call also ends alike.

    Attributes:
        rule: the rule.
        plan: the sites of the last call, as long as this one is the same; else None.
        entered: path and key of each module call.
        unreachable: what the rule cannot reach, by module.
        composed: as in `Plan`.
        composing: as in `Plan`.
        writing: as in `Plan`.
        relative: whether the range is counted from the end.
        plain: whether the backward pass leaves all sites plain, for the time being.
        finished: whether the call has ended.
        inner: whether the model computes gradients inside its forward.
    """

    def __init__(self, rule: BackwardOverride, plan: Plan | None) -> None:
        self.rule = rule
        self.plan = plan
        self.entered: list[tuple[str, str]] = []
        self.unreachable: dict[str, list[str]] = {}
        self.composed: set[str] = set(plan.composed) if plan else set()
        self.composing: set[str] = set(plan.composing) if plan else set()
        self.writing: set[str] = set(plan.writing) if plan else set()
        self.relative = counts_from_end(rule.start) or counts_from_end(rule.stop)
        self.plain = False
        self.finished = False
        self.inner: bool = plan.inner if plan else False
        self._order = plan.order if plan else []
        self._met: list[SiteCall | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._nodes: dict[int, Any] = {}

    @property
    def sites(self) -> list[SiteCall]:
        """The calls so far, sites and others."""
        for position, site in enumerate(self._met):
            if site is None:
                self._met[position] = self._planned(position)
        return self._met  # type: ignore[return-value]

    def seen_from_outside(self) -> list[SiteCall]:
        """Return the calls so far, without those inside modules that are one activation as a whole."""

        def inside(key: str, module: str) -> bool:
            return key.startswith(f"{module}/") or (key.startswith(f"{module}:") and "#" in key[len(module) :])

        return [site for site in self.sites if not any(inside(site.key, module) for module in self.composed)]

    def _planned(self, position: int) -> SiteCall:
        planned = self._order[position]
        site = SiteCall(self, planned.key, planned.module, planned.function, self._shapes[position])
        site.counted, site.selected = planned.counted, planned.selected
        site.kernel, site.node = planned.selected, self._nodes.get(position)
        site.fixed = not ((self.relative or self.inner) and planned.counted)
        return site

    def follow(self, caller: str, function: str, shape: tuple[int, ...]) -> Planned | None:
        """Return what the plan says of the next call, or None if another call was expected."""
        position = len(self._met)
        if position < len(self._order):
            planned = self._order[position]
            if planned.function == function and planned.caller == caller:
                self._met.append(None)
                self._shapes.append(shape)
                return planned
        self.plan = None
        return None

    def keep_node(self, node: Any) -> None:
        """Remember the graph node of the call that was met last, which may yet turn out to be selected."""
        self._nodes[len(self._met) - 1] = node

    def last(self) -> SiteCall:
        """Return the call that was met last."""
        site = self._met[-1] = self._met[-1] or self._planned(len(self._met) - 1)
        return site

    def meet(self, key: str, module: str, function: str, shape: tuple[int, ...]) -> SiteCall:
        """Note a call, and decide about it if that can be done now."""
        if self.plan is not None and self.follow(key.rpartition(":")[0], function, shape) is not None:
            return self.last()
        site = SiteCall(self, key, module, function, shape)
        self._met.append(site)
        self._shapes.append(shape)
        return site

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
        self.finished = True
        if self.plan is None or len(self._met) != len(self._order) or (self.inner and not self.plan.inner):
            self.plan = None
            table = self.table()
            chosen = {row.key for row in table if self._in_range(row, table)}
            for site in self.sites:
                self._settle(site, site.counted and not site.excluded and site.key in chosen)
        self.abandon()
        if self.rule.needs_site and self.plan is None and not any(site.selected for site in self.sites):
            raise no_site(self.rule, self.table(), {**unreachable, **self.unreachable})

    def settle(self, plan: Plan) -> None:
        """Decide about every site as in another call, where compiled code has passed a part of them."""
        self.finished = True
        for site in self.sites:
            planned = plan.by_key.get(site.key)
            self._settle(site, planned is not None and planned.counted and planned.selected)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the graph: one that refers to its own nodes would never be freed."""
        self._nodes.clear()
        for site in self._met:
            if site is not None:
                site.node = None

    def _settle(self, site: SiteCall, chosen: bool) -> None:
        if site.selected is not None and site.selected != chosen:
            if site.fixed:
                raise BackpassError(
                    f"a gradient inside the model's forward was computed with {self.rule} "
                    f"{'acting' if site.selected else 'not acting'} on {site.function!r} in "
                    f"{site.module or '(model)'!r}, which the finished call shows to be wrong: select it by `where`."
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
        """Decide about a site before the call has ended, because its function is computed differently then.

        Raises:
            BackpassError: the range is counted from the end.
        """
        if self.relative:
            raise BackpassError(
                f"{self.rule} counts from the end, and the number of sites is needed before the first call of the "
                "model has ended: count from the front (start=3), give a module path, or call the model once as it is."
            )
        table = self.table()
        chosen = {row.key for row in table if self._in_range(row, table)}
        site.selected, site.fixed = site.counted and site.key in chosen, True
