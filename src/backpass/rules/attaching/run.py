"""Record of one call of an attached model: its sites in order, and the selection by the rule.

A range counted from the end is known only at the end of the call. A site whose selection is not known when its function
is called gets a kernel that queries `SiteCall.active` in the backward pass. The sites of a call are kept as a `Plan`.
The next call follows it, key by key, and checks at its end that the plan was right.
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

__all__ = ["Decision", "ModuleCall", "Plan", "PlannedSite", "Run", "SiteCall"]


class SiteCall:
    """Call of a function that may be a site.

    Attributes:
        run: call of the model that it belongs to.
        key: chain of enclosing module calls, function and call index; the same in a recomputation.
        module: path of the innermost running module.
        function: name of the function.
        shape: shape of its input.
        covered: True if the rule covers such calls of the function.
        by_hand: True for a clamp that computes a ReLU.
        counted: True if it is a site; False for a gate, or for a part of a composed activation.
        gates: True if its value gates another one.
        enters_layer: True if its value is the input of a layer.
        excluded: True if the rule leaves the site plain although it is in its range.
        selected: True if the rule acts here; None while unknown.
        undecided: True if it was called before the selection was known.
        kernel: True if the call used the rule's kernel.
        fixed: True if the decision was made at the call and cannot be revised.
        hooked: True if the rule acts by a hook on the graph node of the plain call.
        node: graph node of a plain call that may be selected later.
        delegate: site of an inner rule that may act instead of this one.
        power_of: activations of which it is a power.
    """

    covered = True
    by_hand = False
    counted = True
    gates = False
    enters_layer = False
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
        """Return True if the rule acts here; queried in the backward pass.

        A gradient that the model computes inside its forward belongs to the forward, which rules do not change.
        """
        if not self.run.finished:
            self.run.inner = True
        if self.run.plain or not self.selected or not self.run.finished:
            return False
        return self.delegate is None or not self.delegate.active()

    def inside(self, module: str) -> bool:
        """Return True if the call happens in the module of this path or below it."""
        return module in ("", self.module) or self.module.startswith(module + ".")


class ModuleCall:
    """Running call of a module.

    Attributes:
        path: path of the module.
        key: chain of enclosing module calls.
        depth: number of enclosing module calls.
        calls: number of calls of each function and submodule so far.
        grad_enabled: True if gradients were enabled when it began.
        checkpoint: hook of the innermost checkpoint when it began.
        planned: the planned call, if this one follows the plan.
        repeats: True if the next call of the model may follow the plan here without analysis.
        plain: True if its calls are not intercepted.
        analysed: True if all its calls are analysed, not only those of the rule's functions.
        x: its input, if it may compute a single activation.
        hidden: functions of the rule that were called without gradients, as in a custom autograd function.
        origins: origins of the results of elementwise functions, if all calls are analysed; else None.
        begin, end: range of the sequence numbers of its graph nodes.
    """

    grad_enabled = True
    checkpoint: Any = None
    planned: ModuleCall | None = None
    repeats = False
    plain = False
    analysed = False
    x: Tensor | None = None
    hidden: tuple[str, ...] = ()
    origins: Any = None
    begin = end = 0

    def __init__(self, path: str, key: str, depth: int) -> None:
        self.path = path
        self.key = key
        self.depth = depth
        self.calls: dict[str, int] = {}

    def again(self) -> ModuleCall:
        """Return a new call that follows this planned one."""
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
    """Planned call: a call of the last run that the next one is expected to repeat.

    Attributes:
        key: as in `SiteCall`.
        caller: module call that contains it.
        module: as in `SiteCall`.
        function: as in `SiteCall`.
        covered: as in `SiteCall`.
        counted: True if it is a site.
        selected: True if the rule acted.
        revisable: True if the decision may change when the call of the model ends differently from the plan.
    """

    key: str
    caller: ModuleCall
    module: str
    function: str
    covered: bool
    counted: bool
    selected: bool
    revisable: bool

    @property
    def is_composed(self) -> bool:
        """True if it may be a composition of several calls in a module that also makes other calls."""
        return "#" in self.key.rpartition(":")[2]


class Plan:
    """Plan: module calls and sites of a finished call of the model, which the next call follows.

    Attributes:
        order: all recorded calls, except those inside a module that computes a single activation.
        steps: ``order`` with an end marker.
        by_key: ``order`` by key.
        entered: module calls, with an end marker.
        composed: keys of module calls that compute a single activation.
        composing: paths of modules whose own forward composes an activation of several calls.
        writing: those of ``composed`` that modify their input in place.
        inner: True if the model computes gradients inside its forward.
        graphless: True if the call built no graph, in which unreachable parts are found.
    """

    def __init__(self, run: Run) -> None:
        self.inner = run.inner
        self.graphless = run.graphless
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
    """Return True if a call happens in this module call or below it."""
    return key == module or key.startswith(f"{module}/") or (key.startswith(f"{module}:") and "#" in key[len(module) :])


class PlannedSite:
    """Site that is active if the run ends as planned; queried in the backward pass."""

    __slots__ = ("position", "run")

    selected = True

    def __init__(self, run: Run, position: int) -> None:
        self.run = run
        self.position = position

    def active(self) -> bool:
        """Return True if the rule acts here."""
        run = self.run
        if run.plan is not None and run.finished and self.position not in run.made:
            return not run.plain
        return run.site(self.position).active()


Decision = SiteCall | PlannedSite
"""Site with ``active()``, queried in the backward pass."""


class Run:
    """Sites of one call of an attached model, in call order.

    As long as a call repeats the previous one, its sites are those of the plan. The selection by a range counted from
    the front is then final. The selection by a range counted from the end is final if the call also ends as planned.

    Attributes:
        rule: the rule.
        plan: plan of the previous call, as long as this one follows it; else None.
        entered: module calls.
        unreachable: reasons why the rule cannot reach a part, by module.
        composed: as in `Plan`.
        composing: as in `Plan`.
        writing: as in `Plan`.
        relative: True if the range is counted from the end.
        revisable: True if the end of the call can change a decision of the plan.
        plain: True while all sites are temporarily plain in the backward pass.
        finished: True if the call has ended.
        inner: True if the model computes gradients inside its forward.
        steps: as in `Plan`.
        shapes: shapes of the inputs of the calls so far.
        made: `SiteCall` objects created so far, by position.
        nodes: graph nodes of plain calls that may be selected later, by position.
    """

    def __init__(self, rule: BackwardOverride, plan: Plan | None) -> None:
        self.rule = rule
        self.plan = plan
        self.entered: list[ModuleCall] = []
        self.unreachable: dict[str, list[str]] = {}
        self.composed: set[str] = set(plan.composed) if plan else set()
        self.composing: set[str] = set(plan.composing) if plan else set()
        self.writing: set[str] = set(plan.writing) if plan else set()
        self.relative: bool = counts_from_end(rule.start) or counts_from_end(rule.stop)
        self.plain = False
        self.finished = False
        self.inner: bool = plan.inner if plan else False
        self.graphless: bool = False
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
        """All recorded calls so far, sites or not."""
        return [self.site(position) for position in range(len(self))]

    def site(self, position: int) -> SiteCall:
        """Return the recorded call at a position."""
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
        """Return the calls so far, without those inside modules that compute a single activation."""
        return [site for site in self.sites if not any(_is_inside(site.key, module) for module in self.composed)]

    def follow(self, caller: str, function: str) -> bool:
        """Return True if this is the next planned call; otherwise leave the plan."""
        planned = self.steps[len(self.shapes)]
        follows = planned.function == function and planned.caller.key == caller
        if not follows:
            self.plan = None
        return follows

    def record(self, key: str, module: str, function: str, shape: tuple[int, ...]) -> SiteCall:
        """Record a call, and decide its selection if possible."""
        if self.plan is None or not self.follow(key.rpartition(":")[0], function):
            self.made[len(self)] = SiteCall(self, key, module, function, shape)
        self.shapes.append(shape)
        return self.site(len(self) - 1)

    def counts(self, call: ModuleCall) -> dict[str, int]:
        """Return the number of calls of each function and submodule in a running module call."""
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
        """Return the sites where the rule acts, without those delegated to an inner rule."""
        counted = [site for site in self.sites if site.counted]
        return SiteTable(row for row, site in zip(self.table(), counted, strict=True) if site.active())

    def finish(self, unreachable: Mapping[str, list[str]]) -> None:
        """Decide the selection of every site at the end of the call.

        Args:
            unreachable: known unreachable parts, for the error message.

        Raises:
            NoSiteError: the rule selects no site.
            BackpassError: a decision that was already applied is wrong.
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
        """Decide the selection of every site by a plan, if compiled code contains a part of them."""
        self.finished = True
        for site in self.sites:
            planned = plan.by_key.get(site.key)
            self._settle(site, planned is not None and planned.counted and planned.selected)
        self.abandon()

    def abandon(self) -> None:
        """Release references to the graph, whose cycles would never be freed."""
        self.nodes.clear()
        for site in self.made.values():
            site.node = None
        for call in self.entered:
            call.origins = call.x = None

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
        """Decide the selection of a site during the call, because it changes the forward computation.

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
