"""Asking a multimodal LLM: P(defect) from one look or several, and evidence in words and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import GenerationConfig

from saec.types import Heatmap, Image
from saec.vlm.answers import Decision
from saec.vlm.encode import Encoded
from saec.vlm.load import Vlm
from saec.vlm.prefix import PrefixCache
from saec.vlm.prompt import Question
from saec.vlm.run import forward, on_device
from saec.vlm.view import cut_map

Asked = Question | Encoded
"""A question, or what :meth:`Encoder.prepare` made of it beforehand."""


def p_defect(vlm: Vlm, questions: Sequence[Asked], *, prefixes: PrefixCache | None = None) -> list[Decision]:
    """Decide a batch in one forward pass (SAEC §3): the softmax over the two labels' logits at the next position.

    ``prefixes`` keeps what the questions of a product have in common from one batch to the next.
    """
    return _decisions(_label_log_probabilities(vlm, questions, prefixes)[None])


def rank(vlm: Vlm, looks: Sequence[Sequence[Asked]], *, prefixes: PrefixCache | None = None) -> list[Decision]:
    """Decide each part from several looks at it, crops (SAEC §5) or mirror images, in one forward pass for each look.

    The log-probabilities of the answers ``Label: 0`` and ``Label: 1`` are averaged over the looks, and P(defect) is the
    softmax of the two means: the larger wins at 0.5. Both answers begin with the same tokens, whose log-probabilities
    cancel in that softmax, so only the label's own token is scored.
    """
    views = zip(*looks, strict=True)
    return _decisions(torch.stack([_label_log_probabilities(vlm, view, prefixes) for view in views]))


def five_crops(question: Question, side: int) -> tuple[Question, ...]:
    """Return the question about the four corners and the centre of the part, at most ``side`` pixels wide and high."""
    width, height = question.seen
    across, down = min(side, width), min(side, height)
    right, bottom = width - across, height - down
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return tuple(_cropped(question, (x, y, x + across, y + down)) for x, y in corners)


def mirrored(question: Question, count: int) -> tuple[Question, ...]:
    """Return the question about the part and its mirror images: 2 adds the part turned by half, 4 both mirrors too."""
    axes: tuple[tuple[int, ...], ...] = ((), (0, 1), (1,), (0,))
    return tuple(_flipped(question, each) for each in axes[:count])


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


def _label_log_probabilities(vlm: Vlm, asked: Sequence[Asked], prefixes: PrefixCache | None) -> torch.Tensor:
    """Return the log-probabilities [B, 2] of ``0`` and ``1``, in float64 on the CPU."""
    with torch.inference_mode():
        logits = _next_token_logits(vlm, asked, prefixes).float()
        found = logits[:, list(vlm.encoder.label_tokens)] - logits.logsumexp(dim=1, keepdim=True)
        return found.double().cpu()


def _next_token_logits(vlm: Vlm, asked: Sequence[Asked], prefixes: PrefixCache | None) -> torch.Tensor:
    encoder = vlm.encoder
    rows = [encoder.prepare(one) if isinstance(one, Question) else one for one in asked]
    if prefixes is not None and prefixes.usable:
        logits = prefixes.next_token_logits(rows)
        if logits is not None:
            return logits
    return forward(vlm, encoder.collate(rows)).logits[:, -1]


def _decisions(log_probabilities: torch.Tensor) -> list[Decision]:
    """Return the decisions from log-probabilities [views, B, 2]."""
    mass = log_probabilities.exp().sum(dim=2).mean(dim=0).clamp(max=1.0)
    p = log_probabilities.mean(dim=0).softmax(dim=1)[:, 1]
    return [Decision(*values) for values in zip(p.tolist(), mass.tolist(), strict=True)]


def _flipped(question: Question, axes: tuple[int, ...]) -> Question:
    part = np.ascontiguousarray(np.flip(question.part, axes))
    heatmap = None if question.anomaly_map is None else np.ascontiguousarray(np.flip(question.anomaly_map, axes))
    return _showing(question, part, heatmap)


def _cropped(question: Question, corners: tuple[int, int, int, int]) -> Question:
    x1, y1, x2, y2 = corners
    part = question.part[y1:y2, x1:x2]
    heatmap = None if question.anomaly_map is None else cut_map(question.anomaly_map, corners, question.seen)
    return _showing(question, part, heatmap)


def _showing(question: Question, part: Image, heatmap: Heatmap | None) -> Question:
    content = (*question.content[:-2], part, question.content[-1])
    seen = (part.shape[1], part.shape[0])
    return replace(question, content=content, part=part, seen=seen, anomaly_map=heatmap)
