"""Parquet files with the columns that the Hugging Face hub uses for images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backpass.errors import BackpassError
from backpass.lab.data.cache import cached, content_key
from backpass.lab.data.decode import Decoded, Encoded, decode

__all__ = ["parquet_files", "read_parquet"]

_IMAGE, _LABEL = ("image", "img"), ("label", "labels")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, ``SPLIT-*.parquet`` or ``SPLIT.parquet``, in ``folder`` or its folder ``data``.

    Raises:
        BackpassError: there is none.
    """
    everything = [path for place in (folder, folder / "data") for path in sorted(place.glob("*.parquet"))]
    files = [path for path in everything if path.stem.split("-")[0] == split]
    if not files:
        there = ", ".join(path.name for path in everything[:4]) or "no Parquet file"
        raise BackpassError(f"no {split}-*.parquet in {folder}; there is {there}. Choose a part with --split.")
    return files


def read_parquet(files: Sequence[Path]) -> tuple[Decoded, tuple[str, ...] | None]:
    """The images of some files, decoded once, and the classes' names where the files know them.

    Raises:
        BackpassError: a file is not Parquet, a column is missing, or a row cannot be read; the message says which.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        schema = pq.read_schema(files[0])
    except ArrowException as error:
        raise BackpassError(f"{files[0]} cannot be read as Parquet: {error}.") from error
    decoded = cached(content_key(files, ["parquet"]), lambda: decode(_rows(files)))
    return decoded, _class_names(schema.metadata, schema.names)


def _rows(files: Sequence[Path]) -> Iterator[Encoded]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                image, label = (_column(path, file.schema_arrow.names, known) for known in (_IMAGE, _LABEL))
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[image, label]):
                    for row in batch.to_pylist():
                        yield _encoded(f"row {number} of {path.name}", row[image], row[label])
                        number += 1
        except ArrowException as error:
            raise BackpassError(f"{path} cannot be read as Parquet: {error}.") from error


def _column(path: Path, names: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise BackpassError(
        f"{path} has no column {' or '.join(map(repr, known))}; its columns are {', '.join(map(repr, names))}."
    )


def _encoded(name: str, image: Any, label: Any) -> Encoded:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise BackpassError(f"{name} holds no image bytes, but {type(content).__name__}.")
    if not isinstance(label, int) or label < 0:
        raise BackpassError(f"{name} has the label {label!r}; expected a whole number, at least 0.")
    return Encoded(name, content, label)


def _class_names(metadata: dict[bytes, bytes] | None, columns: Sequence[str]) -> tuple[str, ...] | None:
    """The names of a ``ClassLabel`` of the hub's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = next(features[name]["names"] for name in _LABEL if name in columns)
    except (KeyError, ValueError, TypeError, StopIteration):
        return None
    return tuple(map(str, names))
