"""A decoder's shape and weights out of a checkpoint: a folder of safetensors files, sharded or not, or a GGUF file.

Weights are read one at a time, as they are asked for; the files are memory-mapped. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, TypeAdapter

from saec.errors import BadInput
from saec.vlm.contract.shape import DecoderShape, read_shape
from saec.vlm.export.decoder import DecoderWeights
from saec.vlm.export.linear import Array, Blocks4, SidePath
from saec.vlm.gguf import LlamaGguf
from saec.vlm.trained import read_record

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def open_decoder(source: Path) -> tuple[DecoderShape, DecoderWeights]:
    """Return the decoder of a checkpoint folder, a VLM's text model included, or of a ``.gguf`` file.

    Raises:
        BadInput: files are missing or damaged, the architecture is another, or a weight is missing, unknown or of
            another shape than the configuration says; the message names file and weight.
    """
    if source.suffix == ".gguf":
        gguf = open_gguf(source)
        return gguf.shape, gguf
    shape = config_shape(source)
    tensors = open_checkpoint(source)
    names = _standard_names(tensors.shapes, source)
    config = read_record(source / CONFIG)
    text = config.get("text_config") or config.get("llm_config") or {}
    if _HEAD not in names and "tie_word_embeddings" not in {**config, **text}:
        shape = shape.model_copy(update={"tied": True})  # the default differs between versions; the files know
    found = {name: tensors.shapes[stored] for name, stored in names.items()}
    _check(shape, found, {name: tensors.file(stored) for name, stored in names.items()}, source)
    return shape, _Stored(tensors, names)


def config_shape(source: Path) -> DecoderShape:
    """Return the shape that the configuration of a checkpoint folder, or the head of a ``.gguf`` file, states.

    Raises:
        BadInput: no configuration there, or one of another architecture.
    """
    if source.suffix == ".gguf":
        return LlamaGguf(source).shape
    if not (source / CONFIG).is_file():
        raise BadInput("no checkpoint here", where=source, fix=f"pass a folder with {CONFIG}, or a .gguf file")
    return read_shape(read_record(source / CONFIG), where=source / CONFIG)


def open_gguf(file: Path) -> LlamaGguf:
    """Return the decoder of a GGUF file; see :func:`open_decoder`."""
    gguf = LlamaGguf(file)
    _check(gguf.shape, gguf.shapes, dict.fromkeys(gguf.shapes, file), file)
    return gguf


def weight_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Return all weights of a decoder under the names of ``LlamaForCausalLM``, with their shapes."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = {
        "self_attn.q_proj": (inner, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, inner),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": sizes for name, sizes in matrices.items()}
    layer |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    biased = ("q_proj", "k_proj", "v_proj") if shape.qkv_bias else ()
    for name in (*biased, *(("o_proj",) if shape.o_bias else ())):
        layer[f"self_attn.{name}.bias"] = matrices[f"self_attn.{name}"][:1]
    table = (shape.vocab_size, hidden)
    found: dict[str, tuple[int, ...]] = {f"model.{_EMBEDDINGS}": table, "model.norm.weight": (hidden,)}
    if not shape.tied:
        found[_HEAD] = table
    return found | {f"model.layers.{at}.{name}": sizes for at in range(shape.layers) for name, sizes in layer.items()}


def open_checkpoint(folder: Path) -> Tensors:
    """Return all weights of a checkpoint folder, under the names they are stored by.

    Raises:
        BadInput: no safetensors files, a shard that is missing, or a damaged one.
    """
    if (folder / INDEX).is_file():
        shards = read_record(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise BadInput("damaged index of weights", where=folder / INDEX, fix="download the checkpoint again")
        return Tensors([folder / Path(file).name for file in sorted(set(shards.values()))])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput("no weights here", where=folder, fix="they must be in safetensors files")
    return Tensors(files)


class _Entry(BaseModel):
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_ENTRIES = TypeAdapter(dict[str, _Entry])


class Tensors:
    """The weights of safetensors files. ``shapes`` holds what there is.

    The format's header is read here, since its own library has no bfloat16 for numpy.

    Raises:
        BadInput: a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._at: dict[str, tuple[Path, _Entry, NDArray[np.uint8]]] = {}
        for file in files:
            self._at |= {name: (file, entry, data) for name, (entry, data) in _read(file).items()}
        self.shapes = {name: entry.shape for name, (_, entry, _) in self._at.items()}

    def file(self, name: str) -> Path:
        """Return the file that holds a weight."""
        return self._at[name][0]

    def array(self, name: str) -> Array:
        """Return a weight in float32; float16 and bfloat16 are widened, which is exact.

        Raises:
            BadInput: no such weight, or one of another number format.
        """
        if name not in self._at:
            files = sorted({str(file.parent) for file, _, _ in self._at.values()})
            raise BadInput(f"the weights lack {name}", where=", ".join(files))
        file, entry, data = self._at[name]
        if entry.dtype not in _DTYPES:
            raise BadInput(f"the weight {name} has the number format {entry.dtype}", where=file)
        stored = data.view(_DTYPES[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(stored, np.float32)


class _Stored:
    """A decoder in a checkpoint folder: ``names`` maps the names it is asked by to those it is stored by."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def array(self, name: str) -> Array:
        return self._tensors.array(self._names.get(name, name))

    def blocks(self, name: str) -> Blocks4 | None:
        return None

    def side(self, name: str) -> SidePath | None:
        return None


def _read(file: Path) -> dict[str, tuple[_Entry, NDArray[np.uint8]]]:
    try:
        raw = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        entries = _ENTRIES.validate_python(header)
    except (OSError, ValueError, AttributeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BadInput(f"not a readable safetensors file ({problem})", where=file, fix="download it again") from None
    found = {}
    for name, entry in entries.items():
        data = raw[start + entry.data_offsets[0] : start + entry.data_offsets[1]]
        known = _DTYPES.get(entry.dtype)
        if known and data.nbytes != math.prod(entry.shape) * np.dtype(known).itemsize:
            raise BadInput(f"the weight {name} is cut off or damaged", where=file, fix="download it again")
        found[name] = (entry, data)
    return found


def _standard_names(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Return standard name -> stored name of the text model's weights, whatever prefix a VLM gives it."""
    names = list(names)
    prefixes = [name.removesuffix(_EMBEDDINGS) for name in names if f".{name}".endswith(f".{_EMBEDDINGS}")]
    if len(prefixes) != 1:
        what = f"{len(prefixes)} weights are called {_EMBEDDINGS}, one tells where the text model begins"
        raise BadInput(what, where=folder, fix="pass the checkpoint of a decoder, or of a VLM with one")
    parts = tuple(prefixes[0] + part for part in (_EMBEDDINGS, "norm.", "layers."))
    found = {f"model.{name.removeprefix(prefixes[0])}": name for name in names if name.startswith(parts)}
    heads = [name for name in names if f".{name}".endswith(f".{_HEAD}")]
    return found | ({_HEAD: heads[0]} if heads else {})


def _check(shape: DecoderShape, found: Mapping[str, tuple[int, ...]], files: Mapping[str, Path], source: Path) -> None:
    """Hold all weights to the shapes that the configuration asks for; none may be missing, none be left over."""
    wanted = weight_shapes(shape)
    fix = "take weights and configuration from one checkpoint"
    for name, sizes in wanted.items():
        if name not in found:
            raise BadInput(f"the weight {name} is missing", where=source, fix=fix)
        if found[name] != sizes:
            what = f"the weight {name} has shape {list(found[name])}, the configuration says {list(sizes)}"
            raise BadInput(what, where=files[name], fix=fix)
    for name in sorted(found.keys() - wanted.keys() - {_HEAD}):
        if not name.endswith("rotary_emb.inv_freq"):  # older checkpoints kept what the configuration says anyway
            raise BadInput(f"the decoder has {name}, which cannot be exported", where=files[name])
