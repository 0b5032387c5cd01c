"""Whatever stands where a text form is read: it is read, or refused with a message; nothing else happens."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backpass import BackpassError, parse_rule
from backpass.data import Augmentation
from backpass.data.names import read_name
from backpass.lab.placements import parse_rule_for
from backpass.lab.subjects import parse_device
from backpass.lab.training.adversaries import adversary_text, make_adversary
from backpass.lab.training.optimizers import make_optimizer
from backpass.lab.training.recipe import Recipe, read_recipe, write_recipe
from backpass.models import MODELS
from backpass.models.shapes import parse_shape
from backpass.models.text import read_model
from backpass.numbers import read_number, read_numbers
from backpass.training.averaging import read_average
from backpass.training.schedules import make_schedule


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


RULES = [
    "bp",
    "linbp:start=-2,slope=0.5",
    "linbp:start='0.1',residual=renormalized",
    "proxprop:tau=1.0,solve=step",
    "sibp:eta=0.1,lam=1.0",
]
FORMS = {
    "rule": (parse_rule, RULES),
    "rule for a network": (lambda text: parse_rule_for("mlp", text, use="listing"), ["linbp:start=paper", *RULES]),
    "adversary": (
        lambda text: make_adversary(text, "--adversary"),
        ["pgd:eps=8/255,steps=10,norm=l2", "autoattack:eps=0.1", "square:eps=.1,queries=50", "fgsm:eps=1e-2"],
    ),
    "network": (
        lambda text: read_model(text, MODELS),
        ["mlp:widths=400-200-100,activation=tanh", "resnet18:activation=silu", "cnn:batch_norm=true", "lenet5"],
    ),
    "optimizer": (
        lambda text: make_optimizer(text, [torch.nn.Parameter(torch.zeros(2))], 0.1),
        ["sgd:momentum=0.9,weight_decay=5e-4,nesterov=true", "adam:eps=1e-8", "rmsprop:alpha=0.9", "adagrad"],
    ),
    "scheduler": (
        lambda text: make_schedule(text, optimizer(), 100),
        ["cosine:epochs=10", "step:every=3,gamma=.5", "exponential:gamma=0.9", "linear", "controlled:every=2"],
    ),
    "average": (read_average, ["ema:0.999", "polyak:0.5"]),
    "augmentation": (Augmentation.parse, ["crop,flip", "crop=2", "flip"]),
    "data": (read_name, ["mnist", "owner/name:config=a,image=img,label=y", "cifar10"]),
    "shape": (parse_shape, ["3x224x224", "1,28,28"]),
    "device": (parse_device, ["cpu", "cpu:0"]),
    "number": (read_number, ["8/255", "0.03", "1e-2", "-3"]),
    "numbers": (lambda text: read_numbers(text, "these"), ["1,2,8/255"]),
}  # fmt: skip
ODD = [*":=,'\\-./ 019_eE+x%\n\t\0", "nan", "inf", "none", "true", "9" * 5000, "²"]
CHARACTERS = st.sampled_from(ODD) | st.characters()


@st.composite
def near(draw, examples):
    """An example, or two of them, with a few edits."""
    text = "".join(draw(st.lists(st.sampled_from(examples), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(CHARACTERS | st.just("")) + text[place + draw(st.integers(0, 3)) :]
    return text


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_text_is_read_or_refused_with_a_message(form, data):
    read, examples = FORMS[form]
    text = data.draw(near(examples) | st.text())
    with suppress(BackpassError):
        read(text)


@settings(deadline=None, max_examples=300)
@given(near(RULES))
def test_the_text_of_a_rule_that_was_read_is_that_rule(text):
    try:
        rule = parse_rule(text)
    except BackpassError:
        return
    assert parse_rule(str(rule)) == rule


@settings(deadline=None, max_examples=300)
@given(near(FORMS["adversary"][1]))
def test_the_text_of_an_adversary_that_was_read_is_that_adversary(text):
    try:
        attack = make_adversary(text, "--adversary")
    except BackpassError:
        return
    assert make_adversary(adversary_text(attack), "--adversary") == attack


RECIPE = """title = "A"
data = "mnist"
model = "mlp:widths=20-10"
rule = ["bp", "linbp:start=-1"]
lr = 0.1
epochs = 3
normalize_gradient = true
adversary = "pgd:eps=8/255"
"""


@settings(deadline=None, max_examples=300)
@given(text=near([RECIPE]))
def test_a_recipe_is_read_and_written_back_or_refused_with_a_message(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.toml").write_bytes(text.encode(errors="surrogatepass"))
    try:
        recipe = Recipe.of(read_recipe(folder / "recipe.toml"), "the recipe")
    except BackpassError:
        return
    assert Recipe.of(read_recipe(write_recipe(recipe, folder / "again.toml")), "the copy") == recipe


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*Recipe.__dataclass_fields__, "depth"]), VALUES, max_size=4))
def test_values_of_any_kind_make_a_recipe_or_are_refused_with_a_message(values):
    with suppress(BackpassError):
        Recipe.of({"data": "mnist", "model": "mlp", **values}, "the recipe")


def test_the_examples_themselves_are_read():
    for read, examples in FORMS.values():
        for text in examples:
            read(text)
