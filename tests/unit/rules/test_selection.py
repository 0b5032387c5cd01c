"""Which sites a rule acts on: indices, fractions, module paths, a function of the site."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from backpass import BackpassError, LinBP, NoSiteError, Site, UnknownNameError, list_sites
from backpass.rules import Rule, SiteTable
from support.networks import CASES


@pytest.fixture
def model():
    return CASES["residual"].make()[0]  # sites 0 1 (blocks.0), 2 3 (blocks.1)


X = torch.randn(2, 5, dtype=torch.float64)


def taken(rule, model):
    with rule.attach(model) as attached:
        model(X)
        return [site.index for site in attached.sites]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"start": 0}, [0, 1, 2, 3]),
        ({"start": 3}, [3]),
        ({"start": -1}, [3]),
        ({"start": -4}, [0, 1, 2, 3]),
        ({"start": 0.5}, [2, 3]),
        ({"start": 0.6}, [2, 3]),
        ({"start": 0.0}, [0, 1, 2, 3]),
        ({"start": "blocks.1"}, [2, 3]),
        ({"start": "blocks.1.relu"}, [2, 3]),
        ({"stop": "blocks.1"}, [0, 1]),
        ({"stop": -1}, [0, 1, 2]),
        ({"stop": 0.25}, [0]),
        ({"start": 1, "stop": 3}, [1, 2]),
        ({"start": 1, "stop": 99}, [1, 2, 3]),
        ({"start": -3, "stop": -1}, [1, 2]),
        ({"where": lambda site: site.call == 1}, [1, 3]),
        ({"where": lambda site: site.inside("blocks.0"), "start": 1}, [1]),
    ],
)
def test_selected_sites(model, settings, expected):
    assert taken(LinBP(**settings), model) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"start": 4},
        {"start": 1.0},
        {"start": -5},
        {"start": 3, "stop": 3},
        {"start": -1, "stop": -2},
        {"start": "head"},
        {"stop": 0},
        {"where": lambda site: False},
    ],
)
def test_an_empty_selection_raises_and_names_the_sites_there_are(model, settings):
    with pytest.raises(NoSiteError, match=r"none of the 4 sites") as error:
        taken(LinBP(**settings), model)
    assert "blocks.1.relu" in str(error.value)


def test_an_unknown_module_path_raises_at_once_with_the_nearest(model):
    with pytest.raises(UnknownNameError, match=r"'block.1'.*mean 'blocks.1'"):
        LinBP(start="block.1").attach(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"start": 1.5},
        {"start": -0.5},
        {"start": True},
        {"start": [1]},
        {"stop": object()},
        {"slope": float("nan")},
        {"slope": float("inf")},
        {"slope": "1"},
        {"where": 3},
        {"residual": "renormalised"},
        {"residual": None},
    ],
)
def test_settings_out_of_range_raise(settings):
    with pytest.raises(BackpassError):
        LinBP(**settings)


def test_a_site_says_where_it_is_and_which_call_it_is(model):
    assert list_sites(model, X)[3] == Site(3, "blocks.1.relu", "relu", 1, (2, 5))


def test_listing_prints_as_a_table(model):
    assert str(list_sites(model, X)).splitlines() == [
        "site  module         function  call  shape",
        "0     blocks.0.relu  relu      0     2x5",
        "1     blocks.0.relu  relu      1     2x5",
        "2     blocks.1.relu  relu      0     2x5",
        "3     blocks.1.relu  relu      1     2x5",
    ]


def test_listing_takes_what_the_model_takes(model):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, *, token):
            return self.inner(x * token)

    scaled = Scaled()
    assert len(list_sites(scaled, X, token=2.0)) == 4
    with LinBP(start=-1).attach(scaled) as attached:
        scaled(X, token=2.0)
        assert len(attached.sites) == 1


def test_listing_refuses_an_unknown_kind(model):
    with pytest.raises(UnknownNameError, match="activation"):
        list_sites(model, X, kind="activations")


def test_a_model_without_activations_has_an_empty_table():
    assert list_sites(nn.Linear(5, 5).double(), X) == SiteTable()


def test_attaching_to_what_is_no_module_says_so():
    with pytest.raises(BackpassError, match="expected an nn.Module, got function"):
        LinBP().attach(lambda x: x)


def test_wrappers_are_seen_through(model):
    wrapped = nn.DataParallel(model)
    with LinBP(start="blocks.1").attach(wrapped) as attached:
        model(X)
        assert [site.module for site in attached.sites] == ["blocks.1.relu"] * 2


def test_a_rule_that_names_functions_but_replaces_none_is_refused(model):
    @dataclass(frozen=True, kw_only=True)
    class Forgetful(Rule):
        name = "forgetful"
        functions: ClassVar = {torch.relu: "relu"}

    with pytest.raises(BackpassError, match="define replace"):
        Forgetful().attach(model)
