"""A multimodal LLM of a few thousand weights for the training tests: its tokens are characters, its tower is a matrix.

As a program it trains on a folder in a process of its own, so that a test can kill it: ``train_tiny.py DIR [seconds]``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from saec.train.config import TrainSettings, load_train_settings
from saec.train.loop import train
from saec.vlm.encode import Encoded, Encoder
from saec.vlm.load import Vlm
from saec.vlm.prompt import Question

SIDE, IMAGE, PAD, END = 8, 1, 0, 2


class TinyModel(nn.Module):
    """Attributes as LLaVA has them; the vision tower also holds a ``q_proj``, which LoRA must leave alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=PAD,
        )
        self.config = config
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(SIDE * SIDE, 16)})
        self.projector = nn.Linear(16, 32)
        self.language_model = LlamaForCausalLM(config)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, logits_to_keep: int = 0, **kwargs: Any
    ) -> Any:
        words = self.language_model.get_input_embeddings()(input_ids)
        seen = self.projector(torch.tanh(self.vision_tower["q_proj"](pixel_values)))
        words = torch.where((input_ids == IMAGE)[..., None], seen[:, None], words)
        return self.language_model(
            inputs_embeds=words, attention_mask=attention_mask, logits_to_keep=logits_to_keep, use_cache=False
        )


class TinyEncoder(Encoder):
    """One image token, the product's name, the question's first letter; then the answer's characters."""

    tokenizer = None
    label_tokens = (ord("0"), ord("1"))
    padding = PAD

    def prepare(self, question: Question, answer: str | None = None) -> Encoded:
        prompt = [IMAGE, *map(ord, f"{question.product}{question.ask.value[0]}{question.prefill}")]
        reply = [] if answer is None else [*(min(ord(c), 127) for c in answer), END]
        small = cv2.resize(question.part, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., 0]
        pixels = torch.tensor(small.reshape(1, -1) / 255.0 - 0.5).float()
        return Encoded(torch.tensor(prompt + reply), ({"pixel_values": pixels},), len(prompt))


def load_tiny(settings: TrainSettings) -> Vlm:
    """The same untrained model each time."""
    return Vlm(TinyModel(), TinyEncoder(), "tiny", None)


class Slow:
    """Waits after each step, so that there is time to kill the process in."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def said(self, text: str) -> None:
        print(text, flush=True)

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        print(f"step {step} of {total}", flush=True)
        time.sleep(self.seconds)


def settings_for(*overrides: str) -> TrainSettings:
    return load_train_settings(preset="tiny", overrides=["lora_dropout=0.1", "train_projector=true", *overrides])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    train(
        settings_for("epochs=3"),
        folder / "train.jsonl",
        folder / "val.jsonl",
        folder / "killed",
        load=load_tiny,
        watcher=Slow(float(sys.argv[2])),
    )
