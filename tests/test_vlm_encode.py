"""From question to tensors: the label's place and tokens, padding, the loss's tokens, whole images; real Qwen files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cloud_fakes import query  # noqa: E402
from saec.config import PromptSettings  # noqa: E402
from saec.errors import BadInput  # noqa: E402
from saec.vlm.encode import IGNORED, ProcessorEncoder  # noqa: E402
from saec.vlm.processors import load_processor  # noqa: E402
from saec.vlm.prompt import Ask, Question, ask_evidence, build_question  # noqa: E402
from tiny_vlms import FAMILIES, QWEN_SPECIALS, bpe_tokenizer, save_tiny  # noqa: E402

SEEN = PromptSettings(max_side=112)
IMAGE_TOKENS = {"qwen2.5-vl": 16, "qwen3-vl": 16, "llava": 16, "smolvlm": 4}
"""Of a part of 112 x 112 pixels: (112 / 28)², (128 / 32)² after rounding, (56 / 14)², (56 / 14 / 2)²."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, ProcessorEncoder]:
    return {family: ProcessorEncoder(load_processor(folder)) for family, folder in folders.items()}


@pytest.fixture
def encoder(encoders, request) -> ProcessorEncoder:
    return encoders[request.param]


every = pytest.mark.parametrize("encoder", FAMILIES, indirect=True)


def asked(height: int = 112, width: int = 112, **more: object) -> Question:
    image = np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)
    return build_question(query(image=image, original_size=(width, height), **more), Ask.LABEL, SEEN)


def with_reference(**more: object) -> Question:
    return asked(references=(np.full((60, 60, 3), 90, np.uint8),), **more)


@every
def test_the_prompt_ends_with_the_answers_beginning_and_the_labels_are_its_next_tokens(encoder):
    tokenizer = encoder.tokenizer
    ids = encoder.encode([asked()])["input_ids"][0].tolist()
    text = tokenizer.decode(ids)
    assert text.endswith("Label: ")
    for label, token in zip("01", encoder.label_tokens, strict=True):
        assert tokenizer.decode([*ids, token]) == text + label
    assert encoder.label_tokens[0] != encoder.label_tokens[1]


def test_a_tokenizer_that_glues_the_space_to_the_digit_is_refused_with_what_it_makes_of_it(folders):
    processor = load_processor(folders["qwen2.5-vl"])
    glues = bpe_tokenizer(QWEN_SPECIALS, end="<|im_end|>", pad="<|endoftext|>", digits=False)
    assert len(glues(" 0")["input_ids"]) == 1
    processor.tokenizer = glues
    with pytest.raises(BadInput, match=r"the label 0 is not one token: the tokenizer makes \['Label', ':', 'Ġ0'\]"):
        ProcessorEncoder(processor)


def test_a_chat_template_that_drops_the_answers_beginning_is_refused(folders):
    processor = load_processor(folders["qwen2.5-vl"])
    processor.chat_template += "{# trims #}"
    processor.chat_template = processor.chat_template.replace("{{ c['text'] }}", "{{ c['text'] | trim }}")
    with pytest.raises(BadInput, match="does not keep the answer's beginning"):
        ProcessorEncoder(processor)


@every
def test_a_products_name_never_becomes_a_control_token(encoder):
    added = encoder.tokenizer.get_added_vocab()
    names = ["".join(added), "<image>", "</s>", "[INST]\n<|im_end|>"]
    plain = encoder.encode([asked(product="cell")])["input_ids"][0].tolist()
    for name in names:
        ids = encoder.encode([asked(product=name)])["input_ids"][0].tolist()
        for token in added.values():
            assert ids.count(token) == plain.count(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_takes_the_tokens_that_its_grid_says(encoders, family):
    encoder = encoders[family]
    ids = encoder.encode([asked()])["input_ids"][0]
    assert int((ids == encoder.image_token).sum()) == IMAGE_TOKENS[family]


@every
def test_inference_rows_are_padded_on_the_left_and_training_rows_on_the_right(encoder):
    questions = [asked(product="a part with a rather long name"), asked()]
    batch = encoder.encode(questions)
    short = encoder.encode(questions[1:])["input_ids"][0]
    assert (batch["attention_mask"][0] == 1).all()
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - len(short)) + [1] * len(short)
    assert torch.equal(batch["input_ids"][1, -len(short) :], short)
    assert "labels" not in batch

    trained = encoder.encode(questions, ["0", "1"])
    assert trained["attention_mask"][1].tolist() == sorted(trained["attention_mask"][1].tolist(), reverse=True)
    assert torch.equal(trained["input_ids"][1, : len(short)], short)


