"""Every public name is shown at work in the reference, and described there."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PACKAGES = {
    "backpass": "rules",
    "backpass.rules": "rules",
    "backpass.attacks": "attacks",
    "backpass.training": "training",
    "backpass.sde": "sde",
}
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_the_name_has_an_example(package, name):
    page = (REFERENCE / f"{PACKAGES[package]}.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert re.search(rf"\b{name}\b", code)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_the_name_is_described(package, name):
    page = (REFERENCE / f"{PACKAGES[package]}.md").read_text()
    of_all = f"::: {package}\n" in page  # the whole package
    assert of_all or re.search(rf"^::: backpass\.(rules\.)?{name}$", page, re.MULTILINE) or name == "__version__"
