"""The paper's placement of linear backpropagation, by name."""

import pytest
import torch

from backpass import BackpassError, LinBP, UnknownNameError, list_sites, parse_rule
from backpass.experiments.studies import order_rules
from backpass.lab.placements import parse_rule_for
from backpass.models import INPUT_SHAPES, build

# Linear activations of all, and the module of the first one; attack and training differ for DenseNet-161 alone.
TABLE = {
    ("vgg16", "attack"): (5, 15, "features.36"),
    ("resnet50", "attack"): (9, 49, "layer4.0.act1"),
    ("resnet50:activation=silu", "attack"): (9, 49, "layer4.0.act1"),
    ("densenet161", "attack"): (50, 161, "features.transition3.act"),
    ("densenet161", "training"): (49, 161, "features.denseblock4.denselayer1.act1"),
    ("mobilenetv2", "training"): (3, 35, "features.17.conv.0.2"),
    ("wrn-28-10", "attack"): (1, 25, "act"),
    ("mlp", "training"): (2, 3, "act2"),
    ("lenet5", "training"): (2, 4, "act3"),
}


@pytest.mark.parametrize(("name", "use"), TABLE)
def test_the_paper_has_these_activations_linear(name, use):
    model, x = build(name).eval(), torch.rand(1, *INPUT_SHAPES[name.partition(":")[0]])
    with parse_rule_for(name, "linbp:start=paper", use=use).attach(model) as attached:
        model(x)
    everything = list_sites(model, x)
    assert (len(attached.sites), len(everything), attached.sites[0].module) == TABLE[name, use]
    assert list(attached.sites) == list(everything)[-len(attached.sites) :]


def test_other_settings_stay():
    assert parse_rule_for("resnet50", "linbp:start=paper,slope=0.5") == LinBP(start="layer4", slope=0.5)


@pytest.mark.parametrize("text", ["bp", "linbp", "linbp:start=-2", "linbp:start=layer4", "proxprop:tau=0.5"])
def test_every_other_rule_is_what_it_is_anywhere(text):
    assert parse_rule_for("my_nets:Net", text, use="training") == parse_rule(text)


def test_a_rule_for_weights_alone_is_refused_for_attacks():
    with pytest.raises(BackpassError, match="an attack follows that of the image, which would stay plain"):
        parse_rule_for("my_nets:Net", "proxprop", use="attack")


@pytest.mark.parametrize("name", ["resnet18", "cnn", "my_nets:Net", "mlp:widths=20-20"])
def test_a_network_that_the_paper_does_not_have_is_told(name):
    with pytest.raises(BackpassError, match=f"known for densenet161, lenet5, .* and not for '{name}'"):
        parse_rule_for(name, "linbp:start=paper")


def test_an_mlp_of_other_widths_but_three_hidden_layers_has_it():
    assert parse_rule_for("mlp:widths=8-8-8,activation=tanh", "linbp:start=paper").start == -2


def test_a_misspelt_network_or_rule_is_told():
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet50'"):
        parse_rule_for("resnet5", "linbp:start=paper")
    with pytest.raises(UnknownNameError, match="Did you mean 'linbp'"):
        parse_rule_for("resnet50", "linpb:start=paper")


def test_a_study_of_one_network_names_the_place_itself():
    assert order_rules(["linbp:start=paper", "bp"], "resnet50") == ["bp", "linbp:start=layer4"]
    with pytest.raises(BackpassError, match="linbp:start=-2 stands twice"):
        order_rules(["linbp:start=paper", "linbp:start=-2"], "mlp")
