"""Tiny random models of the real classes, with tokenizer and processor built on the spot, as checkpoint folders.

    folder = save_tiny("qwen2.5-vl", tmp_path / "tiny-qwen")
    vlm = load_vlm(MllmSettings(model=str(folder), dtype="float32"))

All widths are multiples of 64, as NF4 wants them. The files are named as in the hub's repositories.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saec.config import MllmSettings
from saec.vlm import prompt
from saec.vlm.adapter import save_adapter
from saec.vlm.load import load_vlm

T.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # threads cost these models more than they bring

FAMILIES = ("qwen2.5-vl", "qwen3-vl", "llava", "smolvlm")
"""Not FastVLM: its vision tower comes from timm, which needs torchvision."""

NEEDS_TIMM = "FastVLM's vision tower is timm's, and timm needs torchvision"

QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As LLaVA-1.5's: all images first, then all texts.
LLAVA_CHAT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SMOL_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
LLAVA_SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
SMOL_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
    *("<fake_token_around_image>", "<image>", "<global-img>"),
)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # the usual 0.02 makes a random model answer the same to everything
}
VISION = {"hidden_size": 64, "intermediate_size": 128}


def save_tiny(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny random model of a family with its processor's files into ``folder`` and return it."""
    make = {"qwen2.5-vl": _qwen25, "qwen3-vl": _qwen3, "llava": _llava, "smolvlm": _smolvlm}[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, tokenizer, processor, chat = make()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat}))
    image_processor = processor.pop("image_processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor | processor, indent=1))
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    return folder


def save_tiny_adapter(base: Path, folder: Path, *, seed: int = 1, strength: float = 0.3, **lora: Any) -> Path:
    """Write a random LoRA adapter on the language model of the checkpoint ``base`` into ``folder`` and return it."""
    vlm = load_vlm(MllmSettings(model=str(base), dtype="float32"))
    targets = r".*(language_model|text_model).*\.(q_proj|v_proj)"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        torch.manual_seed(seed)
        model = get_peft_model(vlm.model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **lora}))
        for name, values in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values, std=strength)
    save_adapter(model, folder, vlm)
    return folder


def bpe_tokenizer(specials: tuple[str, ...], *, end: str, pad: str, digits: bool = True) -> T.PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the prompt itself; without ``digits`` a space may stick to a digit."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, level]) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        prompt._INSTRUCTIONS,
        prompt._ASK_LABEL,
        prompt._ASK_EVIDENCE,
        *["Label: 0 Label: 1"] * 9,
        "Product: cell.",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, padding_side="left")


def _qwen(patch: int) -> tuple[Any, dict[str, Any], dict[str, int]]:
    tokenizer = bpe_tokenizer(QWEN_SPECIALS, end="<|im_end|>", pad="<|endoftext|>")
    side = 2 * patch
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": side * side,
        "max_pixels": side * side * 64,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    return tokenizer, {"image_processor": image_processor}, ids


def _qwen25() -> tuple[Any, Any, dict[str, Any], str]:
    tokenizer, processor, ids = _qwen(14)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # sums to half of 64 / 4
    config = T.Qwen2_5_VLConfig(
        text_config={**TEXT, **_text_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    processor["processor_class"] = "Qwen2_5_VLProcessor"
    return T.Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor, QWEN_CHAT


def _qwen3() -> tuple[Any, Any, dict[str, Any], str]:
    tokenizer, processor, ids = _qwen(16)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    config = T.Qwen3VLConfig(
        text_config={**TEXT, **_text_ids(tokenizer), "head_dim": 16, "rope_parameters": rope},
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        **ids,
    )
    processor["processor_class"] = "Qwen3VLProcessor"
    return T.Qwen3VLForConditionalGeneration(config), tokenizer, processor, QWEN_CHAT


def _llava() -> tuple[Any, Any, dict[str, Any], str]:
    tokenizer = bpe_tokenizer(LLAVA_SPECIALS, end="</s>", pad="<pad>")
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = T.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 64, **vision},
        text_config={"model_type": "llama", **TEXT, **_text_ids(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "do_center_crop": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    }
    return T.LlavaForConditionalGeneration(config), tokenizer, processor, LLAVA_CHAT


def _smolvlm() -> tuple[Any, Any, dict[str, Any], str]:
    tokenizer = bpe_tokenizer(SMOL_SPECIALS, end="<end_of_utterance>", pad="<|im_end|>")
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = T.SmolVLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT, **_text_ids(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = {
        "processor_class": "SmolVLMProcessor",
        "image_seq_len": 4,
        "image_processor": {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 4 * 56},
            "max_image_size": {"longest_edge": 56},
            "do_image_splitting": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    }
    return T.SmolVLMForConditionalGeneration(config), tokenizer, processor, SMOL_CHAT


def _text_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
