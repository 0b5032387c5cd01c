"""Parquet files with the columns that the Hugging Face hub uses for images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backpass.data.cache import cached, content_key
from backpass.data.decode import Decoded, Encoded, decode
from backpass.errors import BackpassError
from backpass.wording import reason

__all__ = ["check_shards", "parquet_files", "read_parquet"]

_USUAL = {"image": ("image", "img"), "label": ("label", "labels")}
_MOST_CLASSES = 1_000_000  # a larger label is a number of another kind, such as an identifier
_SHARD = re.compile(r"-(\d+)-of-(\d+)")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, ``SPLIT-*.parquet`` or ``SPLIT.parquet``, in ``folder`` or its folder ``data``.

    Raises:
        BackpassError: there is none, or the files are not all shards of one set.
    """
    everything = [path for place in (folder, folder / "data") for path in sorted(place.glob("*.parquet"))]
    files = [path for path in everything if path.stem.split("-")[0] == split]
    if not files:
        there = ", ".join(path.name for path in everything[:4]) or "no Parquet file"
        raise BackpassError(f"no {split}-*.parquet in {folder}; there is {there}. Choose a part with --split.")
    check_shards(str(folder), [path.name for path in files])
    return files


def check_shards(place: str, names: Sequence[str]) -> None:
    """Check that files named ``...-00001-of-00003...`` are all there, each once.

    Raises:
        BackpassError: one is missing, stands twice, or is of another set.
    """
    shards = [(int(found[1]), int(found[2])) for name in names if (found := _SHARD.search(name))]
    if not shards:
        return
    numbers, total = sorted(number for number, _ in shards), shards[0][1]
    whole = [number - numbers[0] for number in numbers] == list(range(len(names))) and numbers[0] in (0, 1)
    if not whole or {count for _, count in shards} != {len(names)}:
        raise BackpassError(
            f"{place} holds {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: expected all {total} shards of "
            "one set, each once. Download what is missing, or remove the files of another version."
        )


def read_parquet(
    files: Sequence[Path], *, image: str | None = None, label: str | None = None
) -> tuple[Decoded, tuple[str, ...] | None]:
    """Read the images of some files, and the classes' names where the files hold them.

    Args:
        files: in order.
        image: column of images; None: ``image`` or ``img``.
        label: column of labels, whole numbers; None: ``label`` or ``labels``.

    Raises:
        BackpassError: a file is not Parquet, a column is missing, or a row cannot be read; the message says which.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        schema = pq.read_schema(files[0])
    except ArrowException as error:
        raise BackpassError(f"{files[0]} cannot be read as Parquet: {reason(error)}.") from error
    columns = _column(files[0], schema, "image", image), _column(files[0], schema, "label", label)
    decoded = cached(content_key(files, ["parquet", *columns]), lambda: decode(_rows(files, columns)))
    names = _class_names(schema.metadata, columns[1])
    if names is not None and int(decoded.labels.max()) >= len(names):
        row = int(decoded.labels.argmax())
        raise BackpassError(
            f"image {row} of {files[0].parent} has the label {int(decoded.labels[row])}, and the files name "
            f"{len(names)} classes, numbered from 0."
        )
    return decoded, names


def _rows(files: Sequence[Path], columns: tuple[str, str]) -> Iterator[Encoded]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                image, label = (
                    _column(path, file.schema_arrow, kind, name)
                    for kind, name in zip(("image", "label"), columns, strict=True)
                )
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[image, label]):
                    for row in batch.to_pylist():
                        yield _encoded(f"row {number} of {path.name}", row[image], row[label])
                        number += 1
        except ArrowException as error:
            raise BackpassError(f"{path} cannot be read as Parquet: {reason(error)}.") from error


def _column(path: Path, schema: Any, kind: str, wanted: str | None) -> str:
    """Return the column of a kind in a file; where none is named, the first with a usual name."""
    names: list[str] = schema.names
    for name in _USUAL[kind] if wanted is None else (wanted,):
        if name in names:
            return name
    looked = repr(wanted) if wanted is not None else " or ".join(map(repr, _USUAL[kind]))
    fitting = [field.name for field in schema if _fits(field.type, kind)]
    hint = f" Choose one of the {kind}s' kind, as in NAME:{kind}={fitting[0]}" if fitting else ""
    if len(fitting) > 1:
        hint += f" (or {', '.join(fitting[1:])})"
    raise BackpassError(
        f"{path} has no column {looked}; its columns are {', '.join(map(repr, names))}.{hint + '.' if hint else ''}"
    )


def _fits(column: Any, kind: str) -> bool:
    from pyarrow import types

    if kind == "label":
        return bool(types.is_integer(column))
    return bool(types.is_struct(column) or types.is_binary(column))


def _encoded(name: str, image: Any, label: Any) -> Encoded:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise BackpassError(f"{name} holds no image bytes, but {type(content).__name__}.")
    if not isinstance(label, int) or not 0 <= label < _MOST_CLASSES:
        raise BackpassError(
            f"{name} has the label {label!r}; expected a whole number from 0 to {_MOST_CLASSES - 1:,}, the number of a "
            "class. Another column is chosen as in NAME:label=COLUMN."
        )
    return Encoded(name, content, label)


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Return the names of a ``ClassLabel`` in the hub's metadata."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names))
