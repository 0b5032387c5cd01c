"""What a rule has to say: which torch functions it re-defines, where, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from backpass.errors import NoSiteError
from backpass.rules.sites import Site, SiteTable

__all__ = ["EVERYTHING", "Redefinition", "TorchFunction", "no_site"]

TorchFunction = Callable[..., Any]

EVERYTHING = (0, 2**31)
"""The range of a rule that leaves out no site."""


class Redefinition:
    """A replacement backward for some torch functions at chosen sites of a model; the forward stays as it is.

    Attributes:
        name: the rule's name in its text form.
        functions: the torch functions that are sites of this rule, with the name each has in a site table.
        silent: module classes whose own forward surely calls none of the functions.
        needs_site: whether it is an error if the rule acts nowhere.
        where: which sites of its range the rule acts on; None: all.
    """

    name: ClassVar[str]
    silent: ClassVar[frozenset[type[nn.Module]]] = frozenset()
    needs_site: ClassVar[bool] = True
    where: Callable[[Site], bool] | None = None
    if TYPE_CHECKING:
        functions: ClassVar[Mapping[TorchFunction, str]]

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``func(*args, **kwargs)``, to the bit, with this rule's backward; here plain.

        A rule that keeps something from call to call has an `Interception` of its own instead.
        """
        return func(*args, **kwargs)

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """First site index the rule may act on, and one past the last; ``sites()`` costs a forward pass."""
        return EVERYTHING

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the rule's settings do not fit.

        Raises:
            BackpassError: as the rule says.
        """


def no_site(rule: Redefinition, count: int, table: SiteTable) -> NoSiteError:
    """The error of a rule that selects none of a model's sites."""
    if count:
        return NoSiteError(f"{rule} selects none of the {count} sites of this model:\n{table}")
    names = ", ".join(sorted(set(rule.functions.values())))
    return NoSiteError(
        f"{rule} finds no site: the model calls none of {names} in Python. A scripted, traced or exported model "
        "shows no sites; attach the rule to the original model."
    )
