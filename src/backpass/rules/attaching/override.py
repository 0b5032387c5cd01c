"""Interface between a rule and the code that applies it to a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from backpass.errors import NoSiteError
from backpass.rules.places import Place, check_paths
from backpass.rules.sites import Site, SiteTable

__all__ = ["BackwardOverride", "TorchFunction", "no_site"]

TorchFunction = Callable[..., Any]


class BackwardOverride:
    """A replacement backward for some torch functions at chosen sites of a model; the forward is unchanged.

    Attributes:
        name: the rule's name in its text form.
        functions: torch functions that are sites of this rule, with their names in a site table.
        observed: further functions that an interception of the rule handles.
        opaque: functions that compute such operations internally, unreachable for the rule, with their names.
        skipped: module classes whose own forward calls none of the functions.
        needs_plain: True if its backward also uses the plain graph of an activation.
        acts_on_nodes: True if `on_node` can apply the rule to a plain call afterwards.
        compositions: True if activations composed of several calls are sites.
        gates: True if activations that only gate another tensor are sites.
        needs_site: True if a call of the model without a selected site is an error.
        start: first site.
        stop: one past the last site.
        where: predicate that selects sites from ``start`` to ``stop``; None: all.
    """

    name: ClassVar[str]
    observed: ClassVar[Collection[TorchFunction]] = ()
    opaque: ClassVar[Mapping[TorchFunction, str]] = {}
    skipped: ClassVar[frozenset[type[nn.Module]]] = frozenset()
    needs_plain: ClassVar[bool] = False
    acts_on_nodes: ClassVar[bool] = False
    compositions: ClassVar[bool] = False
    needs_site: ClassVar[bool] = True
    gates: bool = False
    start: Place = None
    stop: Place = None
    where: Callable[[Site], bool] | None = None
    if TYPE_CHECKING:
        functions: ClassVar[Mapping[TorchFunction, str]]

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of ``func(*args, **kwargs)``, bit-identical, with this rule's backward; here plain."""
        return func(*args, **kwargs)

    def covers(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if a call of one of the functions is a site, depending on its arguments."""
        return True

    def check(self, model: nn.Module) -> None:
        """Validate the settings of the rule against a model.

        Raises:
            UnknownNameError: ``start`` or ``stop`` is the path of a module that the model does not have.
        """
        check_paths(model, self.start, self.stop)


def no_site(rule: BackwardOverride, table: SiteTable, unreachable: Mapping[str, list[str]]) -> NoSiteError:
    """Return the error for a rule that selects no site of a model."""
    if table:
        return NoSiteError(f"{rule} selects none of the {len(table)} sites of this model:\n{table}")
    listing = "; ".join(f"{path or '(model)'}: {', '.join(reasons)}" for path, reasons in unreachable.items())
    names = ", ".join(sorted(set(rule.functions.values())))
    return NoSiteError(
        f"{rule} finds no site: the model calls none of {names} in Python. A scripted, traced or exported model "
        "shows no sites: attach the rule to the original model." + f" Out of reach is {listing}." * bool(listing)
    )
