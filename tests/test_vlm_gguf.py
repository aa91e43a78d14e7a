"""A GGUF file gives the very weights, figures and tokens of the checkpoint that it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the cloud extra is not installed")
pytest.importorskip("gguf", reason="the cloud extra is not installed")

import torch

from saec.errors import BadInput
from saec.vlm.gguf import LlamaGguf
from tiny_loupe import TEXT, tokenizer, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_the_weights_are_those_of_the_checkpoint_rotary_rows_in_halves(file):
    path, model = file
    found = dict(LlamaGguf(path).weights())
    wanted = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_figures_come_from_the_header(file):
    shape = LlamaGguf(file[0]).shape
    assert (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads) == (64, 2, 4, 2)
    assert shape.intermediate_size == TEXT["intermediate_size"]
    assert shape.rope_theta == 1e5 and shape.rms_eps == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["Label: 1", "12 cells, <|im_end|> naïve", "a dark spot on the part", ""])
def test_the_tokenizer_splits_as_the_original_does_but_for_digits(file, text: str):
    ours, theirs = LlamaGguf(file[0]).tokenizer(), tokenizer()
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert [t for t in ours.encode(text).tokens if t in ("<|im_end|>",)] == [
        t for t in theirs.encode(text).tokens if t in ("<|im_end|>",)
    ]
    assert all(len(token) == 1 for token in ours.encode(text).tokens if any(c.isdigit() for c in token))


def test_another_architecture_is_refused_by_name(tmp_path: Path):
    write_gguf(tmp_path / "odd.gguf", architecture="falcon")
    with pytest.raises(BadInput, match=r"architecture falcon.*odd\.gguf"):
        LlamaGguf(tmp_path / "odd.gguf")


@pytest.mark.parametrize("keep", [0, 3, 400])
def test_a_file_that_was_cut_off_is_refused_with_its_path(file, tmp_path: Path, keep: int):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file[0].read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"GGUF.*cut\.gguf"):
        LlamaGguf(cut)
