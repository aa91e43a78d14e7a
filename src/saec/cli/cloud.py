"""``saec cloud``: run the cloud service, or see whether one answers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.cli.options import EXPERT, ConfigOption, JsonOption, SetOption, mllm_backend, settings_of
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.cloud.desk import Desk
    from saec.config import Settings
    from saec.types import Backend

app = typer.Typer(no_args_is_help=True, help="The cloud service: the larger model that escalated parts are put to.")


class Kind(StrEnum):
    """Who answers behind the service."""

    EXPERT = "expert"
    ONNX = "onnx-vlm"
    OPENAI = "openai"
    TRANSFORMERS = "transformers"


RUNTIMES = {Kind.ONNX: "onnx", Kind.TRANSFORMERS: "transformers"}
"""Backends that are a multimodal LLM in this process, and what runs it."""


@app.command()
def serve(
    backend: Annotated[
        Kind,
        typer.Option(
            help="The station's expert, an OpenAI-compatible endpoint such as vLLM or SGLang, or a multimodal LLM in "
            "this process: exported to ONNX, without torch, or through Hugging Face classes."
        ),
    ] = Kind.EXPERT,
    station: Annotated[
        Path | None,
        typer.Option("--station", "-s", metavar="DIR", help="Station whose expert answers.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="Model in this process: see saec models list.", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LoRA adapter for that model.", show_default=False)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default=False)] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the token that clients must show.", show_default=False),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Written once it answers: {"url": ...}.', show_default=False),
    ] = None,
    until_eof: Annotated[
        bool,
        typer.Option("--until-eof", help="Also end when standard input does: with the program that holds its pipe."),
    ] = False,
    learn: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for samples that lines send, and for what is learnt from them.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; questions at hand are finished first.

    Without a token only loopback addresses are served.
    """
    import logging

    from saec.cli.console import console
    from saec.cli.service import end_with_stdin
    from saec.cloud import service

    if until_eof:
        end_with_stdin()
    if backend not in RUNTIMES and (model or adapter):
        raise BadInput(f"--model and --adapter belong to --backend {' and '.join(RUNTIMES)}")
    dials = {"mllm__model": model, "mllm__adapter": adapter, "mllm__runtime": RUNTIMES.get(backend)}
    settings = settings_of(config, set_, serve__host=host, serve__port=port, **dials)
    if token_file is not None:
        update = {"token": _token(token_file)}
        settings = settings.model_copy(update={"serve": settings.serve.model_copy(update=update)})
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    made = backend_of(backend, station, settings)
    desk = None if learn is None else desk_of(learn, station, settings)
    written = service.ready_file(ready_file) if ready_file is not None else None

    def ready(url: str) -> None:
        if written is not None:
            written(url)
        console(stderr=True).print(f"serving {made.model_id} at {url}", soft_wrap=True)

    service.serve(made, settings.serve, desk, on_ready=ready)


@app.command()
def ping(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the service, such as http://127.0.0.1:8765.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Say who answers at an address; exit code 2 if nobody does."""
    import time

    from saec.cli.console import print_json, say
    from saec.cloud.client import probe

    settings = settings_of(config, set_)
    begun = time.perf_counter()
    health = probe(url, settings.cloud)
    ms = (time.perf_counter() - begun) * 1000
    if json_:
        print_json({"url": url, "ms": ms, **health.model_dump(mode="json")})
    else:
        say(f"{url}: {health.model_id}, {health.status}, answered in {ms:.0f} ms")


def backend_of(kind: Kind, station: Path | None, settings: Settings) -> Backend:
    """Return a backend that is not warmed up yet.

    Raises:
        BadInput: no station or no expert for the expert, or an extra that is not installed.
    """
    if kind is Kind.OPENAI:
        from saec.cloud.openai import OpenAIBackend

        return OpenAIBackend(settings.openai)
    if kind in RUNTIMES:
        return mllm_backend(settings)
    if station is None:
        raise BadInput("the expert needs its station", fix="pass --station, or another --backend")
    if not (station / EXPERT).is_dir():
        raise BadInput("the station has no expert model", where=station, fix="fit it with saec fit --expert")
    from saec.cloud.expert import ExpertBackend

    return ExpertBackend.load(station / EXPERT, settings)


def desk_of(folder: Path, station: Path | None, settings: Settings) -> Desk:
    """Return the desk in a folder, at which the teacher works.

    Raises:
        BadInput: the folder is in use or somebody else's, or it or the station cannot be used.
    """
    from saec.learn.desk import FolderDesk
    from saec.learn.storage import claim
    from saec.learn.teacher import HOME, Teacher

    claim(folder)
    return FolderDesk(folder, Teacher(folder / HOME, settings, station=station), settings.learn)


def _token(file: Path) -> str:
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the token ({error})", where=file) from None
    if not token:
        raise BadInput("the token file is empty", where=file, fix="write the token into it")
    return token
