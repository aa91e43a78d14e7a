"""Options that several commands share, and what they open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.data.dataset import Dataset
    from saec.edge.hot import HotStation
    from saec.edge.station import Station
    from saec.evaluate.probe import Swaps
    from saec.types import CloudClient, Explainer, Part, Tokeniser

StationOption = Annotated[
    Path, typer.Option("--station", "-s", metavar="DIR", help="Station made by saec fit.", show_default=False)
]
RunOption = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder; an interrupted run is resumed.", show_default=False),
]
CloudOption = Annotated[
    str | None,
    typer.Option(
        "--cloud",
        metavar="URL|embedded|mllm|off",
        help="Who is asked about escalated parts: a service, the station's expert or the multimodal LLM of the "
        "settings (mllm) in this process, or nobody. "
        "Default: cloud.url of the settings, else nobody.",
        show_default=False,
    ),
]
ExplainOption = Annotated[
    str | None,
    typer.Option(
        "--explain",
        metavar="MODEL",
        help="Have rejects that the cloud says nothing about put into words by this model on the edge, such as loupe. "
        "Default: explain.model of the settings, else nobody.",
        show_default=False,
    ),
]


class Uplink(StrEnum):
    """What goes up of a part; see ``cloud.uplink``."""

    IMAGE = "image"
    CROP = "crop"
    TOKENS = "tokens"


UplinkOption = Annotated[
    Uplink | None, typer.Option(help="What goes up of a part. Default: cloud.uplink.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings as TOML.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", help="One setting; may be repeated.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ProductOption = Annotated[
    str | None,
    typer.Option("--product", metavar="NAME", help="Take all images for parts of this product.", show_default=False),
]


def settings_of(config: Path | None, overrides: Sequence[str] | None, **dials: object) -> Settings:
    """Return the settings; ``dials`` are options of the command such as ``calibration__escape=0.05``, the last word.

    A dial that is ``None`` was not given.

    Raises:
        BadInput: an unknown setting or a bad value.
    """
    from saec.config import load_settings

    given = [f"{name.replace('__', '.')}={value}" for name, value in dials.items() if value is not None]
    return load_settings(config, overrides=[*(overrides or ()), *given])


PATIENCE_S = 60.0
"""Shortest deadline of a question to a multimodal LLM on this machine, in seconds."""


def patient(settings: Settings, cloud: str | None) -> Settings:
    """Return settings that wait for a multimodal LLM on this machine: without a GPU a batch takes it seconds.

    The local verdict's deadline is another: a part never waits for the cloud.
    """
    if (cloud or settings.cloud.url) != "mllm":
        return settings
    longer = {"timeout_s": max(settings.cloud.timeout_s, PATIENCE_S)}
    return settings.model_copy(update={"cloud": settings.cloud.model_copy(update=longer)})


def load_station(path: Path, settings: Settings) -> Station:
    """Return a station, in the version that counts now.

    Raises:
        BadInput: none there, damaged, or of another version.
    """
    from saec.edge.station import Station

    return Station.load(path, settings=settings)


def follow_station(path: Path, settings: Settings) -> HotStation:
    """Return a station that takes up its next version while it runs; see :func:`load_station`."""
    from saec.edge.hot import HotStation

    return HotStation(path, settings)


EXPERT = "expert"
"""Folder of the expert model inside a station's."""


@contextmanager
def open_cloud(choice: str | None, settings: Settings, station: Path) -> Iterator[CloudClient | None]:
    """Open what ``--cloud`` says, and check that it answers before anything is inspected.

    Raises:
        BadInput: nothing answers there, or the station has no expert.
    """
    choice = choice or settings.cloud.url or "off"
    if choice == "off":
        yield None
        return
    client: CloudClient
    if choice == "mllm":
        from saec.cloud.embedded import EmbeddedClient

        client = EmbeddedClient(mllm_backend(settings), max_batch=settings.serve.max_batch)
    elif choice == "embedded":
        from saec.cloud.embedded import EmbeddedClient
        from saec.cloud.expert import ExpertBackend

        folder = station / EXPERT
        if not folder.is_dir():
            raise BadInput("the station has no expert model", where=station, fix="fit it with saec fit --expert")
        client = EmbeddedClient(ExpertBackend.load(folder, settings), max_batch=settings.serve.max_batch)
    else:
        from saec.cloud.client import HttpCloudClient, probe

        health = probe(choice, settings.cloud)
        client = HttpCloudClient(choice, settings.cloud, model_id=health.model_id)
    try:
        yield _with_uplink(client, settings)
    finally:
        client.close()


def _with_uplink(client: CloudClient, settings: Settings) -> CloudClient:
    """Return the client, with tokens in the images' place where ``cloud.uplink`` says so."""
    tokeniser = open_tokeniser(settings)
    if tokeniser is None:
        return client
    from saec.cloud.tokens import TokenClient

    return TokenClient(client, tokeniser)


