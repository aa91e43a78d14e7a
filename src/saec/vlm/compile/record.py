"""What a compilation leaves behind: ``<prefix>_<job>/metadata.json`` beside ``model.bin``, for all providers alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from saec.vlm.contract.bundle import BundleFile
from saec.vlm.contract.signature import Signature, TensorSpec

MODEL, METADATA, LOG = "model.bin", "metadata.json", "compile.log"

ProviderName = Literal["qnn-local", "qai-hub", "ort"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Record):
    """What is compiled for: a device's name, and for Qualcomm's the SoC's id and its Hexagon architecture."""

    device: str
    soc: int | None = None
    arch: int | None = None


class Difference(_Record):
    """Of one output: the largest difference to ONNX Runtime on the CPU, and the largest magnitude there."""

    max_abs: float
    largest: float


class Plan(_Record):
    """What a compilation does: the files it reads, the graph that is compiled, and the compiler's options.

    ``rebuilt``: the graph is first built anew from the weights in ``files``, since theirs has free dimensions or
    another number format than the target wants. ``signature`` is ``None`` for graphs that are no decoders.
    """

    provider: ProviderName
    target: Target
    files: Mapping[str, BundleFile]
    rebuilt: bool
    signature: Signature | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: Mapping[str, str]


class Compiled(_Record):
    """What a provider measured while it compiled.

    ``placement``: nodes of the graph by execution provider. ``compared``: differences to the CPU by output. Both are
    empty where the compiled model cannot be run here. ``peak_mb`` is the compiler's largest resident memory.
    """

    seconds: float = Field(ge=0)
    tools: Mapping[str, str]
    placement: Mapping[str, int] = Field(default_factory=dict)
    compared: Mapping[str, Difference] = Field(default_factory=dict)
    peak_mb: float | None = None


class Metadata(_Record):
    """``metadata.json``. ``files``: everything beside it; ``size``: bytes of ``model.bin``; ``made``: UTC, ISO 8601."""

    format: Literal[1] = 1
    job: str
    made: str
    plan: Plan
    result: Compiled
    size: int = Field(gt=0)
    files: Mapping[str, BundleFile]
