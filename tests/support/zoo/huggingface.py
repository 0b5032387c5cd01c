"""Models of Hugging Face transformers, two blocks each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from support.straight_through import straight_through
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


def sequence() -> Mapping[str, Tensor]:
    return {"inputs_embeds": torch.randn(2, TOKENS, WIDTH)}


def sound() -> Mapping[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def squared_relus_rewritten(model: nn.Module, start: int, stop: int | None) -> Callable[..., Any]:
    """The network with ``square(relu(x))`` straight-through from ``start``."""

    def rewritten(**given: Tensor) -> Any:
        numbers, square, relu = itertools.count(), torch.square, torch.relu

        def of_relu(x: Tensor) -> Tensor:
            selected = start <= next(numbers) < (math.inf if stop is None else stop)
            return straight_through(x, lambda z: square(relu(z))) if selected else square(relu(x))

        with patch.object(torch, "relu", lambda x: x), patch.object(torch, "square", of_relu):
            return model(**given)

    return rewritten


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
    # In each block square(relu(x)); the receptances are gates, which are used after a loop over the tokens. The
    # attention is a softmax by hand, token by token.
    "rwkv": Architecture(
        build=huggingface(
            *("RwkvForCausalLM", "RwkvConfig"),
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            attention_hidden_size=WIDTH,
            intermediate_size=24,
            use_cache=False,
        ),
        inputs=sequence,
        sites=2,
        reference=squared_relus_rewritten,
        unreachable=frozenset(f"rwkv.blocks.{n}.attention" for n in range(2)),
    ),
    # gelu in each block; the first layers compute functions of the embedding, a parameter.
    "falcon": Architecture(
        build=huggingface(
            *("FalconForCausalLM", "FalconConfig"),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=WORDS,
        ),
        inputs=words,
        sites=2,
    ),
    # In each block silu after the convolution, whose value is expanded in one product and enters a layer; softplus of
    # the step size, and silu of the gate.
    "mamba": Architecture(
        build=huggingface(
            *("MambaForCausalLM", "MambaConfig"),
            vocab_size=WORDS,
            hidden_size=WIDTH,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=2,
            use_mambapy=False,
        ),
        inputs=sequence,
        sites=2 * 3,
    ),
    # silu in the MLP of the first block, in the routed experts and in the shared one of the second; the router's
    # sigmoids, which are gathered, weigh the experts.
    "deepseek_v3": Architecture(
        build=huggingface(
            *("DeepseekV3ForCausalLM", "DeepseekV3Config"),
            **SMALL,
            **TEXT,
            num_key_value_heads=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=8,
            first_k_dense_replace=1,
            experts_implementation="eager",
        ),
        inputs=sequence,
        sites=1 + 2 + 1,
        gate_functions=("sigmoid",),
    ),
    # In each block silu after the convolution, and in the gated normalization; the step sizes softplus(dt) are gates.
    "mamba2": Architecture(
        build=huggingface(
            *("Mamba2ForCausalLM", "Mamba2Config"),
            vocab_size=WORDS,
            hidden_size=WIDTH,
            state_size=4,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            n_groups=1,
            chunk_size=4,
        ),
        inputs=sequence,
        sites=2 * 2,
        gate_functions=("softplus",),
    ),
    # silu in the convolution and the normalization of the linear attention, softplus in its decay; its other sigmoid
    # is a gate, which is padded before. silu in two experts of each block, and in the shared one.
    "qwen3_next": Architecture(
        build=huggingface(
            *("Qwen3NextForCausalLM", "Qwen3NextConfig"),
            **SMALL,
            **TEXT,
            **DECODER,
            head_dim=8,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            num_experts=2,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
            experts_implementation="eager",
        ),
        inputs=sequence,
        sites=3 + 2 * 3,
        gate_functions=("sigmoid",),
    ),
    # gelu in each MLP, and beside the recurrence of two blocks, which has sigmoids as gates and a root whose derivative
    # is limited by an autograd function.
    "recurrent_gemma": Architecture(
        build=huggingface(
            *("RecurrentGemmaModel", "RecurrentGemmaConfig"),
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            lru_width=WIDTH,
            attention_window_size=16,
        ),
        inputs=sequence,
        sites=2 * 2 + 1,
        gate_functions=("sigmoid", "softplus"),
        unreachable=frozenset(f"layers.{layer}.temporal_block.rg_lru" for layer in range(2)),
    ),
    "bloom": Architecture(
        build=huggingface("BloomModel", "BloomConfig", vocab_size=WORDS, hidden_size=WIDTH, n_layer=2, n_head=2),
        inputs=sequence,
        sites=2,
        elementwise=("BloomGelu",),
    ),
    # gelu after two convolutions, after that of the positions, whose value is a part of a tensor, and in each block.
    "wavlm": Architecture(
        build=huggingface(
            *("WavLMModel", "WavLMConfig"),
            **SMALL,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ),
        inputs=sound,
        sites=2 + 1 + 2,
        gate_functions=("sigmoid",),
    ),
    # gelu, relu in the MLP of the position bias, and the sigmoid of its value, in each block.
    "swinv2_hf": Architecture(
        build=huggingface(
            *("Swinv2Model", "Swinv2Config"),
            image_size=16,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=2,
        ),
        inputs=images,
        sites=2 * 3,
    ),
}
