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


class Baseline(StrEnum):
    """What the SAEC paper compares with."""

    QWEN = "qwen-zero-shot"
    LLAVA = "llava-zero-shot"
    YOLO = "yolo-cls"


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
    which: Baseline, settings: Settings, station: Path, *, cloud: str | None, file: Path | None, side: int
) -> Arm:
    """Return a baseline: qwen-zero-shot asks ``cloud``, yolo-cls is the classifier in ``file``.

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
            if cloud in ("off", "embedded"):
                fix = "pass --cloud URL, --cloud openai, or --cloud mllm"
                raise BadInput("this baseline asks a multimodal LLM", where=f"--cloud {cloud}", fix=fix)
            name = None if cloud in ("openai", "mllm") else cloud
            return zero_shot_arm(which.value, untuned(name, cloud, settings, station))


def table_of(
    settings: Settings,
    station: Path,
    *,
    cloud: str | None,
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

    if cloud == "openai" and zero_shot is None:
        fix = "name the base model at the endpoint with --zero-shot"
        bare = Asked("", missing=BadInput("nobody said which of its models has no adapter", fix=fix))
    else:
        bare = untuned(zero_shot, cloud, settings, station)
    wanted = [which for which in dict.fromkeys(baselines) if which is not Baseline.QWEN]
    if file is not None and Baseline.YOLO not in wanted:
        wanted.append(Baseline.YOLO)
    others = [baseline_arm(which, settings, station, cloud=None, file=file, side=side) for which in wanted]
    return table_arms(tuned(cloud, settings, station), bare, *others)


def tuned(cloud: str | None, settings: Settings, station: Path) -> Asked:
    """Return the cloud at its best: a service, the station's expert, or a model with its adapter.

    Without ``cloud``: ``cloud.url`` of the settings, else the station's expert, else the MLLM of the settings.

    Raises:
        BadInput: a service or endpoint that does not answer.
    """
    from saec.evaluate.baselines import Asked

    has_expert = (station / EXPERT).is_dir()
    match cloud or settings.cloud.url or ("embedded" if has_expert else "mllm"):
        case "off":
            return Asked("off", missing=BadInput("no cloud was wanted", where="--cloud off"))
        case "openai":
            return endpoint(settings)
        case "embedded":
            if not has_expert:
                return Asked(EXPERT, missing=BadInput("the station has no expert", fix="saec fit --expert makes one"))
            return Asked(EXPERT, partial(open_cloud, "embedded", settings, station), embedded=True)
        case "mllm":
            name, adapter = settings.mllm.model, settings.mllm.adapter
            if family_of(name) != "loupe" and adapter is None and missing_model(name) is None:
                fix = "make one with saec train, then --set mllm.adapter=DIR"
                return Asked("", missing=BadInput(f"{name} has no adapter", fix=fix))
            return model(settings, station)
        case url:
            return service(url, settings, station)


def untuned(name: str | None, cloud: str | None, settings: Settings, station: Path) -> Asked:
    """Return a model without adapter: ``name`` is a service's address, a folder, or a model of the registry or, where
    ``cloud`` is ``openai``, of the endpoint. By default the MLLM of the settings, or Qwen2.5-VL where that one cannot
    do without its adapter.

    Raises:
        BadInput: a service or endpoint that does not answer, or that answers with an adapter.
    """
    from saec.evaluate.baselines import SIDE, ZERO_SHOT_TAU, Asked

    if name is not None and name.startswith(("http://", "https://")):
        return service(name, settings, station, bare=True)
    changes: dict[str, Any] = {"tau": ZERO_SHOT_TAU, "max_side": SIDE}
    if cloud == "openai":
        return endpoint(_with(settings, "openai", model=name or settings.openai.model, **changes))
    chosen = name or settings.mllm.model
    if family_of(chosen) == "loupe":
        if name is not None or missing_model(QWEN) is not None:
            what = f"{chosen} has no zero-shot form, for its projector is trained with its adapter"
            fix = f"saec models pull {QWEN}, or another model in mllm.model"
            return Asked("", missing=BadInput(what, fix=fix))
        chosen = QWEN
    return model(_with(settings, "mllm", model=chosen, adapter=None, **changes), station)


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
    if bare and "+adapter:" in model_id:
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


def model(settings: Settings, station: Path) -> Asked:
    """Return the MLLM of the settings, in this process; named by base and adapter, wherever these lie."""
    from saec.data.hashing import sha256_file
    from saec.evaluate.baselines import Asked
    from saec.vlm.trained import WEIGHTS, as_trained, check_adapter

    absent = missing_model(settings.mllm.model)
    if absent is not None:
        return Asked("", missing=absent)
    name, adapter = Path(settings.mllm.model).name, as_trained(settings.mllm).adapter
    if adapter is not None:
        check_adapter(adapter)
        name += f" adapter {sha256_file(adapter / WEIGHTS)[:8]}"
    return Asked(name, partial(open_cloud, "mllm", settings, station), embedded=True, adapter=adapter)


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
