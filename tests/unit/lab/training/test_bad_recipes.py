"""Recipes, weights and folders of runs that are not what they should be."""

import json
import math

import pytest
import torch
from torch import nn

from backpass import BackpassError
from backpass.lab.training.assembly import complete
from backpass.lab.training.listing import find_runs
from backpass.lab.training.optimizers import make_optimizer
from backpass.lab.training.recipe import Recipe, read_recipe, write_recipe
from backpass.models.weights import read_weights
from backpass.training.schedules import make_schedule

RECIPE = Recipe(data="digits", model="mlp")


@pytest.mark.parametrize("title", ["a\x01b", "a\x7fb", "\r\n\t\u2028", 'back\\slash "quoted"', "é 🎲"])
def test_a_recipe_is_read_back_whatever_its_words(tmp_path, title):
    path = write_recipe(RECIPE.with_(title=title), tmp_path / "recipe.toml")
    assert Recipe.of(read_recipe(path), "it") == RECIPE.with_(title=title)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('\ufeffdata = "digits"\nmodel = "mlp"\n', encoding="utf-8")
    assert read_recipe(path) == {"data": "digits", "model": "mlp"}


@pytest.mark.parametrize("values", [{"limit": -5}, {"limit": 0}, {"robust_images": 0}, {"seed": 2**64}], ids=str)
def test_a_number_of_a_recipe_is_checked_before_data_is_read(values):
    with pytest.raises(BackpassError, match=f"{next(iter(values))} must be a whole number"):
        complete(RECIPE.with_(**values))


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_is_finite_and_above_zero(lr):
    with pytest.raises(BackpassError, match="--lr"):
        make_optimizer("sgd", [nn.Parameter(torch.zeros(1))], lr)


def test_a_setting_of_a_schedule_is_finite():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    for text in ("exponential:gamma=nan", "step:gamma=inf"):
        with pytest.raises(BackpassError, match="numbers above 0"):
            make_schedule(text, optimizer, 1)


def test_any_file_may_be_named_as_weights(tmp_path):
    for content in (b"root:x:0:0:root:/root:/bin/sh\n", b"", b"\x80\x02", bytes(range(256))):
        (tmp_path / "passwd").write_bytes(content)
        with pytest.raises(BackpassError):
            read_weights(tmp_path / "passwd")


def _run(folder, **values):
    folder.mkdir(parents=True)
    state = {"status": "finished", "settings": {"epochs": 1}, "epoch": 1, "last": {"loss": 0.5}}
    (folder / "run.json").write_text(json.dumps({**state, **values}))
    (folder / "timing.jsonl").write_text('{"seconds": 1.5}\n')


def test_one_damaged_run_does_not_hide_the_others(tmp_path, caplog):
    _run(tmp_path / "good")
    _run(tmp_path / "bad", last={"loss": "x"})
    _run(tmp_path / "worse")
    (tmp_path / "worse" / "recipe.toml").write_text("x = = 1")
    assert [run.folder for run in find_runs([tmp_path])] == [str(tmp_path / "good")]
    assert "bad/run.json" in caplog.text
    assert "worse/recipe.toml" in caplog.text
    with pytest.raises(BackpassError, match="damaged"):
        find_runs([tmp_path / "bad"])


def test_a_line_cut_off_by_a_kill_costs_no_listing(tmp_path):
    _run(tmp_path / "run")
    (tmp_path / "run" / "timing.jsonl").write_text('{"seconds": 1.5}\n{"sec')
    (run,) = find_runs([tmp_path])
    assert run.seconds == 1.5
