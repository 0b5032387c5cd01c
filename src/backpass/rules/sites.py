"""Sites: calls in a network whose backward pass a rule can override."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Site", "SiteTable"]


@dataclass(frozen=True, slots=True)
class Site:
    """One call of a torch function inside one call of a model.

    Attributes:
        index: position among the model's sites, in call order, from 0.
        module: path of the innermost module whose forward makes the call; ``""`` is the model itself.
        function: name of the torch function, for instance ``"relu"``.
        call: call index: number of earlier calls of this function in this module, within this call of the model.
        shape: shape of the function's first argument.
        key: chain of enclosing module calls; unlike ``index`` it is also known in a recomputation.
    """

    index: int
    module: str
    function: str
    call: int
    shape: tuple[int, ...]
    key: str = field(default="", repr=False, compare=False)

    def inside(self, module: str) -> bool:
        """Return True if the call happens in the module of this path or below it."""
        return module in ("", self.module) or self.module.startswith(module + ".")


class SiteTable(list[Site]):
    """A list of sites that prints as a table.

    Attributes:
        unreachable: parts of the model that a rule cannot reach: a list of reasons by module path.
    """

    _HEADER = ("site", "module", "function", "call", "shape")

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        super().__init__(sites)
        self.unreachable: dict[str, list[str]] = {}

    def __str__(self) -> str:
        rows = [self._HEADER] + [
            (str(s.index), s.module or "(model)", s.function, str(s.call), "x".join(map(str, s.shape))) for s in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self._HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"out of reach in {path or '(model)'}: {', '.join(why)}" for path, why in self.unreachable.items()]
        return "\n".join(lines)
