"""What is exported: a base, its adapter, and a fingerprint of both. No heavy imports: who only looks needs no onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from saec.data.hashing import sha256_file, sha256_json
from saec.errors import BadInput
from saec.vlm.contract.bundle import RECORD, BundleFamily, Precision
from saec.vlm.contract.signature import Style
from saec.vlm.fingerprint import fingerprint
from saec.vlm.prompt import VERSION
from saec.vlm.registry import entry, names, resolve
from saec.vlm.sources import RECORD as PULLED
from saec.vlm.trained import CONFIG, LOUPE, SHIPPED, WEIGHTS, adapter_id, check_adapter, check_origin, read_record

EXPORTER = 3
"""Raised when the same source gives another graph: bundles made before it are made again."""

Part = Literal["decoder", "vision", "embed"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The graphs of a bundle."""

_FAMILIES: Mapping[str, BundleFamily] = {
    "llava": "llava",
    "smolvlm": "smolvlm",
    "fast_vlm": "fastvlm",
    "llama": "text",
    "qwen2": "text",
}
"""By ``model_type`` of a checkpoint's ``config.json``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the decoder's inputs and files are laid out; see :class:`~saec.vlm.contract.signature.Signature`.

    ``embedded`` puts the weights into the graphs' files instead of beside them.
    """

    style: Style = "dot"
    rope: Literal["inside", "inputs"] = "inside"
    embeddings: Literal["outside", "inside"] = "outside"
    embedded: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A base and its adapter. ``place`` is the checkpoint's folder, the GGUF file, or the folder of the pulled model;
    ``base`` a hash of its weights."""

    name: str
    family: BundleFamily
    place: Path
    base: str
    adapter: Path | None = None

    def model_id(self, precision: Precision) -> str:
        """Name base, precision, adapter and prompt, such as ``loupe@int8+adapter:1a2b3c4d+p2``."""
        adapter = None if self.adapter is None else adapter_id(self.adapter)
        return "+".join(filter(None, (f"{self.name}@{precision}", adapter, VERSION)))

    def fingerprint(
        self,
        precision: Precision,
        *,
        context: int | None = None,
        n: int | None = None,
        parts: Sequence[Part] = PARTS,
        layout: Layout | None = None,
    ) -> str:
        """Return a hash of base, adapter, prompt and exporter, and of what a bundle is asked to be.

        Of a base that is the weights, and what the files beside them say: configuration, tokenizer, chat template.
        """
        adapter = None if self.adapter is None else [sha256_file(self.adapter / name) for name in (WEIGHTS, CONFIG)]
        small = (file for file in self.place.glob("*") if file.suffix in (".json", ".jinja") and file.name != PULLED)
        said = {file.name: sha256_file(file) for file in small}
        origin = {"exporter": EXPORTER, "base": self.base, "said": said, "adapter": adapter, "prompt": VERSION}
        asked = {"precision": precision, "context": context, "n": n, "parts": sorted(parts)}
        return sha256_json({**origin, **asked, **asdict(layout or Layout())})


def find_source(model: str, adapter: Path | None = None) -> Source:
    """Return what a name of the registry, a checkpoint's folder or a GGUF file stands for.

    Loupe, whose projector comes with its adapter, has its own where none is named.

    Raises:
        BadInput: no such model, one that is not on this machine, an architecture that cannot be exported, or an
            adapter that was made for another base.
    """
    path = Path(model)
    if model == LOUPE:
        base = sha256_json({file.path: file.sha256 for file in entry(LOUPE).files})
        found = Source(LOUPE, "loupe", resolve(LOUPE).folder, base, adapter or SHIPPED)
        made_of = "Loupe"
    elif path.suffix == ".gguf" and model not in names():
        if not path.is_file():
            raise BadInput("no such file", where=path)
        found, made_of = Source(path.stem, "text", path, sha256_file(path), adapter), "LlamaForCausalLM"
    else:
        if (path / RECORD).is_file():
            raise BadInput("this is an exported model", where=path, fix="pass the checkpoint it was exported from")
        folder = resolve(model).folder
        config = read_record(folder / "config.json")
        kind = str(config.get("model_type"))
        if kind not in _FAMILIES:
            fix = f"{LOUPE} and checkpoints of {', '.join(_FAMILIES)} can be exported"
            raise BadInput(f"unknown architecture {kind}", where=folder, fix=fix)
        found = Source(folder.resolve().name, _FAMILIES[kind], folder, fingerprint(folder), adapter)
        made_of = next(iter(config.get("architectures") or ()), "")
    if found.adapter is not None:
        check_adapter(found.adapter)
        check_origin(found.adapter, base=found.name, fingerprint=found.base, made_of=made_of)
    return found
