"""Promise 5: every bad input gets the message that names the mistake and the way out."""

from __future__ import annotations

import logging

import numpy
import pytest
import torch
from torch import nn

from backpass.attacks import APGD, FAB, FMN, MIFGSM, PGD, AutoAttack, Square
from backpass.errors import BackpassError, UnknownNameError


class Answers(nn.Module):
    """A linear model whose logits pass through a function."""

    def __init__(self, change) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)))


def poisoned() -> nn.Module:
    model = Answers(lambda z: z)
    nn.init.constant_(model.linear.weight, torch.nan)
    return model


X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
OK = Answers(lambda z: z)

CALLS = {
    "normalised images": (OK, X * 2.64 / X.max(), Y, r"max is 2\.64: did you normalise before the model\?"),
    "images below the bounds": (OK, X - 1, Y, r"min is -0\.\d+: did you normalise"),
    "NaN images": (OK, X / 0 * 0, Y, "x contains NaN"),
    "uint8 images": (OK, (X * 255).byte(), Y, r"got torch\.uint8: convert with x\.float\(\) / 255"),
    "half images": (OK, X.half(), Y, r"got torch\.float16: search in half precision with dtype="),
    "array": (OK, X.numpy(), Y, r"got ndarray\. Use torch\.as_tensor"),
    "empty batch": (OK, X[:0], Y[:0], "an empty batch"),
    "label too large": (OK, X, Y + 1, "label 3 is out of range: the model has 3 classes, 0 to 2"),
    "label negative": (OK, X, Y - 1, "at least 0; the least of y is -1"),
    "sparse images": (OK, X.to_sparse(), Y, r"dense tensor with values; got torch\.sparse_coo"),
    "images without values": (OK, X.to("meta"), Y, "dense tensor with values; got .* on meta"),
    "infinite images": (OK, X + torch.inf, Y, "its max is inf"),
    "one-hot labels": (OK, X, torch.eye(3)[Y], r"shape \(5,\); got \(5, 3\)\. One-hot labels need argmax"),
    "a column of labels": (OK, X, Y[:, None], r"a column of labels squeeze\(1\)"),
    "a list of labels": (OK, X, Y.tolist(), r"got list\. Use torch\.as_tensor\(y\)"),
    "bool labels": (OK, X, Y > 0, r"got torch\.bool\. Use y\.long\(\)"),
    "float labels": (OK, X, Y.float(), r"got torch\.float32\. Use y\.long\(\)"),
    "too few labels": (OK, X, Y[:4], r"one label per image, shape \(5,\); got \(4,\)"),
    "NaN weights": (poisoned(), X, Y, "logits are not finite: its weights hold NaN"),
    "tuple of logits": (Answers(lambda z: (z, z)), X, Y, "got tuple. Select it with logits="),
    "dict of logits": (Answers(lambda z: {"out": z}), X, Y, r"got dict with keys \['out'\]\. Select it with logits="),
    "logits of one class": (Answers(lambda z: z[:, 0]), X, Y, r"shape \(5, C\) with C >= 2; got \(5,\)"),
    "complex logits": (Answers(lambda z: z + 0j), X, Y, "must return real logits; got complex"),
    "no answer": (Answers(lambda z: None), X, Y, "got NoneType. Select it with logits="),
    "logits per pixel": (Answers(lambda z: z[..., None]), X, Y, r"got \(5, 3, 1\)"),
    "detached logits": (Answers(lambda z: z.detach()), X, Y, "do not depend differentiably on x"),
    "model without values": (
        nn.Linear(4, 3, device="meta"),
        X,
        Y,
        "on the device meta: load its weights",
    ),
    "labels on another device": (OK, X, Y.to("meta"), "x is on cpu, y on meta"),
    "model in float64": (Answers(lambda z: z).double(), X, Y, r"convert the images with x\.to\(torch\.float64\)"),
    "model in bfloat16": (Answers(lambda z: z).bfloat16(), X, Y, r"pass dtype=torch\.bfloat16 to the attack"),
    "not a module": (lambda x: x, X, Y, "must be a torch.nn.Module"),
}

