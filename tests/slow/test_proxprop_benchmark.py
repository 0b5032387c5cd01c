"""The benchmark of ProxProp runs, and measures every method that its documentation names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "proxprop.py"


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_method(tmp_path):
    figures = tmp_path / "figures.json"
    subprocess.run([sys.executable, str(SCRIPT), "--quick", "--json", str(figures)], check=True, timeout=300)
    measured = json.loads(figures.read_text())
    assert {"exact", "exact, union=True", "CG-3", "CG-10"} < measured["MLP"].keys()
    assert {"exact", "toeplitz"} < measured["ConvNet"].keys()
    for convolution in ("conv 1", "conv 2", "conv 3"):
        assert {"unfolded", "correlation", "shifted", "toeplitz (not exact)"} < measured[convolution].keys()
    assert all(one["ratio"] > 0 for table in measured.values() for one in table.values())
