"""No claim of a paper is lost or renamed."""

import json
from pathlib import Path

import pytest

from backpass.papers import EXPERIMENTS

SMALL = Path(__file__).parents[3] / "docs" / "results" / "small"
OTHER_NETWORKS = {  # at the paper's scale, which name their claims
    "linbp-fig7", "linbp-fig10", "linbp-table1", "linbp-table2", "linbp-silu", "linbp-white-box", "linbp-transfer",
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
def test_both_scales_have_the_claims_that_were_always_asked(experiment):
    small, paper = ({one.id for one in experiment.scales[name].comparisons} for name in ("small", "paper"))
    if (SMALL / experiment.name).exists():
        committed = json.loads((SMALL / experiment.name / "result.json").read_text())
        assert small == {claim["id"].partition(".")[2] for claim in committed["claims"]}
    if experiment.name not in OTHER_NETWORKS:
        assert paper >= small
