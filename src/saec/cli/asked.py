"""Who the arms of an evaluation ask: the cloud at its best, and the zero-shot models of the baselines."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import EXPERT, open_cloud
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.edge.classifier import OnnxClassifier
    from saec.evaluate.baselines import Asked
    from saec.evaluate.bench_table import Arm
    from saec.types import Backend

QWEN, LLAVA = "qwen2.5-vl-7b", "llava-1.5-7b"
"""Names in the model registry."""


class Kind(StrEnum):
    """Whose model answers in this process."""

    EXPERT = "expert"
    TRANSFORMERS = "transformers"
    OPENAI = "openai"


class Baseline(StrEnum):
    """What the SAEC paper compares with."""

    QWEN = "qwen-zero-shot"
    LLAVA = "llava-zero-shot"
    YOLO = "yolo-cls"


BackendOption = Annotated[
    Kind | None,
    typer.Option(
        "--backend",
        help="Ask in this process: the station's expert, the multimodal LLM of the settings (mllm.*), or an "
        "OpenAI-compatible endpoint (openai.*).",
        show_default=False,
    ),
]
ClassifierOption = Annotated[
    Path | None,
    typer.Option(
        "--classifier",
        metavar="MODEL.onnx",
        help="Image classifier of the baseline yolo-cls, such as an exported YOLO-cls.",
        show_default=False,
    ),
]
SideOption = Annotated[int, typer.Option("--side", metavar="PIXELS", help="Side of the classifier's input.")]


def baseline_arm(
    which: Baseline,
    settings: Settings,
    station: Path,
    *,
    cloud: str | None,
    backend: Kind | None,
    file: Path | None,
    side: int,
) -> Arm:
    """Return a baseline: qwen-zero-shot asks ``cloud`` or ``backend``, yolo-cls is the classifier in ``file``.

    Raises:
        BadInput: ``cloud`` cannot be asked, or the file is no classifier.
    """
    from saec.evaluate.bench_table import classifier_arm, zero_shot_arm

    match which:
        case Baseline.YOLO:
            return classifier_arm(which.value, classifier(file, side, settings))
        case Baseline.LLAVA:
            return zero_shot_arm(which.value, llava(settings))
        case Baseline.QWEN:
            if cloud == "off" or backend is Kind.EXPERT or (backend is not None and cloud not in (None, "embedded")):
                given = " ".join(str(choice) for choice in (cloud, backend) if choice is not None)
                fix = "pass --cloud URL, --backend openai, or --backend transformers"
                raise BadInput("this baseline asks one multimodal LLM", where=given, fix=fix)
            url = None if cloud == "embedded" else cloud
            return zero_shot_arm(which.value, untuned(url, backend, settings, station))


def table_of(
    settings: Settings,
    station: Path,
    *,
    cloud: str | None,
    backend: Kind | None,
    zero_shot: str | None,
    baselines: Sequence[Baseline],
    file: Path | None,
    side: int,
) -> list[Arm]:
    """Return the arms of SAEC's table; qwen-zero-shot is one of them in any case.

    Raises:
        BadInput: a service or endpoint that does not answer, or a file that is no classifier.
    """
    from saec.evaluate.baselines import Asked
    from saec.evaluate.bench_table import table_arms

    if backend is Kind.OPENAI and zero_shot is None:
        fix = "name the base model at the endpoint with --zero-shot"
        bare = Asked("", missing=BadInput("nobody said which of its models has no adapter", fix=fix))
    else:
        bare = untuned(zero_shot, backend, settings, station)
    wanted = [which for which in dict.fromkeys(baselines) if which is not Baseline.QWEN]
    if file is not None and Baseline.YOLO not in wanted:
        wanted.append(Baseline.YOLO)
    others = [
        baseline_arm(which, settings, station, cloud=None, backend=None, file=file, side=side) for which in wanted
    ]
    return table_arms(tuned(cloud, backend, settings, station), bare, *others)


def tuned(cloud: str | None, backend: Kind | None, settings: Settings, station: Path) -> Asked:
    """Return the cloud at its best: a service, the station's expert, or a model with its adapter.

    Without options: ``cloud.url`` of the settings, else the station's expert, else the MLLM of the settings.

    Raises:
        BadInput: both options, or a service or endpoint that does not answer.
    """
    from saec.evaluate.baselines import Asked

    if backend is not None and cloud not in (None, "embedded"):
        raise BadInput("choose one of --cloud and --backend", where=f"{cloud}, {backend}")
    choice = cloud or (settings.cloud.url if backend is None else None)
    if choice == "off":
        return Asked("off", missing=BadInput("no cloud was wanted", where="--cloud off"))
    if choice not in (None, "embedded"):
        return service(choice, settings, station)
    if backend is Kind.OPENAI:
        return endpoint(settings)
    if backend is Kind.EXPERT or (backend is None and (station / EXPERT).is_dir()):
        if not (station / EXPERT).is_dir():
            return Asked(EXPERT, missing=BadInput("the station has no expert", fix="saec fit --expert makes one"))
        return Asked(EXPERT, partial(open_cloud, "embedded", settings, station), embedded=True)
    family = family_of(settings.mllm.model)
    if family != "loupe" and settings.mllm.adapter is None and missing_model(settings.mllm.model) is None:
        fix = "make one with saec train, then --set mllm.adapter=DIR"
        return Asked("", missing=BadInput(f"{settings.mllm.model} has no adapter", fix=fix))
    return model(settings, f"{settings.mllm.model} adapter {settings.mllm.adapter or 'shipped'}")


def untuned(name: str | None, backend: Kind | None, settings: Settings, station: Path) -> Asked:
    """Return a model without adapter: ``name`` is a service's address, a model of the endpoint or of the registry, or
    a folder. By default the MLLM of the settings, or Qwen2.5-VL where that one cannot do without its adapter.

    Raises:
        BadInput: a service or endpoint that does not answer, or that answers with an adapter.
    """
    from saec.evaluate.baselines import SIDE, ZERO_SHOT_TAU, Asked

    if name is not None and name.startswith(("http://", "https://")):
        return service(name, settings, station, bare=True)
    changes: dict[str, Any] = {"tau": ZERO_SHOT_TAU, "max_side": SIDE}
    if backend is Kind.OPENAI:
        return endpoint(_with(settings, "openai", model=name or settings.openai.model, **changes))
    chosen = name or settings.mllm.model
    if family_of(chosen) == "loupe":
        other = missing_model(QWEN)
        if name is not None or other is not None:
            what = f"{chosen} has no zero-shot form, for its projector is trained with its adapter"
            fix = f"saec models pull {QWEN}, or name another model with --zero-shot"
            return Asked("", missing=BadInput(what, fix=fix))
        chosen = QWEN
    return model(_with(settings, "mllm", model=chosen, adapter=None, **changes), f"{chosen} zero-shot")


def llava(settings: Settings) -> Asked:
    """Return LLaVA-1.5 answering in two tokens: the MLLM of the settings where it is one, else the registry's."""
    from saec.evaluate.baselines import SIDE, Asked

    name = settings.mllm.model if family_of(settings.mllm.model) == "llava" else LLAVA
    absent = missing_model(name)
    if absent is not None:
        return Asked("", missing=absent)
    of_llava = _with(settings, "mllm", model=name, adapter=None, max_side=SIDE)

    def load() -> Backend:
        from saec.evaluate.generated import load_generating

        return load_generating(of_llava.mllm)

    return Asked.of_backend(f"{name} generated", load, max_batch=settings.serve.max_batch)


