"""Deserialisation of a result from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from backpass.errors import BackpassError
from backpass.report.claims import Claim
from backpass.report.result import Cell, Curve, Finding, Result, Series, Table
from backpass.report.statistics import Interval

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["read_result"]

_AGAIN = "Delete it, and run the command that wrote it again: finished parts are kept."


def read_result(path: Path) -> Result:
    """Read the result of a ``result.json``, without images, which are not in the JSON.

    Raises:
        BackpassError: the file is missing, damaged, or no result.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackpassError(f"there is no result {path}.") from error
    except (ValueError, RecursionError) as error:
        raise BackpassError(f"{path} is damaged, it is not JSON: {error}. {_AGAIN}") from error
    try:
        return _result(content)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else str(error)
        raise BackpassError(f"{path} is no result of backpass, or a damaged one: {what}. {_AGAIN}") from error


def _result(content: Mapping[str, Any]) -> Result:
    if not isinstance(content["environment"]["versions"], Mapping):
        raise TypeError(f"versions is {content['environment']['versions']!r}")
    return Result(
        **{
            **_known(Result, content),
            "findings": [Finding(**_known(Finding, one)) for one in content["findings"]],
            "series": [_series(one) for one in content["series"]],
            "claims": [_claim(one) for one in content["claims"]],
            "tables": [_table(one) for one in content["tables"]],
            "galleries": (),
        }
    )


def _known(kind: type[DataclassInstance], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are fields of a dataclass, with checked types; unknown entries are ignored."""
    hints = get_type_hints(kind)
    found = {name: content[name] for name in hints if name in content}
    for name, value in found.items():
        hint, origin = hints[name], get_origin(hints[name])
        kinds = {str: str, bool: bool, int: int, dict: dict, Sequence: list}
        expected = kinds.get(hint) or kinds.get(origin)
        if (expected and type(value) is not expected) or (origin is Literal and value not in get_args(hint)):
            raise TypeError(f"{name} of a {kind.__name__.lower()} is {value!r}")
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _interval(content: Mapping[str, Any]) -> Interval:
    return Interval(_number(content["mean"]), _number(content["low"]), _number(content["high"]), int(content["n"]))


def _series(content: Mapping[str, Any]) -> Series:
    return Series(**{**_known(Series, content), "curves": [_curve(one) for one in content["curves"]]})


def _curve(content: Mapping[str, Any]) -> Curve:
    given, points = content["given"], len(content["x"])
    if any(len(values) != points for values in (*content["runs"], *([] if given is None else [given]))):
        raise ValueError(f"a curve has {points} places and another number of values")
    return Curve(
        **{
            **_known(Curve, content),
            "x": [x if type(x) is int else float(x) for x in content["x"]],
            "runs": [[_number(value) for value in run] for run in content["runs"]],
            "given": None if given is None else [_interval(one) for one in given],
        }
    )


def _claim(content: Mapping[str, Any]) -> Claim:
    low, high = content["interval"]
    return Claim(
        **{
            **_known(Claim, content),
            "estimate": _number(content["estimate"]),
            "interval": (_number(low), _number(high)),
        }
    )


def _table(content: Mapping[str, Any]) -> Table:
    return Table(**{**_known(Table, content), "rows": [[_cell(cell) for cell in row] for row in content["rows"]]})


def _cell(value: Any) -> Cell:
    if isinstance(value, Mapping):
        return _interval(value)
    return _number(value) if value is None else value
