"""ProxProp on blocks of GPT-2 and Llama: every linear layer takes its proximal step, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backpass import ProxProp, list_sites
from support.torchvision_operators import define_missing_operators
from support.zoo.huggingface import HUGGING_FACE

# Two blocks of each; the linear layers of a block, by reading the code.
LAYERS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


@pytest.fixture(params=LAYERS)
def network(request):
    """The model in double precision, its inputs, and the paths of the linear layers of its blocks."""
    define_missing_operators()
    pytest.importorskip("transformers")
    model, given = HUGGING_FACE[request.param].make(torch.float64)
    paths = [f"{BLOCKS[request.param]}.{n}.{layer}" for n in range(2) for layer in LAYERS[request.param]]
    return model, given, paths


def rows_and_gradients(model, given, paths) -> dict[str, tuple[Tensor, Tensor]]:
    """The input rows of each layer and the gradient at its output, from a plain backward pass with hooks."""
    rows, gradients = {}, {}

    def keep(path):
        def hook(module, args, out):
            rows[path] = args[0].detach().flatten(0, -2)
            out.register_hook(lambda grad: gradients.__setitem__(path, grad.flatten(0, -2)))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    loss(model, given).backward()
    for handle in handles:
        handle.remove()
    return {path: (rows[path], gradients[path]) for path in paths}


def loss(model, given):
    logits = model(**given).logits
    return logits.log_softmax(-1)[..., 0].sum().neg()


def dense(module: nn.Module, rows: Tensor, gradient: Tensor, tau: float) -> dict[str, Tensor]:
    """(A^T A + I / tau)^{-1} A^T g with a column of ones for the bias, in the layout of the module's weight."""
    biased = getattr(module, "bias", None) is not None
    A = torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if biased else rows
    damped = A.T @ A + torch.eye(A.shape[1], dtype=A.dtype) / tau
    D = torch.linalg.solve(damped, A.T @ gradient)
    weight = D[:-1] if biased else D
    found = {"weight": weight.T if isinstance(module, nn.Linear) else weight}
    return {**found, "bias": D[-1]} if biased else found


def in_blocks(paths):
    return lambda site: site.module in paths


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_every_linear_layer_takes_the_step_of_the_dense_solve(network, tau):
    model, given, paths = network
    kept = rows_and_gradients(model, given, paths)
    plain = model(**given).logits.detach()
    model.zero_grad()
    with ProxProp(tau=tau, damping="sum", where=in_blocks(paths)).attach(model) as attached:
        assert torch.equal(model(**given).logits, plain)
        loss(model, given).backward()
    assert sorted(site.module for site in attached.sites) == sorted(paths)
    for path in paths:
        module = model.get_submodule(path)
        for name, expected in dense(module, *kept[path], tau).items():
            found = getattr(module, name).grad
            assert found.shape == getattr(module, name).shape
            assert (found - expected).norm() <= 1e-8 * expected.norm(), f"{path}.{name}"


def test_what_flows_down_is_the_plain_gradient(network):
    model, given, paths = network

    def others():
        model.zero_grad()
        x = given["inputs_embeds"].detach().requires_grad_()
        loss(model, {**given, "inputs_embeds": x}).backward()
        untouched = {k: p.grad for k, p in model.named_parameters() if k.rpartition(".")[0] not in paths}
        return [x.grad, *[grad for grad in untouched.values() if grad is not None]]

    expected = others()
    with ProxProp(tau=0.1, where=in_blocks(paths)).attach(model):
        found = others()
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_of_linear_sites_shows_them_all(network):
    model, given, paths = network
    table = list_sites(model, kind="linear", **given)
    assert set(paths) <= {site.module for site in table}
    head = [site for site in table if site.module == "lm_head"]
    assert len(head) == 1
