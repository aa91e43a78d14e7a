"""Tiny random decoders of the real Hugging Face classes, exported on the spot, and the plainest loop that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from saec.vlm.contract.bundle import Precision
from saec.vlm.contract.signature import Signature
from saec.vlm.export.decoder import METADATA, DecoderWeights, build_decoder, rotary_tables

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # the usual 0.02 makes a random model answer the same to everything
}
KINDS = {
    "llama, grouped queries, tied": (4, 2, {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama, biases, wide heads, untied": (4, 1, {"attention_bias": True, "head_dim": 24, "rms_norm_eps": 1e-5}),
    "llama, a key a query": (2, 2, {"tie_word_embeddings": False}),
    "qwen2, grouped queries, tied": (6, 2, {"tie_word_embeddings": True, "rope_theta": 1e6, "hidden_size": 96}),
    "qwen2, untied": (4, 2, {"tie_word_embeddings": False}),
}


def tiny(kind: str = "qwen2, grouped queries, tied", *, seed: int = 0, **more: Any) -> Any:
    """A random model with all its weights and biases away from their usual 0 and 1."""
    heads, kv, own = KINDS[kind]
    sizes = {**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv, **own, **more}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta", 1e4)}
    config, model = (LlamaConfig, LlamaForCausalLM) if kind.startswith("llama") else (Qwen2Config, Qwen2ForCausalLM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config(**sizes)).eval()
        for name, values in made.named_parameters():
            if values.ndim == 1:
                torch.nn.init.normal_(values, mean=float("norm" in name), std=0.2)
    return made


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What Hugging Face's own loop answers."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


def logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def export(file: Path, signature: Signature, weights: DecoderWeights, precision: Precision | None = None) -> Path:
    graph = build_decoder(signature, weights, precision or signature.dtype)
    graph.save(file, metadata={METADATA: signature.model_dump_json()})
    return file


class Runner:
    """Feeds tokens through a decoder and keeps its cache in plain arrays, as slowly and plainly as can be."""

    def __init__(self, file: Path, signature: Signature, table: np.ndarray) -> None:
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.signature, self.table = signature, table.astype(signature.dtype)
        self.position = 0
        room = 0 if signature.n is None else signature.cache
        dims = {"cache": room}
        self.past = {
            spec.name: np.zeros([dims.get(str(dim), dim) for dim in spec.shape], spec.dtype) for spec in signature.past
        }

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [n, V] of all tokens, or [1, V] of the last of each step; fixed graphs step by n."""
        step = self.signature.n or len(ids)
        return np.concatenate([self._step(ids[at : at + step]) for at in range(0, len(ids), step)])

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        made = [int(self.feed(prompt)[-1].argmax())]
        while len(made) < tokens:
            made.append(int(self.feed(made[-1:])[-1].argmax()))
        return made

    def _step(self, ids: Sequence[int]) -> np.ndarray:
        signature, real = self.signature, len(ids)
        n = signature.n or real
        first = n - real if signature.logits == "last" else 0  # padding goes where it is not the last row
        rows = slice(first, first + real)
        padded, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        padded[rows], positions[rows] = ids, np.arange(self.position, self.position + real)
        room = next(iter(self.past.values())).shape[3]
        mask = np.zeros((1, 1, n, room + n), signature.dtype)
        mask[0, 0, rows, : self.position] = 1
        mask[0, 0, rows, room + first : room + first + real] = np.tri(real)
        feed = {"attention_mask": mask, **self.past}
        if signature.embeddings == "inside":
            feed["input_ids"] = padded[None]
        else:
            feed["inputs_embeds"] = self.table[padded][None]
        if signature.rope == "inside":
            feed["position_ids"] = positions[None]
        else:
            cos, sin = (part[positions][None].astype(signature.dtype) for part in rotary_tables(signature))
            feed |= {"position_ids_cos": cos, "position_ids_sin": sin}
        found = self.session.run([spec.name for spec in signature.outputs], feed)
        for index, (spec, new) in enumerate(zip(signature.past, found[1:], strict=True)):
            axis = 2 if index % 2 else 3  # keys are transposed
            self._keep(spec.name, np.take(new, range(n)[rows], axis=axis), axis)
        self.position += real
        return found[0][0, rows] if signature.logits == "all" else found[0][0]

    def _keep(self, name: str, new: np.ndarray, axis: int) -> None:
        if self.signature.n is None:
            self.past[name] = np.concatenate([self.past[name], new], axis=axis)
            return
        left = self.signature.cache - self.position  # what comes in with the last step needs no place
        new = np.take(new, range(min(new.shape[axis], left)), axis=axis)
        np.moveaxis(self.past[name], axis, 0)[self.position :][: new.shape[axis]] = np.moveaxis(new, axis, 0)
