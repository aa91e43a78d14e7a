"""What a multimodal LLM feels and says about a batch of questions: features at its two adapters, and its verdicts.

Both places are read at the language model's decoder, where every family agrees: what goes in at the image's tokens is
what the projector (the query adapter) made of it, what comes out at the prompt's tokens is the last hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saec.vlm.load import Vlm
from saec.vlm.run import bare, forward


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A batch as one model sees it. One tensor [tokens, width] float32 a row, without padding.

    ``query`` are the visual tokens of the part's own image, which is the last one of a prompt: the last unbroken run of
    image tokens (of a tiled image, the view of the whole). ``language`` are the last hidden states of the whole prompt;
    the last one is what the answer comes of. ``log_p`` [B, 3] are the log-probabilities of the answers "0", "1", and
    anything else, which any two vocabularies have in common.
    """

    query: Sequence[Tensor]
    language: Sequence[Tensor]
    log_p: Tensor

    def to(self, device: torch.device) -> Seen:
        """Return the same on a device."""
        query, language = ([row.to(device) for row in rows] for rows in (self.query, self.language))
        return Seen(query, language, self.log_p.to(device))


def look(vlm: Vlm, batch: Mapping[str, Tensor]) -> Seen:
    """Run a model over questions that are padded on the left, as :meth:`Encoder.collate` pads them for an answer."""
    with _tapped(vlm.model) as tap:
        logits = forward(vlm, batch).logits[:, -1].float()
    whole = batch["attention_mask"].bool()
    shown = _last_runs(batch["input_ids"] == bare(vlm.model).config.image_token_id)
    return Seen(_rows(tap["in"], shown), _rows(tap["out"], whole), _outcomes(logits, vlm.encoder.label_tokens))


@contextmanager
def _tapped(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what goes into the decoder and what comes out, [B, L, width] each."""
    decoder = bare(model).get_decoder()
    decoder = getattr(decoder, "model", decoder)  # of a language model with its head, the part before the head
    tap: dict[str, Tensor] = {}

    def enters(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        tap["in"] = inputs["inputs_embeds"]

    def leaves(_: nn.Module, __: Any, output: Any) -> None:
        tap["out"] = output.last_hidden_state

    handles = (decoder.register_forward_pre_hook(enters, with_kwargs=True), decoder.register_forward_hook(leaves))
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def _rows(states: Tensor, places: Tensor) -> list[Tensor]:
    return [row[place].float() for row, place in zip(states, places.to(states.device), strict=True)]


def _last_runs(marked: Tensor) -> Tensor:
    """Keep of each row of ``marked`` [B, L] the last unbroken run only."""
    behind = marked.flip(1).int()
    run = (behind.diff(dim=1, prepend=behind.new_zeros(len(behind), 1)) == 1).cumsum(1)  # runs begun, from the end
    return marked & (run == 1).flip(1)


def _outcomes(logits: Tensor, labels: tuple[int, int]) -> Tensor:
    rest = logits.clone()
    rest[:, list(labels)] = -torch.inf
    outcomes = torch.cat([logits[:, list(labels)], rest.logsumexp(1, keepdim=True)], dim=1)
    return outcomes.log_softmax(1)
