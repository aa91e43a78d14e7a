"""The runtime of a decoder with a fixed KV cache, on tiny random graphs."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")

from saec.errors import BadInput
from saec.vlm.contract.signature import Signature
from saec.vlm.edge import session as session_module
from saec.vlm.edge.kv import GRAIN
from saec.vlm.edge.session import ContextFull, Decoder
from saec.vlm.export.decoder import build_decoder
from tiny_bundle import RandomWeights, tiny_signature, tiny_tokenizer


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory):
    """Makes decoders of the same random weights with different signatures, each once."""
    root, tokenizer, made = tmp_path_factory.mktemp("decoders"), tiny_tokenizer(), {}

    def make(precision: str = "float32", **how: object) -> Decoder:
        key = repr((precision, sorted(how.items())))
        if key not in made:
            signature = tiny_signature(tokenizer, **how)
            file = root / f"{len(made)}.onnx"
            build_decoder(signature, RandomWeights(signature.shape), precision).save(file)
            made[key] = Decoder(file, signature, threads=1)
        return made[key]

    return make


def words(count: int, *, seed: int = 0) -> np.ndarray:
    """Embeddings of some tokens, [count, 32]."""
    return np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)


def at_once(decoder: Decoder, embeds: np.ndarray) -> np.ndarray:
    return decoder.open().feed(embeds)


def by_hand(signature: Signature, embeds: np.ndarray) -> np.ndarray:
    """The same decoder in numpy, in float64 and without any cache: logits [V] after the last token."""
    shape, weights = signature.shape, RandomWeights(signature.shape)

    def w(name: str) -> np.ndarray:
        return weights.array(name).astype(np.float64)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.rms_eps)

    n, d = len(embeds), shape.head_dim
    angles = np.arange(n)[:, None] * shape.rope_theta ** -(np.arange(0, d, 2) / d)
    turn = np.exp(1j * angles)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = embeds.astype(np.float64)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        q, k, v = ((norm(x) @ w(f"{at}.self_attn.{part}_proj.weight").T).reshape(n, -1, d) for part in ("q", "k", "v"))
        group = shape.heads // shape.kv_heads
        k, v = np.repeat(rotate(k), group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", rotate(q), k) / np.sqrt(d)
        scores = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf))
        seen = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(n, -1)
        x = x + seen @ w(f"{at}.self_attn.o_proj.weight").T
        gate, up = (norm(x) @ w(f"{at}.mlp.{part}_proj.weight").T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w(f"{at}.mlp.down_proj.weight").T
    return norm(x)[-1] @ w("model.embed_tokens.weight").T


def test_the_logits_are_those_of_the_decoder_written_out_in_numpy(decoder_of):
    decoder, embeds = decoder_of(), words(40)
    assert at_once(decoder, embeds) == pytest.approx(by_hand(decoder.signature, embeds), abs=1e-3)


def test_chunks_one_go_and_token_by_token_give_the_same_logits(decoder_of, monkeypatch):
    decoder, embeds = decoder_of(), words(300)
    wanted = at_once(decoder, embeds)  # three chunks
    talk = decoder.open()
    for row in embeds:
        logits = talk.feed(row[None])
    assert logits == pytest.approx(wanted, abs=1e-4)
    monkeypatch.setattr(session_module, "CHUNK", 1000)
    assert at_once(decoder, embeds) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_fixed_graph_of_eight_tokens_pads_and_answers_as_one_of_one_token(decoder_of, logits):
    eight, one, free = (decoder_of(n=n, cache=64, logits=logits) for n in (8, 1, None))
    for count in (1, 7, 8, 9, 21):
        embeds = words(count)
        wanted = at_once(one, embeds)
        assert at_once(eight, embeds) == pytest.approx(wanted, abs=1e-4)
        assert at_once(free, embeds) == pytest.approx(wanted, abs=1e-4)


def test_padding_leaves_nothing_in_the_cache(decoder_of):
    decoder, embeds = decoder_of(n=8, cache=64), words(30)
    talk = decoder.open()
    for start, end in ((0, 3), (3, 4), (4, 15), (15, 30)):
        logits = talk.feed(embeds[start:end])
    assert talk.length == 30
    assert logits == pytest.approx(at_once(decoder, embeds), abs=1e-4)


@pytest.mark.parametrize("n", [None, 1, 8])
def test_the_context_can_be_filled_to_its_last_token_and_one_more_is_refused(decoder_of, n):
    decoder = decoder_of(n=n, cache=24)
    context = decoder.signature.context
    full = decoder.open()
    full.feed(words(context))
    assert full.length == context
    with pytest.raises(ContextFull, match=f"{context + 1} tokens do not fit into the model's context of {context}"):
        full.feed(words(1))
    with pytest.raises(BadInput):
        decoder.open().feed(words(context + 1))


def test_a_refused_feed_leaves_the_conversation_as_it_was(decoder_of):
    decoder, embeds = decoder_of(cache=24), words(20)
    talk = decoder.open()
    talk.feed(embeds[:10])
    with pytest.raises(ContextFull):
        talk.feed(words(16))
    assert talk.length == 10
    assert talk.feed(embeds[10:]) == pytest.approx(at_once(decoder, embeds), abs=1e-4)


def test_a_free_graphs_cache_grows_with_the_conversation(decoder_of):
    talk = decoder_of().open()
    rooms = []
    for row in words(GRAIN + 1):
        talk.feed(row[None])
        rooms.append(talk._cache.room)
    assert sorted(set(rooms)) == [GRAIN, 2 * GRAIN]


def test_a_saved_beginning_never_changes_and_two_that_continue_it_do_not_meet(decoder_of):
    decoder, beginning, a, b = decoder_of(), words(20), words(12, seed=1), words(12, seed=2)
    talk = decoder.open()
    talk.feed(beginning)
    saved = talk.keep()
    before = saved.keys.tobytes(), saved.values.tobytes()
    one, other = decoder.open(saved), decoder.open(saved)
    for row_a, row_b in zip(a, b, strict=True):  # interleaved
        logits_a, logits_b = one.feed(row_a[None]), other.feed(row_b[None])
    assert logits_a == pytest.approx(at_once(decoder, np.concatenate([beginning, a])), abs=1e-4)
    assert logits_b == pytest.approx(at_once(decoder, np.concatenate([beginning, b])), abs=1e-4)
    assert (saved.keys.tobytes(), saved.values.tobytes()) == before
    for states in (saved.keys, saved.values):
        with pytest.raises(ValueError, match="read-only"):
            states[:] = 0


def test_a_fork_goes_its_own_way_from_any_token(decoder_of):
    decoder, embeds, other = decoder_of(), words(20), words(5, seed=3)
    talk = decoder.open()
    talk.feed(embeds)
    fork = talk.fork(8)
    assert fork.feed(other) == pytest.approx(at_once(decoder, np.concatenate([embeds[:8], other])), abs=1e-4)
    more = words(1, seed=4)
    assert talk.feed(more) == pytest.approx(at_once(decoder, np.concatenate([embeds, more])), abs=1e-4)


def test_half_precision_runs_through_the_same_runtime(decoder_of):
    half = decoder_of("float16", dtype="float16", n=1, cache=31)
    embeds = words(12)
    wanted = at_once(decoder_of(n=1, cache=31), embeds)
    found = at_once(half, embeds)
    assert found.dtype == np.float32
    assert found == pytest.approx(wanted, abs=0.15)
    assert not np.array_equal(found, wanted)


def test_a_graph_that_wants_other_inputs_than_the_runtime_has_is_refused(decoder_of):
    with pytest.raises(BadInput, match="takes token ids or rotations"):
        decoder_of(rope="inputs")


def test_a_damaged_graph_is_one_line(tmp_path):
    file = tmp_path / "decoder.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(BadInput, match="not a usable ONNX model") as caught:
        Decoder(file, tiny_signature(tiny_tokenizer()), threads=1)
    assert "\n" not in str(caught.value)
