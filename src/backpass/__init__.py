"""backpass: change how a PyTorch network learns, and is attacked, by changing only its backward pass."""

from backpass.errors import BackpassError, NoSiteError, UnknownNameError
from backpass.rules import LinBP, Site, list_sites, parse_rule
from backpass.version import __version__

__all__ = [
    "BackpassError",
    "LinBP",
    "NoSiteError",
    "Site",
    "UnknownNameError",
    "__version__",
    "list_sites",
    "parse_rule",
]
