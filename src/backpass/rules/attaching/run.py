"""One call of an attached model: its sites in order, and which of them the rule selects.

A range that is counted from the end is known only when the call has ended. A site whose selection is not known when
its function is called gets a kernel that asks `SiteCall.active` in the backward pass. What a call showed is kept as a
`Plan`: the next call follows it, key by key, and checks at its end that the plan was right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backpass.errors import BackpassError
from backpass.rules.attaching.override import BackwardOverride, no_site
from backpass.rules.places import Place, counts_from_end
from backpass.rules.sites import Site, SiteTable

__all__ = ["Asked", "ModuleCall", "Plan", "PlannedSite", "Run", "SiteCall"]


class SiteCall:
    """One call of a function that may be a site.

    Attributes:
        run: the call of the model that it belongs to.
        key: the chain of module calls that leads here, the function and its call index; the same in a recomputation.
        module: path of the innermost running module.
        function: name of the function.
        shape: shape of its input.
        covered: whether the rule acts on such calls of the function.
        by_hand: whether it is a clamp that is a ReLU.
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

    covered = True
    by_hand = False
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


class ModuleCall:
    """One running call of a module.

    Attributes:
        path: of the module.
        key: the chain of calls that leads here.
        depth: number of running module calls around it.
        calls: how often each function and module below was called so far.
        grad_enabled: whether gradients were asked for when it began.
        checkpoint: hook of the innermost checkpoint when it began.
        planned: the call in the plan, where this one is made as the plan says.
        repeats: whether the next call of the model may make it without looking further than its plan.
        plain: whether its calls are left alone.
        looks: whether all its calls are looked at, not only those of the rule's functions.
        x: its input, where it is one activation as a whole.
        hidden: functions of the rule that were called without gradients, as a custom autograd function does.
        origins: of the results of elementwise functions, where all calls are looked at; else None.
    """

    grad_enabled = True
    checkpoint: Any = None
    planned: ModuleCall | None = None
    repeats = False
    plain = False
    looks = False
    x: Tensor | None = None
    hidden: tuple[str, ...] = ()
    origins: Any = None

    def __init__(self, path: str, key: str, depth: int) -> None:
        self.path = path
        self.key = key
        self.depth = depth
        self.calls: dict[str, int] = {}

    def again(self) -> ModuleCall:
        """Return a call that is made as this one of a plan."""
        call = ModuleCall(self.path, self.key, self.depth)
        call.planned = self
        if not self.grad_enabled:
            call.grad_enabled = False
        return call

    def count(self, name: str) -> int:
        """Return how many calls of ``name`` came before this one."""
        before = self.calls.get(name, 0)
        self.calls[name] = before + 1
        return before


@dataclass(slots=True)
class Planned:
    """A call of the last run, to be met again.

    Attributes:
        key: as in `SiteCall`.
        caller: the module call that makes it.
        module: as in `SiteCall`.
        function: as in `SiteCall`.
        covered: as in `SiteCall`.
        counted: whether it is a site.
        selected: whether the rule acted.
        turns: whether the rule may act yet although it is planned otherwise, if the call of the model ends otherwise.
    """

    key: str
    caller: ModuleCall
    module: str
    function: str
    covered: bool
    counted: bool
    selected: bool
    turns: bool

    @property
    def is_composed(self) -> bool:
        """Whether it may be a composition of several calls, by functions of a module that calls others too."""
        return "#" in self.key.rpartition(":")[2]


class Plan:
    """The calls of modules and sites in a finished call of the model, to follow in the next one.

    Attributes:
        order: all calls that were noted, but for those inside a module that was one activation as a whole.
        steps: the same, and one that ends them.
        by_key: the same by key.
        entered: the module calls, and one that ends them.
        composed: keys of module calls that were one activation as a whole.
        composing: paths of modules whose own forward composes an activation of several calls.
        writing: those of ``composed`` that write into their input.
        inner: whether the model computes gradients inside its forward.
    """

    def __init__(self, run: Run) -> None:
        self.inner = run.inner
        self.composed = run.composed
        self.composing = run.composing
        self.writing = run.writing
        self.entered = [self._planned(call) for call in run.entered]
        callers = {call.key: call for call in self.entered}
        self.order = [
            Planned(
                site.key,
                callers[site.key.rpartition(":")[0]],
                site.module,
                site.function,
                site.covered,
                site.counted,
                bool(site.selected),
                run.relative and site.counted,
            )
            for site in run.seen_from_outside()
        ]
        end = ModuleCall("", "", -1)
        self.entered.append(end)
        self.steps = [*self.order, Planned("", end, "", "", True, False, False, False)]
        self.by_key = {planned.key: planned for planned in self.order}
        self._tables = run.table(), run.selected()

    def _planned(self, call: ModuleCall) -> ModuleCall:
        planned = ModuleCall(call.path, call.key, call.depth)
        planned.grad_enabled = call.grad_enabled
        special = call.path in self.composing or any(_is_inside(call.key, one) for one in self.composed)
        planned.repeats = not (call.checkpoint or special)
        return planned

    def table(self) -> SiteTable:
        """Return all sites."""
        return self._tables[0]

    def selected(self) -> SiteTable:
        """Return the sites where the rule acts."""
        return self._tables[1]


def _is_inside(key: str, module: str) -> bool:
    """Return whether a call is one of this module call, or below it."""
    return key == module or key.startswith(f"{module}/") or (key.startswith(f"{module}:") and "#" in key[len(module) :])


