"""``saec learn apply``, ``rollback`` and ``versions``: updates applied, and taken back, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption, load_station, mllm_backend, settings_of
from saec.errors import BadInput, GateFailed

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.evaluate.probe import AdapterProbe
    from saec.learn.apply import Probe

Station = Annotated[
    Path | None, typer.Option("--station", "-s", metavar="DIR", help="Station made by saec fit.", show_default=False)
]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of an adapter.", show_default=False)]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Token that updates are authenticated with. Default: cloud.token of the settings."
    ),
]


def apply(
    update: Annotated[Path, typer.Argument(metavar="UPDATE", help="File that saec learn diff or the cloud made.")],
    station: Station = None,
    adapter: Adapter = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Labelled parts on which the new version must not be worse. Default, for a station that remembers "
            "them: the parts that calibrated it.",
            show_default=False,
        ),
    ] = None,
    key_file: KeyFile = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Apply an update: whole or not at all, and only if the probe set gets no worse by more than learn.probe_loss.

    Without --probe a station's new head and thresholds are asked about the figures that it remembers of the parts that
    calibrated it, of which one is no loss; a new bank cannot be measured so.

    With --adapter, --station names the station that makes the anomaly maps of the probe set. Exit codes: 1 where the
    probe set got worse and the old version stays, 2 for an update that must not be applied here.
    """
    from saec.cli.console import print_json, say
    from saec.evaluate.probe import ReplayProbe
    from saec.evaluate.report_words import percent
    from saec.learn.apply import apply_update

    settings = settings_of(config, set_)
    root = _root(None if adapter else station, adapter)
    if adapter and station and probe is None:
        raise BadInput(
            "beside --adapter, --station makes the maps of --probe", fix="pass --probe, or leave --station out"
        )
    try:
        data = update.read_bytes()
    except OSError as error:
        raise BadInput("cannot read the update", where=update, fix=error.strerror or "check the path") from None
    key, most = key_of(key_file, settings), settings.learn.max_frame_bytes
    measure = _probe(root, data, key, station if adapter else None, probe, settings)
    remembered = measure if isinstance(measure, ReplayProbe) else None
    tolerance = max(settings.learn.probe_loss, 0.0 if remembered is None else remembered.chance)
    done = apply_update(root, data, key=key, most=most, probe=measure, tolerance=tolerance)
    unmeasured = remembered is not None and remembered.bank_changed
    if json_:
        on_probe = {"before": done.before, "after": done.after, "bank_measured": not unmeasured}
        print_json({"version": done.version, "folder": str(done.slot), "kept": done.kept, **on_probe})
    if not done.kept:
        rates = f"is right on {percent(done.after)} of the probe set, the one at work on {percent(done.before)}"
        raise GateFailed(f"version {done.version} {rates}: it was dropped")
    if not json_:
        on = f"; on the probe set {percent(done.after)}, before {percent(done.before)}"
        on = "; it is not proven: pass --probe" if done.after is None else on
        say(f"Version {done.version} counts now{on}.")
        if unmeasured:
            say("That is its head and its thresholds; the bank's own change is not measured: pass --probe.")


def rollback(station: Station = None, adapter: Adapter = None, json_: JsonOption = False) -> None:
    """Take the last update back: the version before it counts again, at once, also in runs under way."""
    from saec.cli.console import print_json, say
    from saec.fleet.slots import Slots

    slots = Slots(_root(station, adapter))
    if slots.pointer.current.version == 0:
        raise BadInput("nothing to take back: what was fitted counts", where=slots.root)
    with slots.alone():
        version = slots.back().version
    if json_:
        print_json({"version": version, "folder": str(slots.current())})
    else:
        say(f"Version {version} counts again." if version else "What was fitted counts again.")


