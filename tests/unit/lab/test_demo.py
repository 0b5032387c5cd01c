"""The demo end to end in small, and its words on numbers that were planted."""

import json
import math
from dataclasses import replace

import pytest
import torch

from backpass.data import load_digits
from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.studies.demo.claims import claims, label
from backpass.lab.studies.demo.findings import findings
from backpass.lab.studies.demo.fit import Run, fit, gradient
from backpass.lab.studies.demo.measure import SCALES, Demo, Measured, _best_rate, measure
from backpass.lab.studies.demo.result import PICTURE, describe
from backpass.models import build
from backpass.rules import parse_rule

TINY = replace(SCALES["quick"], scale="tiny", epochs=2, rates=(0.05, 1e4), eps=(0.1,), attack_steps=3)


@pytest.fixture(scope="module")
def measured():
    return measure(TINY)


def test_bp_learns_the_digits():
    split, model = load_digits(), build("mlp", seed=0)
    run = fit(model, split, parse_rule("bp"), rate=0.1, epochs=10, batch=64, seed=0)
    assert run.accuracy > 93
    assert run.losses[-1] < 0.25 < 2 < run.losses[0]


def test_a_run_under_bp_is_plain_sgd():
    split = load_digits()
    model, twin = build("mlp", seed=1), build("mlp", seed=1)
    fit(model, split, parse_rule("bp"), rate=0.1, epochs=1, batch=64, seed=5)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    order = torch.randperm(1347, generator=torch.Generator().manual_seed(5))
    for chosen in order[: 21 * 64].split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(split.train.x[chosen]), split.train.y[chosen]).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_unit_steps_have_unit_length():
    split, model = load_digits(), build("mlp", seed=0)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    fit(model, split, parse_rule("linbp"), rate=0.3, epochs=1, batch=1347, seed=0, unit_steps=True)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.3, rel=1e-4)


def test_a_rule_changes_the_gradient_and_leaves_the_model():
    split, model = load_digits(), build("mlp", seed=0)
    x, y = split.train.x[:32], split.train.y[:32]
    plain, linear, again = (gradient(model, parse_rule(r), x, y) for r in ("bp", "linbp", "bp"))
    assert not torch.allclose(plain, linear, rtol=0.1)
    assert torch.equal(plain, again)


def test_a_diverged_run_is_stopped_and_recorded():
    run = fit(build("mlp"), load_digits(), parse_rule("bp"), rate=1e4, epochs=3, batch=64, seed=0)
    assert run.diverged
    assert len(run.losses) == 4
    assert math.isfinite(run.losses[0])
    assert math.isnan(run.losses[-1])
    assert math.isnan(run.accuracy)


def test_the_same_settings_give_the_same_numbers(measured):
    again, first = (json.loads(describe(m).as_json()) for m in (measure(TINY), measured))
    for part in ("series", "claims", "tables", "findings", "settings"):
        assert again[part] == first[part]


def test_every_rule_starts_from_the_same_weights(measured):
    for seed in range(TINY.seeds):
        starts = {runs[seed].losses[0] for runs in measured.runs.values()}
        assert len(starts) == 1


def test_the_best_rate_is_one_at_which_nothing_diverged(measured):
    assert set(measured.best_rates.values()) == {0.05}
    assert all(run.diverged for run in measured.runs["bp", 1e4])


def test_one_lucky_run_does_not_make_an_unstable_rate_the_best():
    demo = Demo(seeds=3, rules=("bp",), rates=(0.1, 0.5, 1.0))
    ends = {0.1: [0.02, 0.03, 0.025], 0.5: [0.0001, 0.09, 0.05], 1.0: [0.001, 0.001, math.nan]}
    runs = {("bp", r): [Run(losses=[2.0, end], accuracy=90.0) for end in losses] for r, losses in ends.items()}
    assert _best_rate(demo, "bp", runs) == 0.1


def test_the_result_has_all_plots_claims_and_a_word_on_divergence(measured):
    result = describe(measured)
    assert {series.id for series in result.series} > set(PICTURE)
    assert len({claim.id for claim in result.claims}) == len(result.claims) == 2 * (5 + 2 + len(TINY.eps))
    assert any(f.topic == "Stability" and "BP: 3 of 3 at rate 10000" in f.text for f in result.findings)
    assert result.tables[0].rows[0][2] == "3 of 3 diverged"
    assert "1,797 real images" in result.environment["data"]


def test_measuring_leaves_random_state_and_threads_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measure(replace(TINY, seeds=2, epochs=1, rules=("bp", "linbp"), early=1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state())


def test_when_plain_backpropagation_always_diverges_the_demo_says_so():
    with pytest.raises(BackpassError, match="diverged at every rate"):
        measure(replace(TINY, seeds=2, rates=(1e4,)))


def _planted(loss_shift, fooled_shift, noise=0.01):
    """Numbers in which LinBP's losses and successes differ from BP's by a known shift."""
    demo = Demo(seeds=5, rules=("bp", "linbp:start=-2"), rates=(0.01, 0.1), epochs=3, eps=(0.1, 0.2))
    wobble = [noise * w for w in (-1, 1, 0, 0.5, -0.5)]

    def runs(shift):
        return [Run(losses=[2.0, 1.5 + s, 1.0 + s, 0.5 + s], accuracy=90 - 10 * s) for s in (shift + w for w in wobble)]

    base = [Run(losses=[2.0, 1.5, 1.0, 0.5], accuracy=90.0)] * 5
    steps = [*demo.rates, None]
    return Measured(
        demo=demo,
        data="planted",
        runs={("bp", s): base for s in steps} | {("linbp:start=-2", s): runs(loss_shift) for s in steps},
        best_rates={"bp": 0.1, "linbp:start=-2": 0.1},
        lengths={rule: [1.0] * 5 for rule in demo.rules},
        cosines={rule: [1.0] * 5 for rule in demo.rules},
        attacked=[440] * 5,
        fooled={("bp", e): [50.0] * 5 for e in demo.eps}
        | {("linbp:start=-2", e): [50 + fooled_shift + w for w in wobble] for e in demo.eps},
        seconds=1.0,
        threads=1,
    )


@pytest.mark.parametrize(
    ("loss", "fooled", "verdict", "words"),
    [
        (-0.2, 5.0, "holds", ["lower than BP's by 0.200", "fools more images at eps 0.1 and 0.2"]),
        (0.2, -5.0, "does not hold", ["higher than BP's by 0.200", "fools fewer images at eps 0.1 and 0.2"]),
        (0.0, 0.0, "undecided", ["not told apart from BP's", "fools as many, as far as 5 seeds can tell, at eps 0.1"]),
    ],
)
def test_words_follow_from_planted_numbers(loss, fooled, verdict, words):
    planted = _planted(loss, fooled)
    judged = claims(planted)
    assert {claim.verdict for claim in judged} == {verdict}
    said = " ".join(f"{f.topic}. {f.text}" for f in findings(planted, judged))
    for part in words:
        assert part in said
    assert "No run diverged" in said


def test_rules_have_names_for_a_legend():
    assert [label(r) for r in ("bp", "linbp", "linbp:start=-3", "linbp:slope=0.5")] == [
        "BP",
        "LinBP, every site",
        "LinBP, last 3 sites",
        "linbp:slope=0.5",
    ]


def test_impossible_settings_are_refused():
    with pytest.raises(BackpassError, match="at least 2 seeds, got 1"):
        Demo(seeds=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'mlp'"):
        Demo(model="mpl")
