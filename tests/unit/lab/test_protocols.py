"""Protocols: what eps means, against a loop written out by hand, and the attacks that options make."""

import pytest
import torch
import torch.nn.functional as F

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.plans import make_plans
from backpass.lab.protocols import Normalisation, Paper, Standard, known_normalisation, make_protocol
from backpass.numbers import fraction_text, read_number

PAPER = Paper(Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))


def colour_net():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 5)
    return torch.nn.Sequential(*layers).double()


def test_the_papers_protocol_is_the_papers_loop():
    """Normalised space, step 2/255, clamp to +-2 eps around the image, nothing clipped to valid pixels."""
    model, eps, step = colour_net(), 8 / 255, 2 / 255
    x, y = torch.rand(16, 3, 8, 8, dtype=torch.float64), torch.randint(5, (16,))
    x[0] = 0.0  # images at the edge of the valid range, which the loop leaves
    x[1] = 1.0
    mean, std = (t.double() for t in PAPER.normalisation.column)
    z0 = (x - mean) / std
    z = z0.clone()
    for _ in range(10):
        z.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(z * std + mean), y, reduction="sum"), z)
        z = (z + step * g.sign()).detach()
        z = torch.max(torch.min(z, z0 + 2 * eps), z0 - 2 * eps)
    plan = make_plans(["pgd:random_start=false,early_stop=false"], [eps], {"steps": 10}, PAPER)[0]
    attacked = PAPER.model(model).double()
    found = plan.attack(attacked, z0, y)
    assert torch.allclose(found.x_adv, z, atol=1e-7, rtol=0)
    pixels = PAPER.pixels(found.x_adv.float())
    assert pixels.min() < 0
    assert pixels.max() > 1


def test_the_papers_random_start_lies_within_eps_and_the_ball_within_twice_eps():
    attack = make_plans(["pgd"], [8 / 255], {}, PAPER)[0].attack
    assert (attack.eps, attack.start_eps, attack.step, attack.restarts) == (16 / 255, 8 / 255, 2 / 255, 5)
    lo, hi = attack.bounds
    assert lo <= (0 - 0.4914) / 0.2023 - 16 / 255
    assert hi >= (1 - 0.4465) / 0.2010 + 16 / 255
    assert "eps 8/255 is a radius of 3.24, 3.19 and 3.22" in PAPER.explain([8 / 255], 2 / 255)
    assert "step of 2/255 is 0.40, 0.40 and 0.40" in PAPER.explain([8 / 255], 2 / 255)


def test_spaces_are_there_and_back_and_models_answer_alike():
    x, model = torch.rand(4, 3, 8, 8), colour_net().float()
    for protocol in (Standard(), PAPER):
        z = protocol.images(x)
        assert torch.allclose(protocol.pixels(z), x, atol=1e-6)
        assert torch.allclose(protocol.model(model)(z), model(x), atol=1e-5)


def test_the_digits_normalisation_is_measured_on_the_part_to_learn_from():
    from backpass.data import load_data

    found, x = known_normalisation("digits"), load_data("digits", split="train").images.x
    assert found.mean[0] == pytest.approx(x.mean().item(), abs=1e-4)
    assert found.std[0] == pytest.approx(x.std().item(), abs=1e-4)


def test_options_reach_every_attack_that_has_them_and_its_own_text_wins():
    options = {"steps": 7, "restarts": None, "seed": 3, "loss": None, "step": 1 / 255}
    pgd, apgd, fgsm = make_plans(["PGD:step=2/255", "apgd:steps=20,loss=dlr", "fgsm"], [0.1], options, Standard())
    assert (pgd.attack.step, pgd.attack.steps, pgd.attack.restarts, pgd.attack.seed) == (2 / 255, 7, 1, 3)
    assert (apgd.attack.steps, apgd.attack.loss) == (20, "dlr")
    assert fgsm.attack.eps == 0.1
    assert [plan.uses_gradients for plan in make_plans(["square", "autoattack"], [0.1], {}, Standard())] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("texts", "radii", "options", "message"),
    [
        (["pdg"], [0.1], {}, "Did you mean 'pgd'"),
        (["pgd:stpes=3"], [0.1], {}, "Did you mean 'steps'"),
        (["pgd:eps=0.1"], [0.1], {}, "given by --eps"),
        (["pgd:steps=many"], [0.1], {}, "must be a whole number, got 'many'"),
        (["pgd:steps=2.5"], [0.1], {}, "must be a whole number, got 2.5"),
        (["pgd:step=fast"], [0.1], {}, "step of 'pgd:step=fast' must be a number"),
        (["pgd:random_start=3"], [0.1], {}, "must be true or false"),
        (["pgd", "pgd"], [0.1], {}, "--attack pgd stands twice"),
        (["pgd"], [0.1, 0.1], {}, "--eps 0.1 stands twice"),
        (["pgd"], [8], {}, "Did you mean 8/255"),
        (["pgd"], [0.0], {}, "above 0"),
        (["fgsm", "square"], [0.1], {"steps": 3}, "--steps has no meaning for fgsm, square"),
    ],
)
def test_attacks_that_cannot_be_meant_are_told(texts, radii, options, message):
    with pytest.raises(BackpassError, match=message):
        make_plans(texts, radii, options, Standard())


def test_protocols_that_cannot_be_meant_are_told():
    with pytest.raises(UnknownNameError, match="Did you mean 'paper'"):
        make_protocol("papre", "digits", None)
    with pytest.raises(BackpassError, match="give --mean and --std"):
        make_protocol("paper", "my_images", None)
    with pytest.raises(BackpassError, match="linf only"):
        make_plans(["pgd"], [0.1], {"norm": "l2"}, PAPER)
    with pytest.raises(BackpassError, match="std above 0"):
        Normalisation((0.5,), (0.0,))
    with pytest.raises(BackpassError, match="1 channels, the normalisation 3"):
        PAPER.normalisation.check(1)


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-2", 0.01), ("1/4", 0.25)])
def test_numbers_are_read_as_people_write_them_and_written_back(text, value):
    assert read_number(text) == value
    assert read_number(fraction_text(value)) == value


@pytest.mark.parametrize("text", ["8/25x", "", "1/0", "nan", "inf", "8/"])
def test_what_is_no_number_is_told(text):
    with pytest.raises(BackpassError, match="such as 8/255"):
        read_number(text)
