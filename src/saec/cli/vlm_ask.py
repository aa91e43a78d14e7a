"""``saec vlm e2e``, ``cache`` and ``query``: asking an exported VLM, every stage timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.evaluate.table import Cell, Table
    from saec.types import Image
    from saec.vlm.edge.generate import Answer
    from saec.vlm.edge.vlm import OnnxVlm

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|DIR",
        help="An exported model's folder, or a model or checkpoint, which is exported once into the model cache.",
        show_default=False,
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What is asked of it.", show_default=False)]
System = Annotated[
    str, typer.Option("--system", metavar="TEXT", help="Instructions before the image.", show_default=False)
]
Cut = Annotated[
    bool, typer.Option("--cut", help="Cut the middle out of a prompt that is too long, instead of refusing it.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest tokens that have this probability.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same answer.")]


def e2e(
    model: Model,
    prompt: Prompt,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", metavar="FILE", help="What it is asked about.", show_default=False)
    ] = None,
    system: System = "",
    cut: Cut = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Ask a VLM about an image: the answer as it comes, then the time of every stage, from loading to decoding."""
    from saec.vlm.edge.generate import Sampling

    settings = _settings(model, config, set_)
    picture = None if image is None else _read(image, settings)
    vlm, load_ms = _load(settings)
    sampling = Sampling(temperature, top_p, seed)
    answer = vlm.stream(picture, prompt, system=system, max_tokens=max_tokens, sampling=sampling, cut=cut)
    _tell(vlm, answer, load_ms, json_=json_)


def cache(
    model: Model,
    image: Annotated[
        Path, typer.Option("--image", "-i", metavar="FILE", help="What later questions are about.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where keys and values are saved.", show_default=False)
    ],
    system: System = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Compute instructions and image once and save their keys and values; saec vlm query continues from them."""
    from saec.cli.console import print_json, say_path
    from saec.vlm.edge.store import save_start

    settings = _settings(model, config, set_)
    picture = _read(image, settings)
    vlm, load_ms = _load(settings)
    begun = time.monotonic()
    start = vlm.begin(picture, system=system)
    took_ms = (time.monotonic() - begun) * 1e3
    key = save_start(out, start, vlm.bundle, picture)
    if json_:
        timing = {"load": load_ms, "begin": took_ms}
        print_json({"file": str(out), "key": key, "tokens": len(start.ids), "timing_ms": timing})
    else:
        say_path(f"{len(start.ids)} tokens in {took_ms:.0f} ms, saved in", out)


def query(
    model: Model,
    saved: Annotated[
        Path, typer.Option("--cache", metavar="FILE", help="What saec vlm cache saved.", show_default=False)
    ],
    prompt: Prompt,
    cut: Cut = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Ask about an image whose keys and values were saved; the file is read, never written."""
    from saec.vlm.edge.generate import Sampling
    from saec.vlm.edge.store import load_start

    vlm, load_ms = _load(_settings(model, config, set_))
    start = load_start(saved, vlm.bundle)
    sampling = Sampling(temperature, top_p, seed)
    answer = vlm.stream(None, prompt, start=start, max_tokens=max_tokens, sampling=sampling, cut=cut)
    _tell(vlm, answer, load_ms, json_=json_)


def _settings(model: str, config: Path | None, set_: list[str] | None) -> Settings:
    from saec.cli.options import settings_of

    return settings_of(config, set_, mllm__model=model)


def _read(image: Path, settings: Settings) -> Image:
    from saec.data.decode import UnreadableImage, read_image
    from saec.errors import BadInput

    try:
        return read_image(image, max_pixels=settings.data.max_pixels)
    except UnreadableImage as error:
        raise BadInput(f"unreadable image ({error.why})", where=image) from None


def _load(settings: Settings) -> tuple[OnnxVlm, float]:
    """Return the model, exported if it is not yet, and the milliseconds that loading it took."""
    from saec.cli.vlm_export import exported
    from saec.vlm.edge.vlm import OnnxVlm

    folder = exported(settings.mllm)
    begun = time.monotonic()
    vlm = OnnxVlm.load(folder, threads=settings.mllm.threads)
    return vlm, (time.monotonic() - begun) * 1e3


def _tell(vlm: OnnxVlm, answer: Answer, load_ms: float, *, json_: bool) -> None:
    """Print the answer as it comes, then its stages; as one JSON object where that is asked for."""
    from saec.cli.console import print_json, print_tables

    said = []
    for piece in answer:
        said.append(piece)
        if not json_:
            sys.stdout.write(piece)
            sys.stdout.flush()
    timing = {"load": load_ms, **answer.timing_ms}
    if json_:
        tree: dict[str, Any] = {"model_id": vlm.model_id, "text": "".join(said), "timing_ms": timing}
        counts = {"prompt": answer.prompt_tokens, "reused": answer.reused, "answer": answer.tokens}
        print_json(tree | {"tokens": counts, "decode_tokens_per_s": _rate(answer)})
        return
    print("\n")
    print_tables(_table(vlm, answer, timing))


def _rate(answer: Answer) -> float | None:
    """Return tokens a second after the first; ``None`` where there was but one."""
    spent = answer.timing_ms.get("decode", 0.0)
    return (answer.tokens - 1) / spent * 1e3 if spent > 0 else None


def _table(vlm: OnnxVlm, answer: Answer, timing_ms: Mapping[str, float]) -> Table:
    from saec.evaluate.table import Table

    rate = _rate(answer)
    speed = f"{answer.tokens} tokens" + ("" if rate is None else f", {rate:.1f} a second")
    notes = {
        "load": "from disk, hashes checked",
        "prefill": f"{answer.prompt_tokens - answer.reused} of {answer.prompt_tokens} tokens",
        "first_token": "since the question",
        "decode": speed,
    }
    order = ("load", "vision", "prefill", "first_token", "decode")
    rows: list[Mapping[str, Cell]] = [
        {"stage": stage.replace("_", " "), "ms": timing_ms.get(stage), "": notes.get(stage, "")} for stage in order
    ]
    return Table(vlm.model_id, ("stage", "ms", ""), rows, ["the first question of a process: later ones are faster"])
