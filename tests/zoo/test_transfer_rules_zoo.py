"""The rules of transfer attacks on every network of the zoo: the forward stays plain, or the rule refuses by name."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from backpass import BPA, PNA, SGM, TGR, Deconvnet, GuidedBackprop, NoSiteError
from support.torchvision_operators import define_missing_operators
from support.zoo.architecture import outputs_of
from support.zoo.by_hand import BY_HAND
from support.zoo.huggingface import HUGGING_FACE
from support.zoo.own import OWN
from support.zoo.timm_models import TIMM

ZOO = {**TIMM, **HUGGING_FACE, **OWN, **BY_HAND}
NEEDS = {**dict.fromkeys(TIMM, "timm"), **dict.fromkeys(HUGGING_FACE, "transformers")}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if ZOO[name].slow else name for name in ZOO]
RULES = [SGM(decay=0.5), BPA(), PNA(), TGR(), GuidedBackprop(), Deconvnet()]

# Counted by reading the networks' code: blocks of a ResNet, twice the layers of a transformer, layers of a DenseNet.
SKIPS = {"resnet18": 8, "vit": 6, "swin": 8, "bert": 4, "gpt2": 4, "llama": 4, "t5": 4 + 6, "own_wrn": 6}
SKIPS |= {"densenet121": 6 + 12 + 24 + 16, "transformer_encoder": 4, "own_mobilenetv2": 10, "mambaout": 6}
ATTENTIONS = {"vit": 3, "swin": 4, "bert": 2, "gpt2": 2, "llama": 2, "t5": 2 + 4, "clip_text": 2, "eva02": 3, "deit": 3}
ATTENTIONS |= {"transformer_encoder": 2, "transformer_encoder_module": 2, "vit_hf": 2, "distilbert": 2}
# For each attention: itself, the first layer of an MLP, and one packed or three separate linear layers before it.
REGULARIZED = {"vit": 3 * 3, "swin": 4 * 3, "deit": 3 * 3, "vit_hf": 2 * 5, "distilbert": 2 * 5}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # parts that are out of reach; tested elsewhere


@functools.lru_cache(maxsize=1)
def made(name):
    define_missing_operators()
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return ZOO[name].make(torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", NAMES)
def test_the_rule_acts_or_refuses_by_name(rule, name):
    model, given = made(name)
    architecture = ZOO[name]
    expected = {"sgm": SKIPS, "pna": ATTENTIONS, "tgr": REGULARIZED}.get(rule.name, {}).get(name)
    plain = outputs_of(architecture.call(model, given))
    wanted = [*(tensor for tensor in given.values() if tensor.requires_grad), *model.parameters()]

    def act():
        with rule.attach(model) as attached:
            for _ in range(2):
                outputs = outputs_of(architecture.call(model, given))
                assert all(torch.equal(one, other) for one, other in zip(outputs, plain, strict=True))
                loss = sum(out.square().sum() for out in outputs)
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
                assert all(g.isfinite().all() for g in found if g is not None)
            sites = attached.sites
            with torch.no_grad():
                architecture.call(model, given)
        return sites

    try:
        sites = act()
    except NoSiteError as error:
        refusal = str(error)
        sites = None
    if sites is None:
        assert re.search(rf"\b{rule.name}\b|scripted", refusal)
        assert expected is None, refusal
    else:
        assert len(sites) == (expected or len(sites)) > 0, str(sites)
