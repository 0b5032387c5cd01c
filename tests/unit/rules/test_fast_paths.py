"""torch's fused paths of transformers: with a rule the output is the plain model's to the bit, or an error."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from backpass import BackpassError, LinBP, ProxProp

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}


def encoder(nested, activation="relu", norm_first=False):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


class Classifier(nn.Module):
    """The encoder inside a larger model, with activations of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(8, 8), encoder(True), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        x = self.encoder(torch.tanh(self.embed(x)), src_key_padding_mask=mask)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention has a fused path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        x, _ = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.head(torch.relu(x))


MODELS = {
    "nested tensors": lambda: encoder(True),
    "fused": lambda: encoder(False),
    "fused gelu": lambda: encoder(False, "gelu"),
    "norm first": lambda: encoder(False, norm_first=True),
    "inside": Classifier,
    "attention": Attention,
}
CALL = {"nested tensors": "src_key_padding_mask", "fused": "src_key_padding_mask", "fused gelu": "src_key_padding_mask"}


@pytest.mark.parametrize("rule", [LinBP(), LinBP(start=-1), ProxProp(tau=0.1)], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore::UserWarning")
def test_the_output_is_the_plain_models_or_an_error(name, mode, masked, rule):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    twin = copy.deepcopy(model)
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    named = {}
    if masked:
        named = {CALL.get(name, "src_key_padding_mask" if name == "norm first" else "mask"): mask}
    with mode():
        expected = twin(x, **named)
        try:
            with rule.attach(model):
                found = model(x, **named)
        except BackpassError:
            found = None
        assert found is None or torch.equal(found, expected)
        assert torch.equal(model(x, **named), expected)  # and nothing stays behind


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_at_least_with_gradients_it_is_no_error():
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(3, 5, 8)
    with LinBP(start=-1).attach(model) as attached:
        model(x).sum().backward()
    assert [site.module for site in attached.sites] == ["encoder.layers.1"]