SETTINGS = [
    (PGD, {"eps": 8}, r"eps=8 exceeds the pixel range .* Did you mean 8/255\?"),
    (PGD, {"eps": -0.1}, "eps must be a finite number of at least 0; got -0.1"),
    (PGD, {"eps": float("nan")}, "eps must be a finite number"),
    (PGD, {"eps": float("inf")}, "eps must be a finite number"),
    (PGD, {"eps": "8/255"}, "eps must be a finite number of at least 0; got '8/255'"),
    (PGD, {"eps": [0.1, -0.2]}, "eps must be a finite number of at least 0; got -0.2"),
    (PGD, {"eps": torch.ones(2, 2)}, "eps must be a finite number"),
    (PGD, {"step": 2}, r"step=2 exceeds the pixel range .* Did you mean 2/255\?"),
    (PGD, {"steps": 0}, "steps must be a whole number of at least 1; got 0"),
    (PGD, {"steps": True}, "steps must be a whole number of at least 1; got True"),
    (PGD, {"steps": 2.5}, "steps must be a whole number of at least 1; got 2.5"),
    (PGD, {"restarts": None}, "restarts must be a whole number of at least 1; got None"),
    (PGD, {"bounds": (1.0, 0.0)}, r"bounds must be two finite numbers \(lo, hi\) with lo < hi"),
    (PGD, {"bounds": ([0, 0], [1, 1, 1])}, "one number per channel"),
    (PGD, {"bounds": 1}, "bounds must be two finite numbers"),
    (PGD, {"start_eps": 0.1}, r"start_eps must be in \[0, eps=0\.0313725\]; got 0\.1"),
    (PGD, {"start_eps": -1}, "start_eps must be a finite number of at least 0; got -1"),
    (PGD, {"eot": 0}, "eot must be a whole number of at least 1; got 0"),
    (PGD, {"dtype": torch.int8}, r"dtype must be torch\.bfloat16, torch\.float16 or None; got torch\.int8"),
    (PGD, {"norm": "linfty"}, r"unknown norm 'linfty'\. Did you mean 'linf'\?"),
    (PGD, {"loss": "cee"}, r"unknown loss 'cee'\. Did you mean 'ce'\?"),
    (PGD, {"loss": None}, "loss must be a name or a function"),
    (PGD, {"targeted": 1}, "targeted must be True or False; got 1"),
    (PGD, {"early_stop": "no"}, "early_stop must be True or False; got 'no'"),
    (PGD, {"seed": "a"}, "seed must be a whole number; got 'a'"),
    (MIFGSM, {"decay": -1}, "decay must be a finite number of at least 0; got -1"),
    (MIFGSM, {"diversity": 2}, r"diversity must be a finite number in \[0, 1\]; got 2"),
    (MIFGSM, {"resize": 0}, r"resize must be a finite number in \(0, 1\]; got 0"),
    (MIFGSM, {"translation": -1}, "translation must be a whole number of at least 0; got -1"),
    (MIFGSM, {"variance": 2.0}, "variance must be a whole number"),
    (MIFGSM, {"scales": 0}, "scales must be a whole number of at least 1; got 0"),
    (MIFGSM, {"mix": -0.2}, "mix must be a finite number of at least 0"),
    (MIFGSM, {"beta": float("nan")}, "beta must be a finite number of at least 0"),
    (MIFGSM, {"patchout": 1.0}, r"patchout must be a finite number in \[0, 1\); got 1.0"),
    (MIFGSM, {"nesterov": 1}, "nesterov must be True or False"),
    (MIFGSM, {"nesterov": True, "norm": "l2"}, "defined for the norm linf; got norm='l2'"),
    (MIFGSM, {"pool": "digits"}, "pool must be a Pool of images and labels; got str"),
    (FMN, {"steps": 0}, "steps must be a whole number of at least 1"),
    (FMN, {"step": -1.0}, "step must be a finite number of at least 0"),
    (FMN, {"gamma": 0.0}, r"gamma must be a finite number in \(0, 1\); got 0.0"),
    (FMN, {"gamma_end": 0.5}, "gamma_end must be at most gamma=0.05; got 0.5"),
    (FMN, {"eps": float("nan")}, "eps must be a finite number"),
    (FAB, {"targets": 0}, "targets must be a whole number of at least 1; got 0"),
    (FAB, {"targeted": True}, "leads away from y"),
    (Square, {"share": 0}, r"share must be a finite number in \(0, 1\]; got 0"),
    (Square, {"norm": "l1"}, "use APGD or FMN for norm='l1'"),
    (APGD, {"loss": "dlr-targeted", "targeted": True}, "leads away from y to classes of its own choice"),
    (AutoAttack, {"version": "strong"}, "unknown version 'strong'"),
    (AutoAttack, {"targeted": True}, "away from y"),
    (AutoAttack, {"loss": "dlr"}, "chooses its losses itself"),
]