def versions(station: Station = None, adapter: Adapter = None, json_: JsonOption = False) -> None:
    """What was applied, refused by its probe set, and taken back, and how right each was on it; --json has all figures.

    Accuracies are those of the version before and of the one that came, where there was a probe set.
    """
    from saec.cli.console import print_json, print_tables, say
    from saec.evaluate.report_words import percent
    from saec.evaluate.table import Table
    from saec.fleet.slots import Slots

    pointer = Slots(_root(station, adapter)).pointer
    if json_:
        print_json({"current": pointer.current.version, "history": [dict(entry) for entry in pointer.history]})
        return
    if not pointer.history:
        say("Nothing applied yet: what was fitted counts.")
        return
    columns = ("when", "version", "what", "target", "probe before", "probe after", "state")
    rows = [
        {
            "when": entry["when"],
            "version": entry["version"],
            "what": entry["what"],
            "target": entry.get("target"),
            "probe before": None if entry.get("before") is None else percent(entry["before"]),
            "probe after": None if entry.get("after") is None else percent(entry["after"]),
            "state": entry["sha256"][:12],
        }
        for entry in pointer.history
    ]
    print_tables(Table(f"Version {pointer.current.version} counts", columns, rows))


def _root(station: Path | None, adapter: Path | None) -> Path:
    """Return the one folder that is named, once it is known to be what its option says."""
    from saec.edge.station import read_manifest
    from saec.vlm.trained import check_adapter

    if station is not None and adapter is not None:
        raise BadInput("--station and --adapter name two things", fix="pass one of them")
    if station is not None:
        read_manifest(station)
        return station
    if adapter is None:
        raise BadInput("nothing named", fix="pass --station or --adapter")
    check_adapter(adapter)
    return adapter


def checked(root: Path) -> Path:
    """Return the folder that counts of a station or an adapter.

    Raises:
        BadInput: it is neither.
    """
    from saec.edge.station import INDEX
    from saec.fleet.slots import current_folder

    is_station = (root / INDEX).is_file()
    return current_folder(_root(root if is_station else None, None if is_station else root))


def target_of(folder: Path, product: str | None) -> str:
    """Return the target in a folder: the adapter, or the product named, or a station's only one."""
    from saec.edge.station import INDEX, read_manifest
    from saec.learn.update import ADAPTER, product_target

    if not (folder / INDEX).is_file():
        if product is not None:
            raise BadInput("an adapter has no products", where=folder, fix="leave --product out")
        return ADAPTER
    products = read_manifest(folder).products
    if product is None and len(products) > 1:
        raise BadInput("an update is of one product", where=folder, fix=f"pass --product, of {', '.join(products)}")
    return product_target(product or products[0])


def key_of(file: Path | None, settings: Settings) -> bytes | None:
    """Return what updates are authenticated with: the token in a file, else the settings'."""
    if file is None:
        return None if settings.cloud.token is None else settings.cloud.token.encode()
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise BadInput("cannot read the key", where=file, fix=error.strerror or "check the path") from None
    if not key:
        raise BadInput("the key is empty", where=file)
    return key


def _probe(
    root: Path, data: bytes, key: bytes | None, maps: Path | None, parts: Path | None, settings: Settings
) -> Probe | None:
    """Return what measures the update's target; ``None`` where there is nothing to measure on."""
    from saec.evaluate.probe import replay_probe, station_probe
    from saec.learn.update import decode_update, product_of

    product = product_of(decode_update(data, key, settings.learn.max_frame_bytes).target)
    if product is None:
        if parts is None:
            return None
        return adapter_probe(parts, maps, settings)
    return replay_probe(root, product, settings) if parts is None else station_probe(parts, product, settings)


def adapter_probe(parts: Path, maps: Path | None, settings: Settings) -> AdapterProbe:
    """Return what asks the model of the settings about labelled parts, with one adapter after the other."""
    from saec.evaluate.probe import AdapterProbe, labelled

    station = None if maps is None else load_station(maps, settings)
    return AdapterProbe(mllm_backend(settings), labelled(parts, settings), settings, station)
