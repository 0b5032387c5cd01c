"""Packages that seem installed: a folder on the path with a module and its entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backpass.plugins import _points


def install(folder: Path, monkeypatch, name: str, points: Mapping[str, Mapping[str, str]], path: Path | None = None):
    """Puts entry points by group, and the folder of their modules, on the path until the test ends."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in of.items()) for group, of in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))
    for place in (folder, path or folder):
        monkeypatch.syspath_prepend(str(place))
    _points.cache_clear()