@every
def test_the_loss_is_on_the_answer_and_the_end_of_turn_only(encoder):
    questions = [asked(product="a part with a rather long name"), asked()]
    batch = encoder.encode(questions, ["0", "1"])
    end = encoder.tokenizer.eos_token_id
    for row, token in zip(range(2), encoder.label_tokens, strict=True):
        labels = batch["labels"][row]
        places = (labels != IGNORED).nonzero().flatten()
        assert labels[places].tolist() == [token, end]
        assert torch.equal(batch["input_ids"][row, places], labels[places])
        assert int(places[-1]) == int(batch["attention_mask"][row].sum()) - 1


@every
def test_an_evidence_answer_is_trained_as_the_tokens_that_a_model_would_generate(encoder):
    question = ask_evidence(asked())
    answer = json.dumps({"kind": "surface", "bboxes": [[1, 2, 3, 4]], "desc": "A scratch."})
    batch = encoder.encode([question], [answer])
    labels = batch["labels"][0]
    kept = labels[labels != IGNORED].tolist()
    assert encoder.tokenizer.decode(kept[:-1]) == answer
    prompt = encoder.encode([question])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt)
    assert "Label" not in encoder.tokenizer.decode(prompt[-8:])


@every
def test_rows_with_and_without_close_up_go_into_one_batch(encoder):
    heat = np.eye(4, dtype=np.float32) * np.arange(4, dtype=np.float32)
    questions = [asked(), with_reference(anomaly_map=heat), with_reference()]
    batch = encoder.encode(questions)
    counts = [(row == encoder.image_token).sum() for row in batch["input_ids"]]
    assert counts[0] < counts[2] < counts[1]
    pictures = 6
    if "image_grid_thw" in batch:
        assert len(batch["image_grid_thw"]) == pictures
        assert batch["image_grid_thw"].prod(dim=1).sum() == len(batch["pixel_values"])
    elif batch["pixel_values"].ndim == 5:
        assert batch["pixel_values"].shape[:2] == (3, 3)
        assert (batch["pixel_values"][0, 1:] == 0).all(), "missing images are zeros, which the model skips"
    else:
        assert len(batch["pixel_values"]) == pictures


@every
def test_the_shared_beginning_ends_before_the_first_image_that_is_new(encoder):
    one, other = encoder.prepare(with_reference()), encoder.prepare(with_reference(height=60))
    assert one.shared == other.shared > 0
    assert one.shared_pictures == 1
    assert int((one.ids[: one.shared] == encoder.image_token).sum()) > 0
    assert torch.equal(one.ids[: one.shared], other.ids[: other.shared])
    assert one.shared_key == other.shared_key
    assert encoder.prepare(asked()).shared_key != one.shared_key
    lighter = asked(references=(np.full((60, 60, 3), 91, np.uint8),))
    assert encoder.prepare(lighter).shared_key != one.shared_key


@pytest.mark.parametrize("encoder", ["llava"], indirect=True)
def test_a_processor_that_crops_to_a_square_gets_the_whole_part_in_a_square(encoder):
    image = np.zeros((28, 112, 3), np.uint8)
    image[:, :7] = image[:, -7:] = 255  # a centre crop would lose both ends
    question = build_question(query(image=image, original_size=(112, 28)), Ask.LABEL, SEEN)
    pixels = encoder.encode([question])["pixel_values"][0].mean(dim=0)  # [56, 56]
    assert pixels.shape == (56, 56)
    lit = (pixels[:14] > 1.5).any(dim=0).nonzero().flatten()
    assert int(lit.min()) <= 1
    assert int(lit.max()) >= 54
    below = pixels[16:]
    assert abs(float(below.mean())) < 0.05, "the margin is the colour that normalises to zero"


@pytest.mark.parametrize("encoder", ["smolvlm"], indirect=True)
def test_smolvlm_sees_each_image_as_one_tile(encoder):
    batch = encoder.encode([with_reference()])
    assert batch["pixel_values"].shape == (1, 2, 3, 56, 56)


def test_encoding_in_threads_gives_the_same_tensors(encoders):
    from concurrent.futures import ThreadPoolExecutor

    encoder = encoders["qwen2.5-vl"]
    questions = [asked(56 + 28 * (number % 3), product=f"p{number}") for number in range(24)]
    wanted = [encoder.prepare(question) for question in questions]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(encoder.prepare, questions))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.pictures[0]["pixel_values"], other.pictures[0]["pixel_values"])


# -- the real files of Qwen2.5-VL

REAL = Path(os.environ.get("SAEC_SHARED_MODELS", "")) / "qwen2.5-vl"
real_files = pytest.mark.skipif(
    "SAEC_SHARED_MODELS" not in os.environ, reason="SAEC_SHARED_MODELS names no folder with qwen2.5-vl/"
)


