"""The torch arm of :mod:`saec.evaluate.bench_vlm`: the same model through Hugging Face classes, as a cloud runs it."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from saec.config import MllmSettings
from saec.vlm.decide import generate_evidence, p_defect
from saec.vlm.load import load_vlm
from saec.vlm.prompt import Question, ask_evidence
from saec.vlm.run import on_device

_TOWERS = ("vision_tower", "vision_model", "visual")


class Torch:
    """See :class:`saec.evaluate.bench_vlm_arm.Arm`."""

    def __init__(self, settings: MllmSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._vlm = load_vlm(settings)
        self.model_id = self._vlm.model_id
        self._entered = self._vision_ms = 0.0
        towers = [module for name, module in self._vlm.model.named_modules() if name.split(".")[-1] in _TOWERS]
        towers[0].register_forward_pre_hook(self._enter)
        towers[0].register_forward_hook(self._leave)

    def decide(self, question: Question) -> tuple[float, float]:
        """Return P(defect) and the milliseconds in the vision tower."""
        (decision,) = p_defect(self._vlm, [question])
        return decision.p_defect, self._vision_ms

    def evidence(self, question: Question, *, again: bool, max_tokens: int) -> object:
        """Answer the question for evidence; nothing of an earlier question about the picture is used."""
        return generate_evidence(self._vlm, [ask_evidence(question)], max_tokens=max_tokens)

    def decode_ms(self, question: Question, tokens: int) -> float | None:
        """Return the milliseconds of one token of an answer of so many, without its first."""
        clock = _Clock()
        how = GenerationConfig(
            min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=self._vlm.encoder.padding
        )
        with torch.inference_mode():
            batch = on_device(self._vlm, self._vlm.encoder.encode([ask_evidence(question)]))
            self._vlm.model.generate(**batch, generation_config=how, streamer=clock)
        _prompt, first, *_, last = clock.times
        return (last - first) * 1e3 / (tokens - 1)

    def _enter(self, *_: Any) -> None:
        self._entered = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._vision_ms = (time.perf_counter() - self._entered) * 1e3


class _Clock:
    """A streamer (``transformers.generation.streamers``) that notes when the prompt and each token after it came by."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return