def open_tokeniser(settings: Settings) -> Tokeniser | None:
    """Load what makes tokens where ``cloud.uplink`` says that tokens go up; else none.

    Raises:
        BadInput: its model is not pulled or cannot be used.
    """
    if settings.cloud.uplink != "tokens":
        return None
    from saec.vlm.tokens.tower import TowerTokeniser

    return TowerTokeniser.load(settings)


@contextmanager
def open_explainer(settings: Settings) -> Iterator[Explainer | None]:
    """Load the model of ``settings.explain`` before anything is inspected; none, where none is named.

    Raises:
        BadInput: it is not pulled, cannot be used, or the extra that it needs is not installed.
    """
    if settings.explain.model is None:
        yield None
        return
    try:
        from saec.vlm.edge.explain import OnnxExplainer
    except ModuleNotFoundError as error:
        raise BadInput(f"explaining needs {error.name}", fix="pip install 'saec[vlm]'") from None
    explainer = OnnxExplainer(settings)
    try:
        yield explainer
    finally:
        explainer.close()


def refuse_learnt(choice: str | None, settings: Settings, parts: Sequence[Part]) -> None:
    """Refuse to calibrate or evaluate on parts that the multimodal LLM behind ``--cloud mllm`` was trained on.

    Raises:
        BadInput: there are such parts.
    """
    from saec.evaluate.baselines import refuse_learnt as refuse
    from saec.vlm.trained import as_trained

    if (choice or settings.cloud.url) == "mllm":
        refuse(as_trained(settings.mllm).adapter, parts)


def mllm_backend(settings: Settings) -> Swaps:
    """Return the multimodal LLM of the settings; it is loaded by its warm-up.

    Raises:
        BadInput: the extra that it needs is not installed.
    """
    try:
        if runs_on_onnx(settings):
            from saec.cloud.onnx_vlm import OnnxVlmBackend

            return OnnxVlmBackend(settings)
        from saec.cloud.transformers import TransformersBackend
    except ModuleNotFoundError as error:
        extra = "export" if runs_on_onnx(settings) else "cloud"
        raise BadInput(f"a multimodal LLM needs {error.name}", fix=f"pip install 'saec[{extra}]'") from None
    return TransformersBackend(settings)


def runs_on_onnx(settings: Settings) -> bool:
    """True where ``mllm.runtime`` means ONNX Runtime: for exported models, and for Loupe unless something is asked for
    that only Hugging Face classes have."""
    from saec.vlm.contract.bundle import RECORD
    from saec.vlm.trained import LOUPE

    mllm = settings.mllm
    if mllm.runtime != "auto":
        return mllm.runtime == "onnx"
    only_theirs = {"dtype", "attention", "four_bit"} & mllm.model_fields_set or mllm.device == "cuda"
    return (Path(mllm.model) / RECORD).is_file() or (mllm.model == LOUPE and not only_theirs)


def read_parts(images: Sequence[Path], settings: Settings, products: Sequence[str], product: str | None) -> list[Part]:
    """Return the parts of files, folders and data sets, each with an id that stays the same for the same arguments.

    Images whose product nobody named, such as those of a plain folder, are of the station's only product. The ids of
    one folder are paths inside it; with several arguments each id begins with its argument.

    Raises:
        BadInput: an argument that does not exist, no images, two images of one name, or an unknown product.
    """
    from dataclasses import replace

    from saec.data.dataset import make_dataset
    from saec.data.readers import read_dataset
    from saec.types import Part

    if product is not None and product not in products:
        raise BadInput("the station does not know this product", where=product, fix=f"it knows {', '.join(products)}")
    found: list[Part] = []
    for path in images:
        prefix = f"{path.as_posix().strip('/')}/" if len(images) > 1 else ""
        if path.is_file() and path.suffix.lower() != ".csv":
            one = Part(path.as_posix(), _only(products, path.resolve().parent.name), path)
            found.append(one)
            continue
        dataset = read_dataset(path, max_pixels=settings.data.max_pixels)
        unnamed = dataset.products == (dataset.name,)
        found += [
            replace(
                part,
                part_id=prefix + part.part_id,
                product=_only(products, part.product) if unnamed else part.product,
            )
            for part in dataset
        ]
    if product is not None:
        found = [replace(part, product=product) for part in found]
    return list(make_dataset("images", Path(), found))


def _only(products: Sequence[str], named: str) -> str:
    return products[0] if len(products) == 1 else named


def dataset_of(path: Path, settings: Settings) -> Dataset:
    """Read a labelled data set; see :func:`saec.data.readers.read_dataset`."""
    from saec.data.readers import read_dataset

    return read_dataset(path, max_pixels=settings.data.max_pixels)
