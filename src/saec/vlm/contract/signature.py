"""The signature of a decoder graph with a fixed KV cache: names, shapes and types of all inputs and outputs.

Derived from the decoder's shape here and nowhere else; exporter, validator, renaming and runtime share it
(``edge_vlm.md``, "Decoder graph with a fixed KV cache").
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from saec.vlm.contract.shape import DecoderShape

Style = Literal["dot", "genie"]
"""How cache tensors are called: ``past_key_values.3.key`` / ``present.3.key``, or ``past_key_3_in`` / ``…_out``."""

FloatType = Literal["float32", "float16"]
Dim = int | str


class TensorSpec(BaseModel):
    """One input or output: ``shape`` with a name where a dimension is free, ``dtype`` as numpy calls it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[Dim, ...]
    dtype: str


class Signature(BaseModel):
    """A decoder that takes ``n`` new tokens on top of a cache of ``cache`` tokens.

    ``n`` is ``None`` for a free graph, which takes any number of new tokens and a cache of any length up to ``cache``,
    none included: what CPUs are served with, since attention then costs what is there and not what could be. Devices
    want every dimension fixed. ``rope`` and ``embeddings`` say whether positions' sines and cosines, and the embedding
    of token ids, are computed in the graph or handed in. ``logits`` of all new tokens, or of the last one only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: DecoderShape
    cache: int = Field(gt=0)
    n: int | None = Field(1, gt=0)
    dtype: FloatType = "float32"
    style: Style = "dot"
    rope: Literal["inside", "inputs"] = "inside"
    embeddings: Literal["outside", "inside"] = "outside"
    logits: Literal["all", "last"] = "all"

    @property
    def context(self) -> int:
        """Tokens of a conversation at most: those in the cache and those that come in with the last step."""
        return self.cache + (self.n or 1)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in the graph's order."""
        n, _, context = self._dims
        shape = self.shape
        first = (
            TensorSpec(name="input_ids", shape=(1, n), dtype="int32")
            if self.embeddings == "inside"
            else TensorSpec(name="inputs_embeds", shape=(1, n, shape.hidden_size), dtype=self.dtype)
        )
        mask = TensorSpec(name="attention_mask", shape=(1, 1, n, context), dtype=self.dtype)
        half = (1, n, shape.head_dim // 2)
        positions = (
            (TensorSpec(name="position_ids", shape=(1, n), dtype="int32"),)
            if self.rope == "inside"
            else tuple(TensorSpec(name=f"position_ids_{part}", shape=half, dtype=self.dtype) for part in ("cos", "sin"))
        )
        return (first, mask, *positions, *self.past)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, in the graph's order."""
        n, _, _ = self._dims
        rows: Dim = 1 if self.logits == "last" else n
        return (TensorSpec(name="logits", shape=(1, rows, self.shape.vocab_size), dtype=self.dtype), *self.present)

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The cache: of each layer keys [1, KV, D, cache], transposed, and values [1, KV, cache, D]."""
        return self._kv("past", self._dims[1])

    @property
    def present(self) -> tuple[TensorSpec, ...]:
        """Keys and values of the new tokens only: [1, KV, D, n] and [1, KV, n, D]."""
        return self._kv("present", self._dims[0])

    @property
    def _dims(self) -> tuple[Dim, Dim, Dim]:
        """New tokens, cache, context."""
        return ("n", "cache", "context") if self.n is None else (self.n, self.cache, self.context)

    def _kv(self, when: Literal["past", "present"], length: Dim) -> tuple[TensorSpec, ...]:
        heads, width = self.shape.kv_heads, self.shape.head_dim
        found = []
        for layer in range(self.shape.layers):
            for part, shape in (("key", (1, heads, width, length)), ("value", (1, heads, length, width))):
                found.append(TensorSpec(name=kv_name(self.style, when, layer, part), shape=shape, dtype=self.dtype))
        return tuple(found)


def kv_name(style: Style, when: Literal["past", "present"], layer: int, part: str) -> str:
    """Return what a cache tensor is called; ``part`` is ``key`` or ``value``."""
    if style == "genie":
        return f"past_{part}_{layer}_{'in' if when == 'past' else 'out'}"
    return f"{'past_key_values' if when == 'past' else 'present'}.{layer}.{part}"