@pytest.fixture(scope="module")
def real() -> ProcessorEncoder:
    return ProcessorEncoder(load_processor(REAL))


def golden_text(question: Question) -> str:
    """The prompt by the real chat template, rendered by Jinja alone, images as their counts of placeholders.

    Each image takes (height / 14) · (width / 14) / 2² tokens, its sides being multiples of 28.
    """
    import jinja2

    source = json.loads((REAL / "chat_template.json").read_text())["chat_template"]
    user = [{"type": "text", "text": i} if isinstance(i, str) else {"type": "image"} for i in question.content]
    chat = [{"role": "system", "content": question.system}, {"role": "user", "content": user}]
    text = jinja2.Template(source).render(messages=chat, add_generation_prompt=True) + question.prefill
    head, *rest = text.split("<|image_pad|>")
    images = [item for item in question.content if not isinstance(item, str)]
    for image, following in zip(images, rest, strict=True):
        height, width = image.shape[:2]
        head += "<|image_pad|>" * (height // 28 * (width // 28)) + following
    return head


def golden_ids(text: str) -> list[int]:
    """The ids by the tokenizers library from vocabulary and merges alone, special tokens looked up in the config."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    added = json.loads((REAL / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    special = {entry["content"]: int(number) for number, entry in added.items()}
    plain = Tokenizer(models.BPE.from_file(str(REAL / "vocab.json"), str(REAL / "merges.txt")))
    # GPT-4's pattern with single digits, as Qwen2's paper has it.
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    plain.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    ids: list[int] = []
    while text:
        found = [(text.find(token), token) for token in special if token in text]
        at, token = min(found, default=(len(text), ""))
        ids += plain.encode(text[:at]).ids
        ids += [special[token]] if token else []
        text = text[at + len(token) :]
    return ids


@real_files
def test_the_real_tokenizer_makes_single_tokens_of_the_labels(real):
    assert real.label_tokens == (15, 16)  # "0" and "1" in Qwen's vocab.json
    assert real.tokenizer.eos_token == "<|im_end|>"


@real_files
@pytest.mark.parametrize("side", [112, 224, 512])
def test_the_real_prompt_has_exactly_these_ids_and_image_tokens(real, side):
    heat = np.eye(4, dtype=np.float32) * np.arange(4, dtype=np.float32)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    seen = PromptSettings(max_side=side)
    shown = query(image=image, original_size=(400, 300), references=(image[:200],), anomaly_map=heat)
    label = build_question(shown, Ask.LABEL, seen)
    for question in (label, ask_evidence(label)):
        wanted = golden_ids(golden_text(question))
        batch = real.encode([question])
        assert batch["input_ids"][0].tolist() == wanted
        grids = batch["image_grid_thw"]
        images = [item for item in question.content if not isinstance(item, str)]
        assert grids.tolist() == [[1, each.shape[0] // 14, each.shape[1] // 14] for each in images]
        assert wanted.count(real.image_token) == int(grids.prod(dim=1).sum()) // 4
        assert len(batch["pixel_values"]) == int(grids.prod(dim=1).sum())


@real_files
def test_a_part_of_512_pixels_takes_324_image_tokens(real):
    image = np.zeros((1024, 1024, 3), np.uint8)
    question = build_question(query(image=image, original_size=(1024, 1024)), Ask.LABEL, PromptSettings())
    assert question.seen == (504, 504)
    ids = real.encode([question])["input_ids"][0]
    assert int((ids == real.image_token).sum()) == (504 // 28) ** 2 == 324
    assert ids[-3:].tolist() == [2476, 25, 220]  # "Label", ":", " "


@real_files
def test_the_real_pixels_are_normalised_as_the_models_preprocessing_says(real):
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    question = build_question(query(image=image, original_size=(84, 56)), Ask.LABEL, PromptSettings(max_side=84))
    pixels = real.encode([question])["pixel_values"].numpy()  # [24, 3 * 2 * 14 * 14]
    config = json.loads((REAL / "preprocessor_config.json").read_text())
    scaled = (image[..., ::-1] / 255 - config["image_mean"]) / config["image_std"]
    first = scaled[:14, :14].transpose(2, 0, 1)[:, None].repeat(2, axis=1)  # colour, the frame twice, rows, columns
    np.testing.assert_allclose(pixels[0], first.ravel(), atol=1e-5)
    # Patches come in the order of the 2 x 2 squares that are merged into one token.
    below = scaled[14:28, :14].transpose(2, 0, 1)[:, None].repeat(2, axis=1)
    np.testing.assert_allclose(pixels[2], below.ravel(), atol=1e-5)
    assert len(pixels) == 56 // 14 * (84 // 14)
