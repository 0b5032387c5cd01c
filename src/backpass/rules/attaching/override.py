"""The contract between a rule and the mechanism that applies it to a model."""

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
    """A replacement backward for some torch functions at chosen sites of a model; the forward stays as it is.

    Attributes:
        name: the rule's name in its text form.
        functions: the torch functions that are sites of this rule, with the name each has in a site table.
        observed: further functions that an interception of the rule looks at.
        opaque: functions that compute, out of reach, what the rule acts on, with the name of each.
        skipped: module classes whose own forward calls none of the functions.
        needs_plain: whether its backward goes through the plain graph of an activation too.
        acts_on_nodes: whether `on_node` gives a plain call this rule's backward afterwards.
        compositions: whether activations that are composed of several calls are sites too.
        gates: whether activations whose value only multiplies another tensor are sites too.
        needs_site: whether a call of the model without a selected site is an error.
        start: first site.
        stop: one past the last site.
        where: which of the sites from ``start`` to ``stop``; None: all.
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
        """Return the value of ``func(*args, **kwargs)``, to the bit, with this rule's backward; here plain."""
        return func(*args, **kwargs)

    def covers(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call of one of the functions is a site; its parameters may decide that."""
        return True

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the rule's settings do not fit.

        Raises:
            UnknownNameError: ``start`` or ``stop`` is the path of a module that the model does not have.
        """
        check_paths(model, self.start, self.stop)


def no_site(rule: BackwardOverride, table: SiteTable, unreachable: Mapping[str, list[str]]) -> NoSiteError:
    """Return the error of a rule that selects none of a model's sites."""
    if table:
        return NoSiteError(f"{rule} selects none of the {len(table)} sites of this model:\n{table}")
    listing = "; ".join(f"{path or '(model)'}: {', '.join(reasons)}" for path, reasons in unreachable.items())
    names = ", ".join(sorted(set(rule.functions.values())))
    return NoSiteError(
        f"{rule} finds no site: the model calls none of {names} in Python. A scripted, traced or exported model "
        "shows no sites: attach the rule to the original model." + f" Out of reach is {listing}." * bool(listing)
    )
