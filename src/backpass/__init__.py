"""backpass: change how a PyTorch network learns, and is attacked, by changing only its backward pass."""

from typing import TYPE_CHECKING, Any

from backpass.errors import BackpassError, NoSiteError, UnknownNameError
from backpass.version import __version__

if TYPE_CHECKING:
    from backpass.rules import (
        BPA,
        PNA,
        SGM,
        SIBP,
        TGR,
        Deconvnet,
        GuidedBackprop,
        LinBP,
        ProxProp,
        Site,
        list_sites,
        parse_rule,
    )

__all__ = [
    "BPA",
    "PNA",
    "SGM",
    "SIBP",
    "TGR",
    "BackpassError",
    "Deconvnet",
    "GuidedBackprop",
    "LinBP",
    "NoSiteError",
    "ProxProp",
    "Site",
    "UnknownNameError",
    "__version__",
    "list_sites",
    "parse_rule",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and the command line's help does without it.
    if name not in __all__:
        raise AttributeError(f"module 'backpass' has no attribute {name!r}")
    from backpass import rules

    return getattr(rules, name)


def __dir__() -> list[str]:
    return sorted(__all__)
