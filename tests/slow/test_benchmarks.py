"""The benchmarks run, measure what the documentation names, and write the page that their JSON gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run.py"


@pytest.mark.slow
def test_the_quick_benchmarks_measure_everything(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)], check=True, timeout=600)
    content = json.loads((tmp_path / "cpu.json").read_text())
    found = {section["title"]: section["rows"] for parts in content["benchmarks"].values() for section in parts}
    names = {title: {row["name"] for row in rows} for title, rows in found.items()}
    assert {"exact", "exact, at the step", "CG-3", "CG-10"} < names["ProxProp: MLP"]
    assert {"exact", "toeplitz"} < names["ProxProp: ConvNet"]
    assert {"backpass PGD, early_stop=False", "torchattacks PGD", "foolbox LinfPGD"} < names["Attacks"]
    assert {"Rules", "SIBP", "Starting", "Training: lenet5", "SDE: integration"} < set(found)
    page = (tmp_path / "cpu.md").read_text()
    for rows in found.values():
        for row in rows:
            assert f"| {row['name']} |" in page
            name, most = row["asked"] or (None, 0)
            if name:
                value = row["figures"][name]
                verdict = "met" if (value["median"] if isinstance(value, dict) else value) <= most else "**missed**"
                assert any(
                    line.startswith(f"| {row['name']} | {name} |") and verdict in line for line in page.splitlines()
                )
