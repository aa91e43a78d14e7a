"""Keys and values of the beginning that all prompts of a product share, computed once.

Instructions, product and reference images are two thirds of a prompt and the same for every part. Attention is causal,
so their keys and values do not depend on what follows; positions are handed to the model explicitly, since it would
otherwise count them from the tokens it is given. Kept tensors are copied into each batch and never written to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from saec.vlm.encode import Encoded
from saec.vlm.load import Vlm
from saec.vlm.run import bare, forward

PROVED = frozenset({"qwen2_5_vl", "qwen3_vl", "llava", "smolvlm"})
"""Model types for which a test holds the answers with and without the cache against each other."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """Keys and values [1, heads, tokens, width] of each layer."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    tokens: int


class PrefixCache:
    """The prefixes of one model, the least recently used going first. For one thread at a time."""

    def __init__(self, vlm: Vlm, size: int) -> None:
        self._vlm = vlm
        self._size = size
        self._kept: OrderedDict[bytes, _Prefix] = OrderedDict()
        self._whole_attention = True
        self.hits = 0

    @property
    def usable(self) -> bool:
        """Whether the model's family is known to answer the same with a cached prefix."""
        return self._size > 0 and self._whole_attention and self._vlm.model.config.model_type in PROVED

    def next_token_logits(self, rows: Sequence[Encoded]) -> torch.Tensor | None:
        """Return the logits [B, vocabulary] after each row; ``None`` if the model keeps no plain cache of them all, or
        a row shares nothing."""
        if not all(row.shared for row in rows):
            return None
        prefixes = [self._prefix(row) for row in rows]
        if not self._whole_attention:
            return None
        longest = max(prefix.tokens for prefix in prefixes)
        rests = [_rest(row) for row in rows]
        batch = self._vlm.encoder.collate(rests)
        past = torch.stack([_right(torch.ones(prefix.tokens, dtype=torch.long), longest) for prefix in prefixes])
        batch["attention_mask"] = torch.cat([past, batch["attention_mask"]], dim=1)
        positions = [self._positions(row)[..., row.shared :] for row in rows]
        batch["position_ids"] = _batched(positions)
        return forward(self._vlm, batch, past_key_values=_joined(prefixes, longest), use_cache=True).logits[:, -1]

    def _prefix(self, row: Encoded) -> _Prefix:
        kept = self._kept.pop(row.shared_key, None)
        if kept is None:
            kept = self._compute(row)
        else:
            self.hits += 1
        self._kept[row.shared_key] = kept
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return kept

    def _compute(self, row: Encoded) -> _Prefix:
        head = Encoded(row.ids[: row.shared], row.pictures[: row.shared_pictures], row.shared)
        batch = self._vlm.encoder.collate([head])
        batch["position_ids"] = _batched([self._positions(head)])
        layers = forward(self._vlm, batch, use_cache=True).past_key_values.layers
        # A layer that sees a window only, or a state instead of keys, cannot be cut and joined as is done here.
        self._whole_attention = all(type(layer) is DynamicLayer for layer in layers)
        if not self._whole_attention:
            return _Prefix((), row.shared)
        return _Prefix(tuple((layer.keys, layer.values) for layer in layers), row.shared)

    def _positions(self, row: Encoded) -> torch.Tensor:
        """Return the position ids of a whole row: [L], or [3, L] where images have rows and columns of positions."""
        find = getattr(bare(self._vlm.model).model, "get_rope_index", None)
        if find is None:
            return torch.arange(len(row.ids))
        batch = self._vlm.encoder.collate([row])
        grids = batch.get("image_grid_thw")
        found: torch.Tensor = find(batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=grids)[0][:, 0]
        return found


def _rest(row: Encoded) -> Encoded:
    return Encoded(row.ids[row.shared :], row.pictures[row.shared_pictures :], row.answer_at - row.shared)


def _batched(positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [B, L] or [3, B, L], padded on the left."""
    rows = [each.T if each.ndim == 2 else each for each in positions]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    return padded.permute(2, 0, 1) if padded.ndim == 3 else padded


def _joined(prefixes: Sequence[_Prefix], longest: int) -> DynamicCache:
    """Return one cache for the batch, shorter prefixes padded on the left."""
    cache = DynamicCache()
    for number in range(len(prefixes[0].layers)):
        keys, values = ([_padded(prefix.layers[number][part], longest) for prefix in prefixes] for part in (0, 1))
        cache.update(torch.cat(keys), torch.cat(values), number)
    return cache


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - states.shape[-2]
    return pad(states, (0, 0, missing, 0)) if missing else states


def _right(mask: torch.Tensor, length: int) -> torch.Tensor:
    return pad(mask, (length - len(mask), 0))