@pytest.mark.parametrize(("model", "x", "y", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_bad_call_says_what_was_expected_what_came_and_what_to_do(model, x, y, message):
    with pytest.raises(BackpassError, match=message):
        PGD(steps=1)(model, x, y)


@pytest.mark.parametrize(("attack", "settings", "message"), SETTINGS)
def test_a_bad_setting_is_refused_when_it_is_made(attack, settings, message):
    with pytest.raises(BackpassError, match=message):
        attack(**settings)


@pytest.mark.parametrize("make", [numpy.int64, torch.tensor, numpy.array])
def test_numbers_of_numpy_and_tensors_become_pythons(make):
    attack = PGD(eps=make(1), steps=make(3), seed=make(2), norm="l2")
    assert attack == PGD(eps=1, steps=3, seed=2, norm="l2")
    assert {type(number) for number in (attack.eps, attack.steps, attack.seed)} == {int}


def test_an_unknown_name_is_an_error_of_its_own():
    with pytest.raises(UnknownNameError):
        PGD(norm="l3")


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        PGD().eps = 0.1
    with pytest.raises(TypeError):
        PGD(0.1)


def test_a_loss_that_is_reduced_is_refused():
    with pytest.raises(BackpassError, match=r"one value per sample, shape \(5,\); got \(\)"):
        PGD(loss=lambda logits, y: logits.sum())(OK, X, Y)


def test_a_key_that_the_output_lacks_is_refused():
    with pytest.raises(BackpassError, match="logits='aux' is not in the model's output, a dict"):
        PGD(logits="aux")(Answers(lambda z: {"out": z}), X, Y)


def test_dlr_needs_three_classes():
    with pytest.raises(BackpassError, match="needs at least 3 classes; the model has 2"):
        PGD(loss="dlr")(Answers(lambda z: z[:, :2]), X, Y % 2)


def test_outputs_that_look_like_probabilities_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="backpass"):
        PGD(steps=1)(Answers(lambda z: z.softmax(1)), X, Y)
    assert "look like probabilities" in caplog.text
    caplog.clear()
    PGD(steps=1)(OK, X, Y)
    assert caplog.text == ""


def test_a_gradient_that_is_not_finite_costs_the_sample_and_not_the_bounds(caplog):
    # The derivative of sqrt is infinite at 0, and 0 * inf is NaN: the logits themselves are finite.
    model = Answers(lambda z: z + 0 * (z * 0).sqrt().sum())
    result = PGD(steps=2, norm="l2", early_stop=False, restarts=1)(model, X, Y)
    assert result.x_adv.isfinite().all()
    assert "gradient that is not finite" in caplog.text


def test_a_distributed_wrapper_is_refused(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(Answers(lambda z: z))
        with pytest.raises(BackpassError, match=r"pass model\.module"):
            PGD(steps=1)(wrapper, X, Y)
    finally:
        dist.destroy_process_group()
