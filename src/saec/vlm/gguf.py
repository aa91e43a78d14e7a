"""Llama-family checkpoints out of one GGUF file: configuration, weights, tokenizer. No torch.

Weights get the names that Hugging Face's ``LlamaForCausalLM`` uses. llama.cpp stores the rows of the query and key
projections with the two halves of each rotary pair interleaved; here they are put back into halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from saec.errors import BadInput
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.export.linear import BLOCK, Array, Blocks4, SidePath

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
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # GGUF's token type of <|im_start|> and its like
_HALF = np.dtype("<f2")


class LlamaGguf:
    """One open GGUF file of the Llama architecture; its weights are read as they are asked for.

    Raises:
        BadInput: the file is not GGUF, damaged, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = GGUFReader(path)
            architecture = self._field("general.architecture")
            if architecture != "llama":
                what = f"a GGUF file of architecture {architecture}"
                raise BadInput(what, where=path, fix="llama is what is read here")
            self._tensors = {_hugging_face(tensor.name): tensor for tensor in self._reader.tensors}
            self.shape = self._shape()
        except (OSError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            raise BadInput(f"not a readable GGUF file ({error})", where=path, fix="pull the model again") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What weights there are, and their shapes."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def weights(self) -> Iterator[tuple[str, Array]]:
        """Yield (Hugging Face's name, float32 array), dequantised one at a time."""
        for name in self._tensors:
            yield name, self.array(name)

    def array(self, name: str) -> Array:
        """Return a weight, dequantised to float32.

        Raises:
            BadInput: the file has no such weight.
        """
        tensor = self._tensor(name)
        return self._halves(name, np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32))

    def blocks(self, name: str) -> Blocks4 | None:
        """Return a matrix as the 4-bit blocks that it is stored in: Q4_1 has a minimum a block, Q4_0 is -8 d.

        Raises:
            BadInput: the file has no such weight.
        """
        tensor = self._tensor(name)
        kind = tensor.tensor_type
        if kind not in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
            return None
        head = 2 if kind == GGMLQuantizationType.Q4_0 else 4
        stored = tensor.data.reshape(len(tensor.data), -1, head + BLOCK // 2)
        figures = stored[..., :head].copy().view(_HALF).astype(np.float32)
        scale = figures[..., 0]
        minimum = -8 * scale if head == 2 else figures[..., 1]
        low, high = stored[..., head:] & 15, stored[..., head:] >> 4  # elements 0 to 15, 16 to 31
        values = np.concatenate([low, high], axis=-1)
        # A block of equal values has scale 0, by which nobody can divide: it gets another, and its values are all 0.
        flat = scale == 0
        scale = np.where(flat, np.where(minimum == 0, 1, np.abs(minimum)), scale)
        values[flat] = 0
        quants = values[..., 0::2] | (values[..., 1::2] << 4)
        return Blocks4(*(self._halves(name, part) for part in (quants, scale, minimum)))

    def side(self, name: str) -> SidePath | None:
        """Return nothing: part of what a decoder is built from."""
        return None

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

    @property
    def end(self) -> int | None:
        """The token that ends an answer, if the file names it."""
        found: int | None = self._field("tokenizer.ggml.eos_token_id", None)
        return found

    @property
    def chat_template(self) -> str | None:
        """The chat template (Jinja), if the file holds one."""
        found: str | None = self._field("tokenizer.chat_template", None)
        return found

    def _shape(self) -> DecoderShape:
        heads, hidden = int(self._field("llama.attention.head_count")), int(self._field("llama.embedding_length"))
        width = int(self._field("llama.attention.key_length", hidden // heads))
        scaling = self._field("llama.rope.scaling.type", "none")
        turned = self._field("llama.rope.dimension_count", width)
        if scaling != "none" or turned != width:
            what = f"rotary positions of scaling {scaling} on {turned} of {width} dimensions"
            raise BadInput(f"the file has {what}, which are not read here", where=self._path)
        return DecoderShape(
            family="llama",
            vocab_size=int(self._field("llama.vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(self._field("llama.feed_forward_length")),
            layers=int(self._field("llama.block_count")),
            heads=heads,
            kv_heads=int(self._field("llama.attention.head_count_kv")),
            head_dim=width,
            max_positions=int(self._field("llama.context_length")),
            rope_theta=float(self._field("llama.rope.freq_base")),
            rms_eps=float(self._field("llama.attention.layer_norm_rms_epsilon")),
            tied="lm_head.weight" not in self._tensors,
        )

    def _field(self, name: str, *default: Any) -> Any:
        field = self._reader.get_field(name)
        if field is None and not default:
            raise KeyError(f"no {name}")
        return default[0] if field is None else field.contents()

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise BadInput(f"the file lacks {name}", where=self._path, fix="pull the model again")
        return self._tensors[name]

    def _halves(self, name: str, weight: NDArray[Any]) -> NDArray[Any]:
        """Put a projection's interleaved rotary rows [.., pair, 2] back into halves [.., 2, pair], head by head."""
        heads = {"q_proj.weight": self.shape.heads, "k_proj.weight": self.shape.kv_heads}.get(name.split(".", 4)[-1])
        if heads is None:
            return weight
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)


def _hugging_face(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in _BLOCK:
        return name  # whoever needs all weights to be known will find that this is not
    return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"
