"""Llama-family checkpoints out of one GGUF file: configuration, dequantised weights, tokenizer. No torch.

Weights get the names that Hugging Face's ``LlamaForCausalLM`` uses. llama.cpp stores the rows of the query and key
projections with the two halves of each rotary pair interleaved; here they are put back into halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from saec.errors import BadInput

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_CONTROL = 3  # GGUF's token type of <|im_start|> and its like


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The figures of a Llama-family decoder, as its GGUF header has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rope_theta: float
    rms_eps: float


class LlamaGguf:
    """One open GGUF file of the Llama architecture with tied embeddings.

    Raises:
        BadInput: the file is not GGUF, damaged, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = GGUFReader(path)
            architecture = self._field("general.architecture")
            if architecture != "llama":
                what = f"a GGUF file of architecture {architecture}"
                raise BadInput(what, where=path, fix="llama is what is read here")
            self.shape = self._shape()
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise BadInput(f"not a readable GGUF file ({error})", where=path, fix="pull the model again") from None

    def weights(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield (Hugging Face's name, float32 array), dequantised one at a time."""
        for tensor in self._reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            name = _TOP.get(tensor.name) or self._block_name(tensor.name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _halves(values, self.shape.heads if "q_proj" in name else self.shape.kv_heads)
            yield name, values

    def tokenizer(self) -> Tokenizer:
        """Return the byte-level BPE tokenizer; digits are tokens of their own, control tokens are special."""
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        made.decoder = decoders.ByteLevel()
        types: list[int] = self._field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return made

    def _shape(self) -> LlamaShape:
        return LlamaShape(
            vocab_size=int(self._field("llama.vocab_size")),
            hidden_size=int(self._field("llama.embedding_length")),
            intermediate_size=int(self._field("llama.feed_forward_length")),
            layers=int(self._field("llama.block_count")),
            heads=int(self._field("llama.attention.head_count")),
            kv_heads=int(self._field("llama.attention.head_count_kv")),
            context=int(self._field("llama.context_length")),
            rope_theta=float(self._field("llama.rope.freq_base")),
            rms_eps=float(self._field("llama.attention.layer_norm_rms_epsilon")),
        )

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise KeyError(f"no {name}")
        return field.contents()

    @staticmethod
    def _block_name(name: str) -> str:
        _, number, part, kind = name.split(".")
        return f"model.layers.{number}.{_BLOCK[part]}.{kind}"


def _halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put interleaved rotary rows [.., pair, 2] back into halves [.., 2, pair], head by head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