class PlannedSite:
    """A call that the rule acts on if the run ends as its plan says; the backward pass asks."""

    __slots__ = ("position", "run")

    selected = True

    def __init__(self, run: Run, position: int) -> None:
        self.run = run
        self.position = position

    def active(self) -> bool:
        """Return whether the rule acts here."""
        run = self.run
        if run.plan is not None and run.finished and self.position not in run.made:
            return not run.plain
        return run.site(self.position).active()


Asked = SiteCall | PlannedSite
"""A site that is asked in the backward pass whether the rule acts there."""


class Run:
    """The sites of one call of an attached model, in the order of their calls.

    As long as a call does the same as the last one, its sites are those of the plan. What a range counted from the
    front selects is then certain; what a range counted from the end selects is so if the call also ends alike.

    Attributes:
        rule: the rule.
        plan: the sites of the last call, as long as this one is the same; else None.
        entered: the module calls.
        unreachable: what the rule cannot reach, by module.
        composed: as in `Plan`.
        composing: as in `Plan`.
        writing: as in `Plan`.
        relative: whether the range is counted from the end.
        revisable: whether a decision of the plan may turn out to be wrong when the call ends.
        plain: whether the backward pass leaves all sites plain, for the time being.
        finished: whether the call has ended.
        inner: whether the model computes gradients inside its forward.
        steps: as in `Plan`.
        shapes: of the inputs of the calls so far.
        made: the calls so far of which a `SiteCall` was needed, by position.
        nodes: graph nodes of plain calls that may yet turn out to be selected, by position.
    """

    def __init__(self, rule: BackwardOverride, plan: Plan | None) -> None:
        self.rule = rule
        self.plan = plan
        self.entered: list[ModuleCall] = []
        self.unreachable: dict[str, list[str]] = {}
        self.composed: set[str] = set(plan.composed) if plan else set()
        self.composing: set[str] = set(plan.composing) if plan else set()
        self.writing: set[str] = set(plan.writing) if plan else set()
        self.relative = counts_from_end(rule.start) or counts_from_end(rule.stop)
        self.plain = False
        self.finished = False
        self.inner: bool = plan.inner if plan else False
        self.revisable = self.relative or self.inner
        self.steps = plan.steps if plan else []
        self.shapes: list[tuple[int, ...]] = []
        self.made: dict[int, SiteCall] = {}
        self.nodes: dict[int, Any] = {}

    def __len__(self) -> int:
        """Return the number of calls so far."""
        return len(self.shapes)

    @property
    def sites(self) -> list[SiteCall]:
        """The calls so far, sites and others."""
        return [self.site(position) for position in range(len(self))]

    def site(self, position: int) -> SiteCall:
        """Return one of the calls so far."""
        site = self.made.get(position)
        if site is None:
            planned = self.steps[position]
            site = SiteCall(self, planned.key, planned.module, planned.function, self.shapes[position])
            site.covered, site.counted, site.selected = planned.covered, planned.counted, planned.selected
            site.kernel, site.node = planned.selected, self.nodes.get(position)
            site.fixed = not (self.revisable and planned.counted)
            self.made[position] = site
        return site

    def seen_from_outside(self) -> list[SiteCall]:
        """Return the calls so far, without those inside modules that are one activation as a whole."""
        return [site for site in self.sites if not any(_is_inside(site.key, module) for module in self.composed)]

    def follow(self, caller: str, function: str) -> bool:
        """Return whether the plan says that this is the next call; if not, leave the plan."""
        planned = self.steps[len(self.shapes)]
        follows = planned.function == function and planned.caller.key == caller
        if not follows:
            self.plan = None
        return follows

    def last(self) -> SiteCall:
        """Return the call that was met last."""
        return self.site(len(self) - 1)

    def meet(self, key: str, module: str, function: str, shape: tuple[int, ...]) -> SiteCall:
        """Note a call, and decide about it if that can be done now."""
        if self.plan is None or not self.follow(key.rpartition(":")[0], function):
            self.made[len(self)] = SiteCall(self, key, module, function, shape)
        self.shapes.append(shape)
        return self.last()

    def counts(self, call: ModuleCall) -> dict[str, int]:
        """Return how often a running module call has called each function and module."""
        counts: Counter[str] = Counter()
        for one in self.entered:
            if one.depth == call.depth + 1 and one.key.startswith(call.key + "/"):
                counts[one.path] += 1
        for site in self.sites:
            name, _, number = site.key.removeprefix(f"{call.key}:").partition("#")
            if number.isdigit() and site.key == f"{call.key}:{name}#{number}":
                counts[name + "()"] = int(number) + 1
        return dict(counts)

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
        if self.plan is None or len(self) != len(self.plan.order) or (self.inner and not self.plan.inner):
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
        self.nodes.clear()
        for site in self.made.values():
            site.node = None

    def _settle(self, site: SiteCall, chosen: bool) -> None:
        if site.selected is not None and site.selected != chosen:
            if site.fixed:
                raise BackpassError(
                    f"a derivative in forward mode, or inside the model's forward, was computed with {self.rule} "
                    f"{'acting' if site.selected else 'not acting'} on {site.function!r} in module "
                    f"{site.module or '(model)'!r}, and the finished call shows that to be wrong: call the model once "
                    "without it, or select by `where`."
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
