"""The house stands as docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "backpass"
FILES = sorted(SOURCE.rglob("*.py"))
GROUND = {"errors", "numbers", "version", "plugins", "preserved", "allocator", "files", "wording"}
FLOORS = (  # from the ground up; what stands side by side does not know each other
    ("rules", "attacks", "sde"),
    ("training",),
    ("data",),
    ("models",),
    ("report",),
    ("lab",),
    ("experiments",),
    ("papers",),
    ("cli",),
)
MAY_IMPORT = dict.fromkeys(GROUND, GROUND)
below = set(GROUND)
for floor in FLOORS:
    MAY_IMPORT.update({room: below | {room} for room in floor})
    below |= set(floor)


def floor_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path):
    """The parts of backpass that a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "backpass" else [f"backpass.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("backpass."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_import_runs_upwards(path):
    if floor_of(path) not in ("__init__", "__main__"):  # what is public, and what starts the command line
        assert set(imported(path)) <= MAY_IMPORT[floor_of(path)]


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_no_file_is_long(folder):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path): count for path, count in lines.items() if count > 450}