def classifier(file: Path | None, side: int, settings: Settings) -> OnnxClassifier | BadInput:
    """Return the classifier of the baseline, or how to get one.

    Raises:
        BadInput: the file is none.
    """
    if file is None:
        return BadInput("yolo-cls needs an ImageNet classifier", fix="export one to ONNX and pass --classifier FILE")
    from saec.edge.classifier import ClassifierSpec, OnnxClassifier

    return OnnxClassifier.load(file, ClassifierSpec(rule="normality", side=side), threads=settings.edge.threads)


def service(url: str, settings: Settings, station: Path, *, bare: bool = False) -> Asked:
    """Return a running service; ``bare`` refuses one whose model's name says that it has an adapter."""
    from saec.cloud.client import probe
    from saec.evaluate.baselines import Asked

    model_id = probe(url, settings.cloud).model_id
    if bare and model_id.count("+") > 1:
        raise BadInput(f"the service answers with an adapter ({model_id})", where=url, fix="serve the base model alone")
    return Asked(f"service {model_id}", partial(open_cloud, url, settings, station))


def endpoint(settings: Settings) -> Asked:
    """Return an OpenAI-compatible endpoint, asked from this process."""
    from saec.cloud.openai import OpenAIBackend
    from saec.evaluate.baselines import Asked

    backend = OpenAIBackend(settings.openai)
    try:
        backend.warm_up()
    finally:
        backend.close()
    return Asked.of_backend(
        f"openai {backend.model_id}", lambda: OpenAIBackend(settings.openai), max_batch=settings.serve.max_batch
    )


def model(settings: Settings, name: str) -> Asked:
    """Return the MLLM of the settings, in this process."""
    from saec.evaluate.baselines import Asked

    absent = missing_model(settings.mllm.model)
    if absent is not None:
        return Asked("", missing=absent)

    def load() -> Backend:
        from saec.cloud.transformers import TransformersBackend

        return TransformersBackend(settings)

    return Asked.of_backend(name, load, max_batch=settings.serve.max_batch)


def missing_model(name: str) -> BadInput | None:
    """Return how to get a model that is not at hand, ``None`` where it is."""
    from saec.vlm.registry import resolve

    try:
        resolve(name)
    except BadInput as error:
        return error
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        return BadInput(f"{name} needs torch and transformers", fix="pip install 'saec[cloud]'")
    return None


def family_of(name: str) -> str | None:
    """Return a model's family, also of one that was not pulled; ``None`` for an unknown one."""
    from saec.vlm.registry import entry, resolve

    for find in (entry, resolve):
        try:
            return str(find(name).family)
        except BadInput:
            continue
    return None


def _with(settings: Settings, section: str, **changes: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=changes)})
