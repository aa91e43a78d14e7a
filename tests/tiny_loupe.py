"""A tiny random Loupe of the real class, and a tiny GGUF file, built on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from saec.vlm.load import Vlm
from saec.vlm.loupe.encode import LoupeEncoder
from saec.vlm.loupe.model import Loupe, LoupeConfig
from tiny_vlms import bpe_tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": 0.15,
}


def tokenizer() -> Tokenizer:
    """Byte-level BPE with Loupe's control tokens first."""
    return bpe_tokenizer(CONTROL, end="<|im_end|>", pad="<|endoftext|>").backend_tokenizer


def tiny_loupe(*, seed: int = 0) -> Vlm:
    """Return a random Loupe that sees 56 x 56 pixels as 2 x 2 tokens."""
    words = tokenizer()
    size = words.get_vocab_size()
    config = LoupeConfig(
        image_side=56,
        tower_layers=(1, 2),
        image_token_id=words.token_to_id("<image>"),
        text_config={**TEXT, "vocab_size": size, "eos_token_id": 2, "pad_token_id": 2},
        vision_config=dict(VISION),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Loupe(config).eval()
    return Vlm(model, LoupeEncoder(words, config), "tiny-loupe", fingerprint="f" * 64)


def bare(vlm: Vlm) -> Vlm:
    """Return the model with weights of its own: training wraps it in place."""
    twin = tiny_loupe()
    twin.model.load_state_dict(vlm.model.state_dict())
    return replace(vlm, model=twin.model)


def write_gguf(
    path: Path, *, architecture: str = "llama", packed: GGMLQuantizationType | None = None
) -> LlamaForCausalLM:
    """Write a random Llama as llama.cpp's converter would, matrices ``packed`` if asked; return the model."""
    words = tokenizer()
    size = words.get_vocab_size()
    config = LlamaConfig(**TEXT, vocab_size=size)
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(path, architecture)
    writer.add_vocab_size(size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(words.token_to_id("<|im_end|>"))
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in CONTROL else 1 for token, _ in vocabulary])
    writer.add_token_merges(_merges(words))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = _interleaved(name, tensor.numpy(), config)
        if packed is not None and weight.ndim == 2:
            writer.add_tensor(_name(name), quantize(weight, packed), raw_dtype=packed)
        else:
            writer.add_tensor(_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _merges(words: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]]


_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, number, *part = name.removesuffix(".weight").split(".")
    return f"blk.{number}.{_PARTS['.'.join(part)]}.weight"


def _interleaved(name: str, weight: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Interleave the halves of each head's rotary pairs, as llama.cpp's ``permute`` does."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    if count is None:
        return weight
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )
