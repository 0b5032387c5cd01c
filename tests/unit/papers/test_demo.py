"""The demo's works against the same computations by hand; `tests/unit/test_cli.py` runs its table."""

from dataclasses import replace

import pytest
import torch

from backpass import parse_rule
from backpass.attacks import PGD, transfer
from backpass.data import load_digits
from backpass.errors import BackpassError
from backpass.experiments import digit_transfer
from backpass.experiments.digit_sde import DigitSDE, relative_difference, run_digits
from backpass.experiments.digit_transfer import DigitTransfer, attack_digits
from backpass.experiments.experiment import Arm, Context, Runs

TRANSFER = DigitTransfer(source="mlp:widths=16", target="mlp:widths=8", epochs=1, eps=(0.1, 0.3), steps=3, images=40)
SMALL = DigitSDE(process="adversarial", paths=6, samples=16, steps=6, records=3, eta=0.3)


@pytest.mark.parametrize("rule", ["bp", "linbp"])
def test_success_is_that_of_the_librarys_transfer_between_the_two_networks(rule):
    state = torch.get_rng_state()
    found = attack_digits(replace(TRANSFER, rule=rule), 1, Context())["fooled"]
    assert torch.equal(state, torch.get_rng_state())
    source, target = digit_transfer._networks(TRANSFER, 1)
    test = load_digits().test
    for eps, rate in zip(TRANSFER.eps, found, strict=True):
        attack = PGD(eps=eps, step=eps / 5, steps=3, restarts=1, seed=1)
        rules = {"": parse_rule(rule)}
        report = transfer({"a": source}, {"b": target}, (test.x[:40], test.y[:40]), attack, rules=rules)
        assert rate == pytest.approx(100 * report.rates["a "]["b"].value)


def test_plain_training_and_the_sde_are_adversarial_training_where_there_is_no_noise_to_tell_them_apart():
    # All images in one batch and no attack: the chain is gradient descent, and every path is the same.
    whole = replace(SMALL, batch_size=16, attack_steps=0, paths=2)
    plain, adversarial = (run_digits(replace(whole, process=name), 3, Context()) for name in ("plain", "adversarial"))
    assert plain == adversarial
    assert plain["time"] == pytest.approx([0, 0.6, 1.2, 1.8])
    assert plain["loss"] == sorted(plain["loss"], reverse=True)
    assert adversarial != run_digits(replace(whole, process="adversarial", attack_steps=3), 3, Context())


def test_every_process_starts_at_the_weights_of_its_seed():
    starts = [run_digits(replace(SMALL, process=name), 2, Context())["gradient"][0] for name in ("adversarial", "sde")]
    assert starts[0] == pytest.approx(starts[1])
    assert run_digits(SMALL, 3, Context())["gradient"][0] != starts[0]
    with pytest.raises(BackpassError, match="plain, adversarial or sde"):
        run_digits(replace(SMALL, process="none"), 0, Context())


def test_a_relative_difference_is_in_per_cent_of_the_second_arm():
    runs = [
        Runs(
            arm=Arm(name="a", work=run_digits, candidates={"": SMALL}), by_candidate={"": [{"loss": [9, v]}]}, chosen=""
        )
        for v in (3.0, 4.0)
    ]
    assert relative_difference("loss", "loss").both(*runs) == ([75.0], [100.0])
