"""Models of Hugging Face transformers, two blocks each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from support.torchvision_operators import define_missing_operators
from support.zoo.architecture import Architecture

__all__ = ["HUGGING_FACE", "huggingface"]

WIDTH, TOKENS, WORDS = 16, 5, 50
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 20}
IMAGE = {"image_size": 16, "patch_size": 8}
DECODER = {"num_key_value_heads": 1}


def huggingface(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        define_missing_operators()
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def embedded() -> Mapping[str, Tensor]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return {"inputs_embeds": torch.randn(2, TOKENS, WIDTH), "attention_mask": mask}


def words() -> Mapping[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS - 1, (2, TOKENS))}


def images() -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def to_translate() -> Mapping[str, Tensor]:
    return {"inputs_embeds": torch.randn(2, TOKENS, WIDTH), "decoder_inputs_embeds": torch.randn(2, 3, WIDTH)}


HUGGING_FACE: dict[str, Architecture] = {
    # gelu in each block, tanh in the pooler.
    "bert": Architecture(build=huggingface("BertModel", "BertConfig", **SMALL, **TEXT), inputs=embedded, sites=2 + 1),
    # gelu_new, written by hand in a module of its own.
    "gpt2": Architecture(
        build=huggingface("GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=2, n_head=2, **TEXT),
        inputs=embedded,
        sites=2,
    ),
    # silu(gate(x)) * up(x).
    "llama": Architecture(
        build=huggingface("LlamaForCausalLM", "LlamaConfig", **SMALL, **TEXT, **DECODER), inputs=embedded, sites=2
    ),
    # relu in each block of encoder and decoder.
    "t5": Architecture(
        build=huggingface(
            "T5Model", "T5Config", vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        ),
        inputs=to_translate,
        sites=2 + 2,
    ),
    # gelu_new(wi_0(x)) * wi_1(x).
    "t5_gated": Architecture(
        build=huggingface(
            *("T5Model", "T5Config"),
            vocab_size=WORDS,
            d_model=WIDTH,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        inputs=to_translate,
        sites=2 + 2,
    ),
    # gelu in each block, tanh in the pooler.
    "vit_hf": Architecture(build=huggingface("ViTModel", "ViTConfig", **SMALL, **IMAGE), inputs=images, sites=2 + 1),
    # quick_gelu, written by hand in a module of its own.
    "clip_vision": Architecture(
        build=huggingface("CLIPVisionModel", "CLIPVisionConfig", **SMALL, **IMAGE), inputs=images, sites=2
    ),
    "clip_text": Architecture(
        build=huggingface("CLIPTextModel", "CLIPTextConfig", **SMALL, **TEXT), inputs=words, sites=2
    ),
    # gelu in each block, torch.tanh in the head.
    "roberta": Architecture(
        build=huggingface("RobertaForSequenceClassification", "RobertaConfig", **SMALL, **TEXT),
        inputs=embedded,
        sites=2 + 1,
    ),
    # gelu in each block, nn.functional.relu or nn.ReLU in the head.
    "distilbert": Architecture(
        build=huggingface(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            **TEXT,
        ),
        inputs=embedded,
        sites=2 + 1,
    ),
    "qwen2": Architecture(
        build=huggingface("Qwen2ForCausalLM", "Qwen2Config", **SMALL, **TEXT, **DECODER), inputs=embedded, sites=2
    ),
}
