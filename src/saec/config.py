"""One frozen settings tree: defaults < TOML file < environment (``SAEC_ROUTE__DEADLINE_MS=150``) < command line.

Unknown keys are errors, and every field says what it means; ``saec config show`` prints the tree with these texts.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from saec.errors import BadInput

ENV_PREFIX = "SAEC_"


class Section(BaseModel):
    """Base of all sections: immutable, and a key that nobody reads is an error rather than a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(Section):
    """Reading images."""

    max_pixels: int = Field(
        64_000_000, gt=0, description="Refuse images with more pixels than this before decoding them."
    )
    near_duplicate_bits: int = Field(
        24,
        ge=0,
        le=128,
        description="Images whose 256-bit difference hashes differ in at most this many bits, and whose thumbnails "
        "agree up to gain and offset, form a group.",
    )


class EdgeSettings(Section):
    """The edge detector and its machine."""

    threads: int = Field(2, ge=1, description="Threads of the ONNX Runtime session.")


class CalibrationSettings(Section):
    """Thresholds from held-out parts."""

    overkill: float = Field(0.05, gt=0, lt=1, description="Bound on the share of good parts called defect (conformal).")
    escape: float | None = Field(
        None, gt=0, lt=1, description="Requested bound on the escape rate; needs labelled defects."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the escape bound.")
    escalation: float = Field(
        0.30, ge=0, le=1, description="Share of parts the calibrated router may send to the cloud."
    )
    folds: int = Field(8, ge=2, description="Cross-conformal folds over the good images.")


class RouteSettings(Section):
    """Routing, deadlines, and the budget of the cloud."""

    mode: Literal["cascade", "edge_only", "cloud_only", "random"] = Field("cascade", description="Who is asked.")
    random_ratio: float = Field(0.3, ge=0, le=1, description="Escalated share in random mode.")
    seed: int = Field(2025, description="Seed of random routing.")
    budget_share: float | None = Field(
        None, ge=0, le=1, description="At most this share of the parts goes to the cloud."
    )
    budget_bytes: int | None = Field(None, ge=0, description="At most this many bytes go up in a run.")
    budget_seconds: float | None = Field(None, ge=0, description="At most this many seconds of cloud time in a run.")
    deadline_ms: float = Field(200.0, gt=0, description="Deadline of the local verdict, counted and reported.")
    decode_workers: int = Field(1, ge=1, description="Threads that decode images.")
    queue: int = Field(16, ge=1, description="Length of each bounded queue between stages.")


class CloudSettings(Section):
    """The client of the cloud service."""

    url: str | None = Field(None, description="http(s) address of a cloud service, or none.")
    token: str | None = Field(None, description="Bearer token of the cloud service.")
    timeout_s: float = Field(10.0, gt=0, description="Deadline of one question, retries included.")
    retries: int = Field(2, ge=0, description="Further tries inside the deadline.")
    in_flight: int = Field(8, ge=1, description="Questions under way at once.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row that open the circuit.")
    breaker_cooldown_s: float = Field(5.0, gt=0, description="Seconds until a half-open probe.")
    max_side: int = Field(1024, ge=64, description="Images are shrunk to this longest side before they go up.")
    jpeg_quality: int = Field(92, ge=30, le=100, description="JPEG quality of what goes up.")
    uplink: Literal["image", "crop", "tokens"] = Field(
        "image",
        description="Send the whole part, the crop around the anomaly, or the most uncertain visual tokens of a model "
        "on the edge: then no image leaves the line.",
    )


class ServeSettings(Section):
    """The cloud service."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8765, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    token: str | None = Field(None, description="Bearer token that clients must show; none allows loopback only.")
    max_batch: int = Field(8, ge=1, description="Largest batch handed to the backend.")
    max_wait_ms: float = Field(10.0, ge=0, description="Longest wait for a batch to fill.")
    max_queue: int = Field(128, ge=1, description="Waiting questions before 429.")
    max_body_bytes: int = Field(16_000_000, gt=0, description="Largest request body.")
    max_pixels: int = Field(16_777_216, gt=0, description="Refuse images with more pixels before decoding them.")
    max_deadline_s: float = Field(
        60.0, gt=0, description="Longest a question may take, and the deadline of one that names none."
    )
    reference_cache_bytes: int = Field(
        256_000_000, ge=0, description="Memory for decoded reference images; the least recently used go first."
    )


class PromptSettings(Section):
    """What every backend with a multimodal LLM asks, whoever runs the model."""

    tau: float = Field(0.26, ge=0, le=1, description="From this P(defect) on the model is also asked for evidence.")
    min_label_mass: float = Field(
        0.05, ge=0, le=1, description="Least probability on the tokens 0 and 1 together; below it, no opinion."
    )
    references: int = Field(1, ge=0, le=8, description="Reference images of good parts put into the prompt.")
    max_side: int = Field(512, ge=56, description="Images are shrunk to this longest side before the model sees them.")
    side_multiple: int = Field(
        28, ge=1, description="Sides are rounded to this multiple, so that nothing resizes the images again."
    )
    evidence_tokens: int = Field(256, ge=16, description="Longest evidence answer, in tokens.")


class OpenAISettings(PromptSettings):
    """The backend that asks an OpenAI-compatible vision endpoint such as vLLM or SGLang."""

    base_url: str = Field("http://127.0.0.1:8000/v1", description="Address of the endpoint, with its /v1.")
    model: str | None = Field(None, description="Model to ask; none takes the only one that the endpoint serves.")
    api_key: str | None = Field(None, description="Bearer key of the endpoint.")
    timeout_s: float = Field(30.0, gt=0, description="Longest wait for one answer of the endpoint.")
    concurrency: int = Field(8, ge=1, description="Questions under way at the endpoint at once.")
    prefill: bool = Field(
        True,
        description="Begin the model's answer with 'Label: ' (continue_final_message, which vLLM and SGLang know); "
        "false for endpoints that refuse it.",
    )
    image_format: Literal["jpeg", "png"] = Field(
        "png",
        description="How images go to the endpoint. png keeps every pixel, so that the endpoint's P(defect) is that of "
        "the same model here; jpeg is smaller, but moves P(defect), and with it every calibrated threshold.",
    )
    jpeg_quality: int = Field(95, ge=30, le=100, description="Quality of jpeg.")


class MllmSettings(PromptSettings):
    """The backend that runs a multimodal LLM in this process."""

    model: str = Field("loupe", description="Folder of a checkpoint, or a name that saec models list knows.")
    adapter: Path | None = Field(None, description="Folder of a LoRA adapter for this model, or none.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation.")
    four_bit: bool = Field(
        False, description="Load the weights in 4 bit (NF4, double quantisation, bfloat16 arithmetic)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where it runs; auto takes a GPU if there is one."
    )
    ranking: bool = Field(False, description="Judge by five crops instead of one look (SAEC's ranking with TTA).")
    mirrors: int = Field(
        1,
        ge=1,
        le=4,
        description="Average over this many views: the part, the part turned by half, its two mirror images. For parts "
        "without an up and a down; a verdict takes that many times as long.",
    )
    crop_side: int = Field(448, ge=28, description="Longest side of the five crops.")
    prefix_cache: int = Field(
        8,
        ge=0,
        description="Beginnings of prompts, one for each product, whose keys and values are kept; 0 keeps none.",
    )
    workers: int = Field(4, ge=1, description="Threads that prepare images while the model is busy.")
    runtime: Literal["auto", "onnx", "transformers"] = Field(
        "auto",
        description="What runs it: ONNX Runtime (exported once into the model cache) or Hugging Face classes; "
        "auto is onnx for Loupe on a CPU, else transformers.",
    )
    precision: Literal["float32", "int8", "int4"] = Field("int8", description="Number format under onnx.")
    width: Path | None = Field(
        None, description="Width projector (saec vlm width): also tokens of that other tower are answered, under onnx."
    )
    threads: int = Field(2, ge=1, description="Threads of ONNX Runtime under onnx.")


class ExplainSettings(Section):
    """A sentence on each reject from a VLM on the edge, where no cloud says anything."""

    model: str | None = Field(
        None, description="Model that explains: loupe, or the folder of an exported one; or none."
    )
    budget_ms: float = Field(3000.0, gt=0, description="Longest time for one sentence; after it the boxes stand alone.")
    max_tokens: int = Field(96, ge=8, description="Longest answer, in tokens.")


class TokenSettings(Section):
    """Visual tokens in place of images, and which of them go up (cloud.uplink tokens)."""

    model: str = Field("loupe", description="Whose vision tower makes the tokens on the edge.")
    adapter: Path | None = Field(
        None, description="Adapter in that tower; the cloud's model must have the same. None takes the model's own."
    )
    ratio: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a part's tokens that goes up, the most uncertain ones. On solar cells all of them cost "
        "1.3 kB a question and half of them 1.1 kB, a point of accuracy, and seven times the work on the edge.",
    )
    choose: Literal["dropout", "entropy"] = Field(
        "dropout", description="Uncertainty by Monte-Carlo dropout inside the tower, or by entropy, which is cheaper."
    )
    passes: int = Field(10, ge=2, description="Passes of the Monte-Carlo dropout.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Share of activations dropped in each pass.")
    dims: int = Field(64, ge=1, le=64, description="Coordinates that are kept of a token, the most important first.")
    bits: int = Field(4, ge=3, le=8, description="Bits of a coordinate, before packing.")


def _whole(value: object) -> object:
    """Return text that is a whole number as one: pydantic does so for ``int``, not for a choice of some."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class LearnSettings(Section):
    """Learning from what the edge was unsure of."""

    samples: int = Field(60, ge=1, description="Parts of a round that are put to the teacher at most.")
    audit_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the parts that the edge is sure of that the cloud sees all the same; 0 audits nothing.",
    )
    drift_share: float = Field(0.5, ge=0, le=1, description="The same while drift is noticed, where audits are asked.")
    min_teacher: float = Field(
        0.7, ge=0.5, lt=1, description="A teacher's opinion counts when max(P, 1 - P) reaches this; a human's always."
    )
    bank_rows: int = Field(600, ge=0, description="Patches that a round may add to a memory bank, per pass.")
    bank_most: int = Field(6000, ge=1, description="Patches in a memory bank at most, per pass.")
    keep: float = Field(0.02, gt=0, le=1, description="Share of an adapter's changed weights that goes down.")
    bits: Annotated[Literal[2, 3, 4, 6, 8], BeforeValidator(_whole)] = Field(4, description="Bits of a changed weight.")
    probe_loss: float = Field(
        0.005,
        ge=0,
        le=1,
        description="An update that costs more accuracy on the probe set is taken back.",
    )
    max_frame_bytes: int = Field(64_000_000, gt=0, description="Largest frame, unpacked.")
    outbox_bytes: int = Field(1_000_000_000, gt=0, description="Frames that may wait on the edge; more are refused.")
    desk_bytes: int = Field(
        20_000_000_000,
        gt=0,
        description="What the service keeps of learning; the oldest ended jobs go first, with their frames.",
    )


