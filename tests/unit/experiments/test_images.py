"""Outcomes of images: rates, paired differences and verdicts of the harness against counting them by hand."""

import json
from dataclasses import dataclass

import pytest

from backpass.attacks.paired import Paired
from backpass.attacks.report import wilson
from backpass.errors import BackpassError
from backpass.experiments.experiment import Arm, Comparison, Context, Design, Experiment, Measurement, Plot
from backpass.experiments.running import run_here
from backpass.experiments.verifying import verify
from backpass.report.page import write_report

FOOLED = Measurement(label="fooled", unit="%", key="fooled", images=True)
MARKS = {"weak": "0001-00100", "strong": "1111-11010", "curve": ["0-", "11"]}


@dataclass(frozen=True)
class Name:
    name: str


def work(settings, seed, context):
    """The marks that the caller has loaded."""
    context.progress(0.5)
    text = context.loaded[settings.name]
    return {"curve": text} if settings.name == "curve" else {"fooled": text}


EXPERIMENT = Experiment(
    name="spot", title="t", question="q", source="",
    scales={"s": Design(
        arms=tuple(
            Arm(name=name, work=work, group="c" * (name == "curve"), candidates={"": Name(name)}) for name in MARKS
        ),
        seeds=(0,),
        measurements=(FOOLED,),
        comparisons=(Comparison(id="more", statement="more", measurement=FOOLED, ours="strong", theirs="weak"),),
        plots=(
            Plot(title="curve", key="curve", x=(1, 2), x_label="x", y_label="y", images=True),
            Plot(title="difference", x=(1,), x_label="x", y_label="y", groups=("",), measurement=FOOLED,
                 lines={"strong": ["strong"]}, less=["weak"]),
        ),
    )},
)  # fmt: skip


@pytest.fixture
def done(tmp_path):
    shares = []
    result, found = run_here(EXPERIMENT, "s", out=tmp_path, context=Context(loaded=MARKS),
                             progress=lambda what, share: shares.append(share))  # fmt: skip
    assert shares == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6])
    assert found["", "weak"].runs[0]["fooled"] == MARKS["weak"]
    write_report(result, tmp_path)
    return result


def test_tables_curves_and_claims_count_the_marks(done):
    (table,) = done.tables  # the group of the curve has no measurement
    assert table.columns == ["arm", "fooled, %"]
    rate = table.rows[1][1]
    assert (rate.mean, rate.n) == (pytest.approx(700 / 9), 9)
    assert (rate.low, rate.high) == pytest.approx(tuple(100 * end for end in wilson(7, 9)))
    curve, difference = done.series
    assert [(i.mean, i.n) for i in curve.curves[0].intervals] == [(0.0, 1), (100.0, 2)]
    (claim,) = done.claims
    by_hand = Paired(samples=9, only_first=6, only_second=1)
    assert claim.p == pytest.approx(by_hand.p_value)
    assert claim.estimate == pytest.approx(100 * by_hand.difference)
    assert claim.interval == pytest.approx(tuple(100 * end for end in by_hand.interval))
    assert difference.curves[0].intervals[0][:3] == pytest.approx((claim.estimate, *claim.interval))
    assert (claim.id, claim.verdict, claim.p_corrected) == ("spot.more", "undecided", claim.p)


def test_verdicts_of_an_experiment_built_on_the_spot_are_verified(done, tmp_path):
    found = verify(tmp_path, [])
    assert (found.claims, found.outcomes, found.problems) == (1, 6, ())
    path = tmp_path / "result.json"
    content = json.loads(path.read_text())
    content["claims"][0]["verdict"] = "same direction"
    path.write_text(json.dumps(content))
    edited, verdict = verify(tmp_path, []).problems
    assert "was edited" in edited
    assert verdict == "spot.more: the result says 'same direction', the outcomes 'undecided'."
    del content["numbers"]["pairs"]
    path.write_text(json.dumps(content))
    with pytest.raises(BackpassError, match="no outcomes are stored"):
        verify(tmp_path, [])


def test_a_process_that_only_takes_part_stores_nothing(tmp_path):
    assert run_here(EXPERIMENT, "s", out=tmp_path, context=Context(loaded=MARKS), store=False) is None
    assert list(tmp_path.iterdir()) == []
