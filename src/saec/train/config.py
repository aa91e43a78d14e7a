"""What a fine-tuning run does: one flat, commented TOML file; presets ship as package data."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from saec.config import PromptSettings, Section
from saec.errors import BadInput

PRESETS = files("saec.train") / "presets"


class TrainSettings(Section):
    """Settings of ``saec train``. The defaults are the reference recipe (SAEC, section 4) as far as it names them."""

    # -- what is trained
    model: str = Field(description="Base model: a folder, or a name of saec models list.")
    adapter: str | None = Field(None, description="Adapter folder to go on from; none starts a new one.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Numbers the frozen weights are held and computed in; what is trained stays in float32."
    )
    four_bit: bool = Field(False, description="Hold the language model in NF4 with double quantisation (QLoRA).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation.")
    max_side: int = Field(512, ge=56, description="Images are shrunk to this longest side, as they will be served.")
    side_multiple: int = Field(28, ge=1, description="Sides are rounded to this multiple, as they will be served.")

    # -- LoRA
    lora_rank: int = Field(8, ge=1, description="Rank r of the update.")
    lora_alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the input of the update.")
    lora_targets: str = Field(
        r"(.*\.)?(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        description="Regular expression that the full name of every adapted module matches. It must match something, "
        "and nothing of the vision tower: engines that take adapters of language models only would lose those weights.",
    )
    adapt_tower: bool = Field(
        False, description="Let lora_targets reach into the vision tower, for a model that this program serves itself."
    )

    # -- projector
    train_projector: bool = Field(False, description="Also train the projector, whole; it is saved with the adapter.")
    projector: str = Field(
        r"(.*\.)?(multi_modal_projector|projector|connector|visual\.merger)",
        description="Regular expression that the full name of the projector's module matches.",
    )
    projector_lr: float = Field(1e-3, gt=0, description="Learning rate of the projector.")

    # -- optimisation: AdamW
    epochs: int = Field(3, ge=1, description="Passes over the training file.")
    batch_size: int = Field(2, ge=1, description="Questions in one forward pass.")
    accumulation: int = Field(8, ge=1, description="Forward passes to one step of the optimizer.")
    lr: float = Field(2e-4, gt=0, description="Learning rate of the LoRA weights.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine",
        description="How the learning rates run after the warm-up. One-cycle is cosine with a long warm-up, say 0.3.",
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of all steps over which the rates rise linearly.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm over all weights.")
    gradient_checkpointing: bool = Field(True, description="Compute activations twice rather than keep them.")
    seed: int = Field(2025, ge=0, description="Seed of initial weights, order, drawn labels, flips and dropout.")

    # -- examples
    augment: tuple[Literal["hflip", "vflip"], ...] = Field(
        (), description="Each is applied to half of the training examples: image, anomaly map and boxes together."
    )
    evidence_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the rows with evidence whose evidence question is trained too, drawn anew each epoch.",
    )

    # -- the run
    evaluate_batch: int = Field(8, ge=1, description="Questions in one forward pass of the evaluation.")
    keep: Literal["best", "last"] = Field(
        "best", description="Which adapter is the release: best by validation AUROC, or the last."
    )
    release_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Number format of saved adapters; float16 halves the files. Checkpoints keep float32."
    )
    checkpoint_every: int = Field(100, ge=1, description="Steps of the optimizer between two checkpoints.")
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; none leaves it to the library.")

    @property
    def prompt(self) -> PromptSettings:
        """How questions are put in this run; the adapter is served with the same."""
        return PromptSettings(max_side=self.max_side, side_multiple=self.side_multiple)


def load_train_settings(
    file: Path | None = None, *, preset: str | None = None, overrides: Iterable[str] = ()
) -> TrainSettings:
    """Read the settings of a run from a TOML file or a preset, then ``key=value`` overrides, later ones winning.

    Raises:
        BadInput: neither or both given, an unreadable file, no such preset, an unknown key, or a bad value.
    """
    if (file is None) == (preset is None):
        raise BadInput("pass a settings file or --preset", fix=f"presets: {', '.join(presets())}")
    tree = _toml(_text_of(file)) if file is not None else _toml(_preset_text(preset or ""))
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise BadInput("not a setting", where=item, fix="write key=value, for example epochs=1")
        tree[key.strip()] = _value(value.strip())
    return make_train_settings(tree, where=str(file or preset))


def make_train_settings(tree: dict[str, Any], *, where: str) -> TrainSettings:
    """Validate plain values.

    Raises:
        BadInput: naming the first unknown key or bad value.
    """
    try:
        return TrainSettings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        kinds = {"extra_forbidden": "unknown setting", "missing": "a setting is missing"}
        what = kinds.get(first["type"], f"bad setting ({first['msg']})")
        raise BadInput(what, where=f"{where}, {key}", fix="saec train --preset tiny --show lists all") from None


def presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(file.name.removesuffix(".toml") for file in PRESETS.iterdir() if file.name.endswith(".toml"))


def to_toml(settings: TrainSettings) -> str:
    """Return the settings as TOML, every field with its meaning above it; reading it back gives the same settings."""
    lines: list[str] = []
    for key, field in TrainSettings.model_fields.items():
        value = getattr(settings, key)
        lines += textwrap.wrap(field.description or "", 100, initial_indent="# ", subsequent_indent="# ")
        # TOML has no null: a key that is not set stands as a comment.
        lines += [f"# {key} =" if value is None else f"{key} = {_toml_value(value)}", ""]
    return "\n".join(lines)


def first_difference(one: TrainSettings, other: TrainSettings, *, free: Iterable[str] = ()) -> str | None:
    """Return the name of the first setting in which the two differ, those in ``free`` aside."""
    keys = (key for key in TrainSettings.model_fields if key not in set(free))
    return next((key for key in keys if getattr(one, key) != getattr(other, key)), None)


def _toml_value(value: object) -> str:
    if isinstance(value, str) and "\\" in value and "'" not in value:
        return f"'{value}'"  # a regular expression reads better without doubled backslashes
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _value(text: str) -> Any:
    if text == "":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word or path needs no quotes on a command line


def _toml(source: tuple[str, str]) -> dict[str, Any]:
    text, where = source
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not TOML ({error})", where=where) from None


def _text_of(file: Path) -> tuple[str, str]:
    try:
        return file.read_text(encoding="utf-8"), str(file)
    except OSError as error:
        raise BadInput("cannot read the settings file", where=file, fix=error.strerror or "check the path") from None
    except UnicodeDecodeError:
        raise BadInput("the settings file is not UTF-8 text", where=file) from None


def _preset_text(name: str) -> tuple[str, str]:
    if name not in presets():
        raise BadInput("no such preset", where=name, fix=f"one of {', '.join(presets())}")
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8"), name
