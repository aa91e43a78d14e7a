"""A tiny random VLM as a bundle, made on the spot: decoder, embedding, a trivial vision graph, byte-level BPE.

    folder = save_bundle(tmp_path / "tiny")
    OnnxVlm.load(folder, threads=1)

Made with the exporter's own builders, so ``onnx`` is needed to make it and nothing heavy to run it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saec.vlm.contract.bundle import (
    DECODER,
    EMBEDDING,
    TOKENIZER,
    VISION,
    Bundle,
    Precision,
    Preprocess,
    Prompt,
    Vision,
    write_bundle,
)
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.contract.signature import Signature, TensorSpec
from saec.vlm.export.decoder import build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Blocks4, SidePath

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "You are a visual quality inspector on a production line.",
    "Does this part have a defect? Answer with one digit and nothing else: 1 for a defect, 0 for a good part.",
    *["Label: 0 Label: 1 user\n assistant\n system\n"] * 4,
)
TOKENS = 4
"""Visual tokens of one image: quarters of a square of 8 pixels."""


class RandomWeights:
    """Weights by name, drawn when they are asked for, the same at each time."""

    def __init__(self, shape: DecoderShape, *, seed: int = 0) -> None:
        self._shape, self._seed = shape, seed

    def array(self, name: str) -> np.ndarray:
        shape, part = self._shape, name.removesuffix(".weight").split(".")[-1]
        kv = shape.kv_heads * shape.head_dim
        wide, hidden = shape.intermediate_size, shape.hidden_size
        sizes: dict[str, tuple[int, ...]] = {
            "embed_tokens": (shape.vocab_size, hidden),
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
        }
        if part not in sizes:
            return np.ones(hidden, np.float32)
        rng = np.random.default_rng([self._seed, *name.encode()])
        scale = 1.0 if part == "embed_tokens" else 1.5 * sizes[part][1] ** -0.5
        return (scale * rng.standard_normal(sizes[part])).astype(np.float32)

    def blocks(self, name: str) -> Blocks4 | None:
        return None

    def side(self, name: str) -> SidePath | None:
        return None


def tiny_tokenizer() -> Tokenizer:
    """Return a byte-level BPE with control tokens, in which digits are tokens of their own."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def tiny_signature(tokenizer: Tokenizer, **how: Any) -> Signature:
    shape = DecoderShape(
        family="llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_positions=1024,
        rope_theta=10_000.0,
        rms_eps=1e-5,
    )
    return Signature(shape=shape, **{"cache": 511, "n": None, "logits": "last", **how})


def tiny_vision(hidden: int) -> tuple[Graph, Vision]:
    """Return a graph that makes a token of each quarter of a square of 8 pixels, and its description."""
    spec = TensorSpec(name="pixel_values", shape=(1, 3, 8, 8), dtype="float32")
    graph = Graph("vision")
    quarters = graph.op("Reshape", graph.input(spec), graph.ints(1, TOKENS, 48))
    projection = np.random.default_rng(7).standard_normal((48, hidden)).astype(np.float32)
    embeds = graph.op("MatMul", quarters, graph.weight("projection", projection))
    graph.output(TensorSpec(name="image_embeds", shape=(1, TOKENS, hidden), dtype="float32"), embeds)
    half = (0.5, 0.5, 0.5)
    how = Preprocess(side=8, place="centre", fill=(0, 0, 0), mean=half, std=half)
    return graph, Vision(inputs=(spec,), tokens=TOKENS, preprocess=how)


def save_bundle(
    folder: Path,
    *,
    seed: int = 0,
    precision: Precision = "float32",
    template: str | None = CHAT,
    ends: tuple[str, ...] = ("<|im_end|>",),
    **signature: Any,
) -> Path:
    """Write a tiny bundle into a folder and return it; the same arguments make the same bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    made = tiny_signature(tokenizer, **signature)
    weights = RandomWeights(made.shape, seed=seed)
    build_decoder(made, weights, precision).save(folder / DECODER)
    build_embedding(weights.array("model.embed_tokens.weight"), precision).save(folder / EMBEDDING)
    graph, vision = tiny_vision(made.shape.hidden_size)
    graph.save(folder / VISION)
    tokenizer.save(str(folder / TOKENIZER))
    ids = tokenizer.get_vocab()
    prompt = Prompt(
        image_token=ids["<image>"],
        labels=(ids["0"], ids["1"]),
        ends=tuple(ids[end] for end in ends),
        template=template,
    )
    bundle = Bundle(
        name="tiny",
        family="llava",
        model_id=f"tiny-{seed}@{precision}+p2",
        fingerprint=f"{seed:02d}" * 32,
        precision=precision,
        signature=made,
        vision=vision,
        prompt=prompt,
    )
    write_bundle(folder, bundle)
    return folder