class DistillSettings(Section):
    """Teaching the adapter of a small model by a larger one (saec learn distill)."""

    weight_features: float = Field(1.0, ge=0, description="Weight of distillation on the query adapters' features.")
    weight_language: float = Field(1.0, ge=0, description="Weight of distillation on the language adapters' features.")
    weight_logits: float = Field(0.0, ge=0, description="Weight of KL(teacher || student) on the answer's logits.")
    epochs: int = Field(2, ge=1, description="Passes over the samples.")
    batch_size: int = Field(8, ge=1, description="Samples in one step of the optimizer.")
    lr: float = Field(2e-4, gt=0, description="Learning rate of the LoRA weights.")
    projector_lr: float = Field(5e-4, gt=0, description="Learning rate of the projector and of the width projections.")
    seed: int = Field(2025, ge=0, description="Seed of order, flips, and width projections.")


class Settings(Section):
    """The whole tree."""

    data: DataSettings = DataSettings()
    edge: EdgeSettings = EdgeSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    route: RouteSettings = RouteSettings()
    cloud: CloudSettings = CloudSettings()
    serve: ServeSettings = ServeSettings()
    openai: OpenAISettings = OpenAISettings()
    mllm: MllmSettings = MllmSettings()
    explain: ExplainSettings = ExplainSettings()
    tokens: TokenSettings = TokenSettings()
    learn: LearnSettings = LearnSettings()
    distill: DistillSettings = DistillSettings()


def load_settings(
    file: Path | None = None,
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Build the tree from a TOML file, the environment and ``section.key=value`` overrides, later ones winning.

    Raises:
        BadInput: unreadable file, unknown key, or a value out of range.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read_toml(file)
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, key = name[len(ENV_PREFIX) :].lower().split("__", 1)
            _put(tree, section, key, value, source=name)
    for item in overrides:
        name, eq, value = item.partition("=")
        section, dot, key = name.strip().partition(".")
        if not eq or not dot:
            raise BadInput(
                "not a setting", where=item, fix="write section.key=value, for example route.deadline_ms=150"
            )
        _put(tree, section, key, value, source=item)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        what = "unknown setting" if first["type"] == "extra_forbidden" else f"bad setting ({first['msg']})"
        raise BadInput(what, where=where, fix="saec config show lists all settings") from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput("cannot read the settings file", where=file, fix=error.strerror or "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"the settings file is not TOML ({error})", where=file) from None


def _put(tree: dict[str, Any], section: str, key: str, value: str, *, source: str) -> None:
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise BadInput("not a section", where=source, fix="saec config show lists all settings")
    # Pydantic turns "0.5" into a number and "true" into a bool; an empty text means "none".
    branch[key] = value if value != "" else None
