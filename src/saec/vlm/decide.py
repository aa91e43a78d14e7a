"""Asking a multimodal LLM: P(defect) from one look or several, and evidence in words and boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from saec.vlm.answers import Decision
from saec.vlm.encode import Encoded
from saec.vlm.load import Vlm
from saec.vlm.looks import decisions
from saec.vlm.prefix import PrefixCache
from saec.vlm.prompt import Question
from saec.vlm.run import forward, on_device

Asked = Question | Encoded
"""A question, or what :meth:`Encoder.prepare` made of it beforehand."""


def p_defect(vlm: Vlm, questions: Sequence[Asked], *, prefixes: PrefixCache | None = None) -> list[Decision]:
    """Decide a batch in one forward pass (SAEC §3): the softmax over the two labels' logits at the next position.

    ``prefixes`` keeps what the questions of a product have in common from one batch to the next.
    """
    return decisions(_label_log_probabilities(vlm, questions, prefixes)[None])


def rank(vlm: Vlm, looks: Sequence[Sequence[Asked]], *, prefixes: PrefixCache | None = None) -> list[Decision]:
    """Decide each part from several looks at it, crops (SAEC §5) or mirror images, in one forward pass for each look.

    The log-probabilities of the answers ``Label: 0`` and ``Label: 1`` are averaged over the looks, and P(defect) is the
    softmax of the two means: the larger wins at 0.5. Both answers begin with the same tokens, whose log-probabilities
    cancel in that softmax, so only the label's own token is scored.
    """
    views = zip(*looks, strict=True)
    return decisions(np.stack([_label_log_probabilities(vlm, view, prefixes) for view in views]))


def generate_evidence(vlm: Vlm, questions: Sequence[Question], *, max_tokens: int = 256) -> list[str]:
    """Return the model's greedy answers to evidence questions, cut off after ``max_tokens`` tokens."""
    generation = vlm.model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    tokenizer = vlm.encoder.tokenizer
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    # The checkpoint's own settings fill in what is not said here; a repetition penalty would forbid valid JSON.
    how = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        batch = on_device(vlm, vlm.encoder.encode(questions))
        answers = vlm.model.generate(**batch, generation_config=how)[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _label_log_probabilities(vlm: Vlm, asked: Sequence[Asked], prefixes: PrefixCache | None) -> NDArray[np.float64]:
    """Return the log-probabilities [B, 2] of ``0`` and ``1``."""
    with torch.inference_mode():
        logits = _next_token_logits(vlm, asked, prefixes).float()
        found = logits[:, list(vlm.encoder.label_tokens)] - logits.logsumexp(dim=1, keepdim=True)
        return np.asarray(found.double().cpu().numpy())


def _next_token_logits(vlm: Vlm, asked: Sequence[Asked], prefixes: PrefixCache | None) -> torch.Tensor:
    encoder = vlm.encoder
    rows = [encoder.prepare(one) if isinstance(one, Question) else one for one in asked]
    if prefixes is not None and prefixes.usable:
        logits = prefixes.next_token_logits(rows)
        if logits is not None:
            return logits
    return forward(vlm, encoder.collate(rows)).logits[:, -1]
