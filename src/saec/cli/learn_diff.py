"""``saec learn diff``: a compressed update from one station or adapter to another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.cli.learn_update import KeyFile, adapter_probe, checked, key_of, target_of
from saec.cli.options import ConfigOption, JsonOption, SetOption, mllm_backend, settings_of
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.evaluate.probe import AdapterAnswers
    from saec.learn.delta import Delta
    from saec.learn.state import State
    from saec.types import Query


def diff(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Station or adapter as devices have it.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The same, taught.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The update.", show_default=False)],
    product: Annotated[str | None, typer.Option(metavar="NAME", help="Of the station.", show_default=False)] = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Labelled parts: send the smallest share of an adapter's changes that loses at most learn.probe_loss "
            "on them, in place of learn.keep.",
            show_default=False,
        ),
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Station that makes their anomaly maps.", show_default=False)
    ] = None,
    desk: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Parts that a cloud service has collected: the changes are amplified until the adapter answers about "
            "them as NEW does. Default: about those of --probe.",
            show_default=False,
        ),
    ] = None,
    key_file: KeyFile = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Make a compressed update from one station or adapter to another.

    Of an adapter the most important changes go (learn.keep, learn.bits), by its gradients where NEW lies in the folder
    of its training run, else by size; pass --desk or --probe, so that they stand in for those that are left out. A
    station's grown bank goes in 8 bits, all else exact.
    """
    from saec.cli.console import print_json, print_tables, say
    from saec.data.manifest import write_atomic
    from saec.evaluate.bench_update import delta_figures, figures_table
    from saec.fleet.slots import Slots
    from saec.learn.apply import state_of
    from saec.learn.delta import compress
    from saec.learn.update import ADAPTER, Update, encode_update

    settings = settings_of(config, set_)
    if out.is_dir() or not out.parent.is_dir():
        what = "this is a folder" if out.is_dir() else "no such folder"
        raise BadInput(what, where=out if out.is_dir() else out.parent, fix="pass the file to write as --out")
    slots = Slots(base)
    target = target_of(checked(base), product)
    if target != ADAPTER and (probe or maps or desk):
        fix = "saec learn apply --probe proves a station's update"
        raise BadInput("--probe, --maps and --desk are about an adapter's changes", where=base, fix=fix)
    before, after = state_of(slots.current(), target), state_of(checked(new), target)
    if before.sha256 == after.sha256:
        raise BadInput("both are the same: there is nothing to send", where=f"{base}, {new}", fix="teach NEW first")
    if target == ADAPTER:
        delta, found = _adapter_delta(before, after, new, probe, maps, desk, settings)
    else:
        delta, found = compress(before, after), {}
    decoded = delta.apply(before)
    if decoded.sha256 == before.sha256:
        raise BadInput("no change is large enough to be sent", where=new, fix="raise learn.keep")
    version = slots.pointer.highest + 1
    update = Update(target, before.sha256, decoded.sha256, version, slots.pointer.current.version, delta, found)
    data = encode_update(update, key_of(key_file, settings))
    try:
        write_atomic(out, data)
    except OSError as error:
        raise BadInput("cannot write the update", where=out, fix=error.strerror or "check the path") from None
    figures = {"target": target, "version": version, **found, **delta_figures(delta, after, len(data))}
    if json_:
        print_json(figures)
    else:
        shown = {_SHOWN[key]: _figure(value) for key, value in figures.items() if key in _SHOWN}
        print_tables(figures_table(f"Update {version} of {target}", shown))
        if target == ADAPTER and desk is None and probe is None:
            say("Nobody has asked whether it answers as NEW does, and it is not amplified: pass --desk or --probe.")


def _adapter_delta(
    before: State, after: State, new: Path, probe: Path | None, maps: Path | None, desk: Path | None, settings: Settings
) -> tuple[Delta, dict[str, float]]:
    """Return an adapter's compressed change, and what was measured of it."""
    from saec.learn.delta import compress, fit_keep
    from saec.learn.gain import fit_gain
    from saec.learn.sensitivity import training_sensitivity

    learn, matters = settings.learn, training_sensitivity(new)
    judged = None if probe is None else adapter_probe(probe, maps, settings)
    answers = judged if desk is None else _desk_answers(desk, settings)

    def at(keep: float) -> Delta:
        def louder(gain: float) -> Delta:
            return compress(before, after, keep=keep, bits=learn.bits, gain=gain, sensitivity=matters)

        return louder(1.0) if answers is None else fit_gain(before, after, louder, answers.p_of)[1]

    if judged is None:
        return at(learn.keep), {}
    keep, delta = fit_keep(before, after, at, judged.loss, most=learn.probe_loss)
    accuracies = {"accuracy": 1 - judged.loss(delta.apply(before)), "accuracy_dense": 1 - judged.loss(after)}
    return delta, {"keep": keep, **accuracies}


def _desk_answers(desk: Path, settings: Settings) -> AdapterAnswers:
    """Return what asks about some of the parts that a desk has collected."""
    from saec.evaluate.probe import AdapterAnswers
    from saec.learn.collected import collected
    from saec.learn.gain import PARTS

    found, _ = collected(desk, settings)
    if not found:
        raise BadInput("no part with an image and a label that counts", where=desk, fix="let stations learn once more")
    every = max(1, len(found) // PARTS)
    return AdapterAnswers(mllm_backend(settings), [partial(_same, each.query) for each in found[::every]])


def _same(query: Query) -> Query:
    return query


_SHOWN = {
    "bytes": "bytes",
    "dense_bytes": "bytes of all that is taught, uncompressed",
    "keep": "share of the changed weights that is sent",
    "entries": "weights that are sent",
    "gain": "what they are multiplied by",
    "norm": "share of the change's squared norm that is sent",
    "left_out": "largest change of a weight that is left out",
    "error": "largest error of a value that is sent, in its tensor's units",
    "accuracy": "accuracy on the probe set, as sent",
    "accuracy_dense": "accuracy on the probe set, all sent",
}
"""What a terminal calls each figure of an update."""


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
