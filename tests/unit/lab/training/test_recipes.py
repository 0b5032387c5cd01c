"""Recipes: written as they are read, every one in the repository validates, and its rules find their sites."""

import inspect
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backpass import BackpassError
from backpass.attacks import APGD, FGSM, IFGSM, MIFGSM, PGD, AutoAttack, Square
from backpass.lab.training.adversaries import adversary_text, default_judge, make_adversary
from backpass.lab.training.assembly import complete
from backpass.lab.training.recipe import Recipe, described, kinds, read_recipe, write_recipe
from backpass.models import build

FOLDER = Path(__file__).parents[4] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
LARGE = ("densenet161", "mobilenetv2", "resnet18", "resnet50", "vgg16")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_validates_and_is_in_the_table(file):
    named = complete(Recipe.of(read_recipe(file), file.name))
    assert named.recipe.title
    assert f"[{file.stem}]({file.name})" in (FOLDER / "README.md").read_text()


def test_the_table_names_no_other():
    table = (FOLDER / "README.md").read_text()
    assert table.count(".toml) |") == len(RECIPES)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.slow) if any(name in file.read_text() for name in LARGE) else file
        for file in RECIPES
    ],
    ids=lambda file: file.stem,
)
def test_its_rules_find_their_sites(file):
    named = complete(Recipe.of(read_recipe(file), file.name))
    model = build(named.recipe.model, shape=(3, 32, 32) if named.recipe.data == "cifar10" else (1, 28, 28)).eval()
    for rule in filter(None, (*named.rules, named.adversary_rule)):
        with rule.attach(model) as attached, torch.no_grad():
            model(
                torch.rand(
                    1, 3 if named.recipe.data == "cifar10" else 1, *(28 if named.recipe.data == "mnist" else 32,) * 2
                )
            )
        assert attached.sites


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20) | st.just(
    'a "b" \\ c\nd\te'
)


@given(
    title=words,
    rule=st.lists(words.filter(bool), min_size=1, max_size=3),
    lr=st.floats(1e-8, 1e3),
    clip_norm=st.none() | st.floats(1e-3, 1e6),
)
def test_what_is_written_is_read_again(tmp_path_factory, title, rule, lr, clip_norm):
    recipe = Recipe(title=title, data="digits", model="mlp", rule=tuple(rule), lr=lr, clip_norm=clip_norm, compile=True)
    file = write_recipe(recipe, tmp_path_factory.mktemp("recipes") / "recipe.toml")
    tomllib.loads(file.read_text())
    assert Recipe.of(read_recipe(file), "it") == recipe


@pytest.mark.parametrize(
    "text",
    [
        "pgd:eps=0.2,steps=7",
        "pgd:eps=8/255,steps=1,step=2/255,restarts=5",
        "pgd:eps=8/255,random_start=false,start_eps=0.001,norm=l2",
        "fgsm:eps=8/255",
        "apgd:eps=0.1,loss=dlr",
        "ifgsm:eps=.1",
        "mifgsm:eps=.1,steps=3",
        "square:eps=.1,queries=10",
        "autoattack:eps=0.0313725",
    ],
)
def test_an_adversary_is_what_its_effective_text_says(text):
    attack = make_adversary(text, "the adversary")
    assert make_adversary(adversary_text(attack), "the adversary") == attack


def test_an_adversarys_step_reaches_the_edge_of_its_ball():
    assert make_adversary("pgd:eps=0.2,steps=10", "it") == PGD(eps=0.2, step=0.05, steps=10, restarts=1)
    assert make_adversary("pgd:eps=0.2,steps=1", "it") == PGD(eps=0.2, step=0.25, steps=1, restarts=1)
    assert make_adversary("pgd:eps=0.2,step=0.01", "it").step == 0.01
    kinds = {"fgsm": FGSM, "ifgsm": IFGSM, "mifgsm": MIFGSM, "apgd": APGD, "square": Square, "autoattack": AutoAttack}
    for name, kind in kinds.items():
        assert type(make_adversary(f"{name}:eps=0.1", "it")) is kind


def test_the_judge_searches_the_adversarys_ball():
    judge = default_judge(FGSM(eps=0.3, norm="l2"))
    assert (judge.eps, judge.norm, judge.steps) == (0.3, "l2", 20)


def test_every_setting_is_documented_once_and_has_an_option():
    from backpass.cli.train import _run, _signed

    options = inspect.signature(_signed(_run)).parameters
    words = described()
    for name in kinds():
        assert len(words[name]) > 15, name
        assert name in options or name in ("title", "source", "note")


def test_plain_backpropagation_is_no_rule():
    named = complete(
        Recipe(data="digits", model="mlp", rule=("bp", "linbp:start=-1"), adversary="pgd:eps=.1", adversary_rule="bp")
    )
    assert [str(rule) for rule in named.rules] == ["linbp:start=-1"]
    assert named.adversary_rule is None


@pytest.mark.parametrize("name", ["trades", "adversary_rule", "warmup", "stop_overfitting"])
def test_what_is_for_adversarial_training_needs_an_adversary(name):
    value = {"trades": 6.0, "adversary_rule": "bp", "warmup": 1, "stop_overfitting": True}[name]
    with pytest.raises(BackpassError, match="give an adversary too"):
        complete(Recipe(data="digits", model="mlp", **{name: value}))
