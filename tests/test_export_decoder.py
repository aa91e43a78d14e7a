"""An exported decoder computes what Hugging Face's own classes compute, whatever the form of its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import torch

from export_tiny import KINDS, Runner, export, greedy, logits, tiny
from saec.errors import BadInput
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.contract.signature import Signature
from saec.vlm.export.decoder import DecoderWeights, build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.weights import open_decoder
from saec.vlm.registry import resolve

PROMPT = [5, 17, 300, 8, 8, 41, 2, 119, 64]
TOKENS = 64
CACHE = len(PROMPT) + TOKENS - 1  # full when the last token is computed


def opened(model: torch.nn.Module, folder: Path) -> tuple[DecoderShape, DecoderWeights]:
    model.save_pretrained(folder)
    return open_decoder(folder)


def run(model: torch.nn.Module, folder: Path, **options: object) -> Runner:
    shape, weights = opened(model, folder)
    signature = Signature(shape=shape, **{"cache": CACHE, "n": None, **options})
    table = weights.array("model.embed_tokens.weight")
    return Runner(export(folder / "decoder.onnx", signature, weights), signature, table)


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_the_checkpoint(kind: str, tmp_path: Path):
    model = tiny(kind)
    wanted = logits(model, PROMPT)
    assert np.abs(run(model, tmp_path).feed(PROMPT) - wanted).max() <= 1e-4
    half = run(model, tmp_path, dtype="float16").feed(PROMPT)
    assert half.dtype == np.float16
    assert np.abs(half.astype(np.float32) - wanted).max() <= 2e-2


@pytest.mark.parametrize("kind", ["llama, biases, wide heads, untied", "qwen2, grouped queries, tied"])
@pytest.mark.parametrize("n", [None, 1, 4])
def test_its_64_tokens_are_those_of_the_checkpoint_until_the_cache_is_full(kind: str, n: int | None, tmp_path: Path):
    model = tiny(kind)
    found = run(model, tmp_path, n=n).greedy(PROMPT, TOKENS)
    assert found == greedy(model, PROMPT, TOKENS)
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    "options",
    [
        {"rope": "inputs"},
        {"embeddings": "inside"},
        {"logits": "last"},
        {"style": "genie"},
        {"rope": "inputs", "embeddings": "inside", "logits": "last", "style": "genie"},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("n", [None, 4])
def test_every_option_of_the_signature_computes_the_same(n: int | None, options: dict[str, str], tmp_path: Path):
    model = tiny()
    runner = run(model, tmp_path, n=n, **options)
    assert [value.name for value in runner.session.get_inputs()] == [spec.name for spec in runner.signature.inputs]
    assert [value.name for value in runner.session.get_outputs()] == [spec.name for spec in runner.signature.outputs]
    found, wanted = runner.feed(PROMPT), logits(model, PROMPT)
    steps = [8] if n is None else [3, 7, 8]
    assert np.abs(found - (wanted if runner.signature.logits == "all" else wanted[steps])).max() <= 1e-4


def test_weights_can_be_inside_the_one_file(tmp_path: Path):
    model = tiny()
    beside = run(model, tmp_path)
    _, weights = open_decoder(tmp_path)
    (alone,) = build_decoder(beside.signature, weights, "float32").save(tmp_path / "one.onnx", external=False)
    assert np.array_equal(Runner(alone, beside.signature, beside.table).feed(PROMPT), beside.feed(PROMPT))


def test_positions_beyond_those_of_the_prompt_turn_as_the_checkpoints_base_says(tmp_path: Path):
    far, near = tiny(rope_theta=1e6), tiny(rope_theta=1e2)
    ids = (PROMPT * 8)[:CACHE]
    assert np.abs(logits(far, ids) - logits(near, ids)).max() > 0.1
    for model in (far, near):
        assert np.abs(run(model, tmp_path).feed(ids) - logits(model, ids)).max() <= 1e-4


def test_float16_is_finite_where_squares_and_masks_overflow(tmp_path: Path):
    # Activations of 1e4, as SmolLM2's have in one channel: their squares are beyond 65504.
    model = tiny("qwen2, untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 1e4
        model.model.layers[0].mlp.down_proj.weight[3] *= 1e3
    runner = run(model, tmp_path, dtype="float16", n=4, embeddings="inside")
    found = runner.feed(PROMPT)
    assert np.isfinite(found).all()
    assert all(np.isfinite(states).all() for states in runner.past.values())
    wanted = logits(model, PROMPT)
    assert np.abs(found.astype(np.float32) - wanted).max() <= 5e-3 * np.abs(wanted).max()


def test_a_precision_that_the_graph_does_not_compute_in_is_refused(tmp_path: Path):
    shape, weights = opened(tiny(), tmp_path)
    with pytest.raises(BadInput, match="float32 cannot have weights of float16"):
        build_decoder(Signature(shape=shape, cache=8), weights, "float16")


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 0), ("float16", 1e-3), ("int8", 5e-3), ("int4", 5e-3)])
def test_the_embedding_graph_gives_the_rows_of_the_table(precision: str, allowed: float):
    import onnxruntime as ort

    table = np.random.default_rng(0).normal(size=(320, 64)).astype(np.float32)
    model = build_embedding(table, precision).model().SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for ids in ([3], [319, 0, 3, 3]):
        (found,) = session.run(["inputs_embeds"], {"input_ids": np.array([ids], np.int32)})
        assert found.shape == (1, len(ids), 64)
        assert found.dtype == (np.float16 if precision == "float16" else np.float32)
        assert np.abs(found[0] - table[ids]).max() <= allowed * np.abs(table[ids]).max()


def pulled() -> bool:
    try:
        return bool(resolve("loupe"))
    except BadInput:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not pulled(), reason="saec models pull loupe")
def test_the_real_smollm2_answers_as_transformers_does(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    from saec.vlm.gguf import LlamaGguf

    files = resolve("loupe")
    file = next(path for name, path in files.files.items() if name.endswith(".gguf"))
    text = "<|im_start|>user\nHow are solar cells inspected for cracks? Label: 1<|im_end|>\n<|im_start|>assistant\n"
    ids = LlamaGguf(file).tokenizer().encode(text).ids
    shape, weights = open_decoder(file)
    table = weights.array("model.embed_tokens.weight")
    model = AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=file.name, dtype=torch.float32).eval()
    wanted = logits(model, ids)

    def runner(dtype: str) -> Runner:
        signature = Signature(shape=shape, cache=len(ids) + TOKENS - 1, n=None, dtype=dtype)
        return Runner(export(tmp_path / f"{dtype}.onnx", signature, weights), signature, table)

    assert np.abs(runner("float32").feed(ids) - wanted).max() <= 1e-4
    assert runner("float32").greedy(ids, TOKENS) == greedy(model, ids, TOKENS)
    ours = np.abs(runner("float16").feed(ids).astype(np.float32) - wanted)
    theirs = np.abs(logits(torch.nn.Module.half(model), ids) - wanted)
    # Rounding the weights alone moves logits of up to 38 by 0.04; torch's own float16 is off by 0.2.
    assert ours.max() <= 0.1
    assert ours.max() < theirs.max()
