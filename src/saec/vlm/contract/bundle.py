"""A bundle: the folder that an exported VLM lies in, and ``vlm.json``, which says what everything in it is.

BUNDLE/vlm.json          this record: signature, image contract, prompt, hashes of all files
       decoder.onnx      new tokens' embeddings and cache in, logits and new keys and values out (decoder.bin: weights)
       embed.onnx        input_ids [1, n] int32 in, inputs_embeds [1, n, H] out
       vision.onnx       one image in, image_embeds [1, T, H] out; absent for a language model alone
       tokenizer.json    as the ``tokenizers`` library reads it
       projector.onnx    standardised tokens and anomaly_map in, image_embeds [1, T, H] out; Loupe alone has it, and
       basis.safetensors what tokens are described in on their way (:class:`saec.vlm.tokens.codec.Basis`)

A tower by itself is a folder of the same kind:

TOWER/tower.json         its record
      lower.onnx         pixel_values [1, 3, S, S] in, state out
      upper.onnx         state and dropout masks in, tokens [1, L, W] out
      basis.safetensors  as in the bundle
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.errors import BadInput, first_problem
from saec.vlm.contract.signature import Signature, TensorSpec

RECORD = "vlm.json"
TOWER_RECORD = "tower.json"
LOWER, UPPER, PROJECTOR, BASIS = "lower.onnx", "upper.onnx", "projector.onnx", "basis.safetensors"
DECODER, EMBEDDING, VISION, TOKENIZER = "decoder.onnx", "embed.onnx", "vision.onnx", "tokenizer.json"

BundleFamily = Literal["loupe", "llava", "smolvlm", "fastvlm", "text"]
Precision = Literal["float32", "float16", "int8", "int4"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocess(_Record):
    """How an image becomes the tower's ``pixel_values`` [1, 3, side, side] float32, RGB.

    The image keeps its aspect ratio: its longest side becomes ``side`` pixels and the rest is ``fill``, in units of 0
    to 255, RGB, before ``mean`` and ``std`` (of values of 0 to 1) are applied. ``place`` is where in the square it
    lies. ``enlarge`` and ``shrink`` name OpenCV's interpolations.
    """

    side: int = Field(gt=0)
    place: Literal["corner", "centre"]
    fill: tuple[float, float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    enlarge: Literal["cubic", "linear"] = "cubic"
    shrink: Literal["area", "cubic", "linear"] = "area"


class Vision(_Record):
    """The vision graph: its inputs, how many visual tokens it makes of one image, and the preprocessing it expects."""

    inputs: tuple[TensorSpec, ...]
    tokens: int = Field(gt=0)
    preprocess: Preprocess


class Prompt(_Record):
    """What the runtime needs to know of the tokenizer's ids.

    ``image_token`` stands for one visual token; ``labels`` are the ids of ``0`` and ``1`` after the prefill; any of
    ``ends`` ends an answer. ``template`` is the checkpoint's chat template (Jinja), ``None`` where the family has a
    prompt of its own.
    """

    image_token: int | None = None
    labels: tuple[int, int] | None = None
    ends: tuple[int, ...] = Field(min_length=1)
    template: str | None = None


class BundleFile(_Record):
    """One file of the bundle."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Exported(_Record):
    """A record with the hashes of the files beside it."""

    format: Literal[1] = 1
    files: Mapping[str, BundleFile] = Field(default_factory=dict)


_Kind = TypeVar("_Kind", bound=Exported)


class Bundle(Exported):
    """The record of an exported VLM.

    ``model_id`` names base, adapter, precision and prompt, such as ``loupe@int8+adapter:1a2b3c4d+p2``; ``fingerprint``
    is a hash of everything that it was exported from. ``w8a16`` has 8-bit weights and 16-bit activations, for NPUs.
    ``quality`` holds measured differences to the float32 model, ``tower`` the id of the :class:`Tower` whose tokens it
    takes in place of an image.
    """

    name: str
    family: BundleFamily
    model_id: str
    fingerprint: str
    precision: Precision | Literal["w8a16"]
    signature: Signature
    vision: Vision | None = None
    tower: str | None = None
    prompt: Prompt
    quality: Mapping[str, float | int | str] = Field(default_factory=dict)


class Tower(Exported):
    """The record of a vision tower by itself.

    ``state`` is what goes from the lower graph to the upper one, ``masks`` what the upper one also takes; ``tokens``
    [1, L, W] come out. ``model_id`` names the tower's weights and the basis of its tokens, whatever the number format.
    """

    name: str
    model_id: str
    fingerprint: str
    state: TensorSpec
    masks: TensorSpec
    tokens: TensorSpec
    preprocess: Preprocess


def read_bundle(folder: Path, *, hashes: bool = True) -> Bundle:
    """Return the record of a bundle whose files are all there and, unless told otherwise, have their hashes.

    Raises:
        BadInput: no bundle there, a damaged record, or a file that is missing or not the one that was exported.
    """
    return read_exported(folder, Bundle, RECORD, hashes=hashes)


def read_tower(folder: Path, *, hashes: bool = True) -> Tower:
    """Return the record of a tower; see :func:`read_bundle`."""
    return read_exported(folder, Tower, TOWER_RECORD, hashes=hashes)


def read_exported(folder: Path, kind: type[_Kind], record: str, *, hashes: bool = True) -> _Kind:
    """Return a record of a kind; see :func:`read_bundle`."""
    try:
        found = kind.model_validate_json((folder / record).read_bytes())
    except OSError:
        fix = "make one with saec vlm export-decoder"
        raise BadInput(f"no exported model here: {record} is missing", where=folder, fix=fix) from None
    except ValidationError as error:
        raise BadInput(f"the record of the bundle is damaged ({first_problem(error)})", where=folder / record) from None
    for name, file in found.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.size or (hashes and sha256_file(path) != file.sha256):
            what = "damaged: missing, or not the file that was exported"
            raise BadInput(what, where=path, fix="remove the folder and export the model again")
    return found


def write_bundle(folder: Path, bundle: _Kind, record: str = RECORD) -> _Kind:
    """Write the record last, with the hashes of all files beside it; return it.

    Raises:
        OSError: the folder cannot be written.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != record)
    files = {name: BundleFile(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name)) for name in names}
    complete = bundle.model_copy(update={"files": files})
    write_atomic(folder / record, complete.model_dump_json(indent=1) + "\n")
    return complete
