"""``saec learn once``: a station learns from what it was unsure of in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StationOption,
    UplinkOption,
    load_station,
    open_tokeniser,
    settings_of,
)
from saec.errors import BadInput, GateFailed, SaecError

if TYPE_CHECKING:
    from saec.cloud.learning import LearnClient
    from saec.config import Settings
    from saec.edge.station import Station
    from saec.learn.line import Learnt
    from saec.types import CloudError, Label, Verdict


def once(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of saec inspect; its images must be there.")],
    station: StationOption,
    cloud: Annotated[
        str, typer.Option("--cloud", metavar="URL", help="A service started with --learn.", show_default=False)
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="What people say: columns part (id, path or SHA-256 of the image) and label (good or defect).",
            show_default=False,
        ),
    ] = None,
    uplink: UplinkOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Let a station learn from what it was unsure of in a run, such as the day's.

    The least certain parts and those with a label go up; the cloud's model has its say on them, and people's labels
    win. An update comes down, and counts from then on unless it is worse on the probe set. A round that was cut off is
    brought to its end first. No part that was learnt goes up twice. Exit codes: 1 where an update was dropped, 2 where
    a round could not be brought to its end.
    """
    from saec.cli.console import print_json, print_tables
    from saec.cli.learn_words import table
    from saec.cloud.learning import LearnClient
    from saec.evaluate.runner import recorded
    from saec.learn.rulings import read_labels

    settings = settings_of(config, set_, cloud__uplink=uplink)
    people = {} if labels is None else read_labels(labels)
    judge = load_station(station, settings)
    verdicts = [_found(verdict, run) for verdict in recorded(run)]
    if not verdicts:
        raise BadInput("no verdicts to learn from", where=run, fix="pass the run folder of saec inspect")
    by_content = _by_content(people, verdicts, labels) if labels is not None else {}
    with closing(LearnClient(cloud, settings.cloud, on_wait=_waiting)) as client:
        _check(client, cloud)
        told, errors = _each(judge, station, settings, client, verdicts, by_content, cloud, quiet=json_)
    if json_:
        print_json({product: _as_json(learnt) for product, learnt in told.items()} | _errors_json(errors))
    elif told:
        print_tables(table(told))
    _raise(told, errors, verdicts)


def _each(
    judge: Station,
    station: Path,
    settings: Settings,
    client: LearnClient,
    verdicts: Sequence[Verdict],
    labels: Mapping[str, Label],
    cloud: str,
    *,
    quiet: bool,
) -> tuple[dict[str, Learnt], dict[str, SaecError]]:
    """Run the rounds of all products, each told when it ends; return what came of them, and what went wrong."""
    from saec.cli.console import console, say, steps
    from saec.cli.fit import stepper
    from saec.cli.learn_words import outcome
    from saec.evaluate.learning import sampler
    from saec.learn.line import Line, learn
    from saec.learn.round import RoundOver
    from saec.types import CloudError

    error_console = console(stderr=True)
    sample_of = sampler(judge, settings, open_tokeniser(settings))
    told: dict[str, Learnt] = {}
    errors: dict[str, SaecError] = {}
    for product in judge.products:
        try:
            with steps() as progress:
                told[product] = learn(
                    Line(station, product, settings),
                    verdicts,
                    client,
                    sample_of,
                    labels=labels,
                    step=stepper(progress),
                    tell=error_console.print,
                )
        except RoundOver as error:
            errors[product] = BadInput(f"{product}: {error}", where=cloud)
        except CloudError as error:
            errors[product] = _of_the_cloud(error, cloud)
            if others := judge.products[len(told) + len(errors) :]:  # they would wait for it in vain
                error_console.print(f"Not begun: {', '.join(others)}.")
            break
        except BadInput as error:
            errors[product] = error
        else:
            for text in () if quiet else outcome(product, told[product]):
                say(text)
    return told, errors


def _check(client: LearnClient, cloud: str) -> None:
    """Refuse an address where nobody learns at once: a round would wait for it for an hour."""
    from saec.types import CloudError

    try:
        client.check()
    except CloudError as error:
        raise _of_the_cloud(error, cloud, begun=False) from None


def _of_the_cloud(error: CloudError, cloud: str, *, begun: bool = True) -> BadInput:
    """Return the one line on what the service said, or that it did not: with its own word on what to do, if any."""
    from saec.cloud.learning import ServiceRefused
    from saec.types import Reason

    fix = error.fix if isinstance(error, ServiceRefused) else ""
    if error.reason is Reason.CLOUD_BAD_ANSWER:
        fix = fix or "pass the address of a service started with saec cloud serve --learn DIR"
        return BadInput(f"the cloud did not do its part ({error})", where=cloud, fix=fix)
    again = "call again to go on" if begun else "start it with saec cloud serve --learn DIR, or correct the address"
    return BadInput(f"the cloud did not answer ({error})", where=cloud, fix=fix or again)


def _waiting(error: CloudError, seconds: float) -> None:
    from saec.cli.console import console

    until = datetime.now().astimezone() + timedelta(seconds=seconds)
    console(stderr=True).print(f"The service does not answer ({error}); trying again until {until:%H:%M:%S}.")


def _raise(told: Mapping[str, Learnt], errors: Mapping[str, SaecError], verdicts: Sequence[Verdict]) -> None:
    """End as badly as the worst product did; the last word is what to do."""
    if errors:
        raise next(iter(errors.values()))
    rounds = [each for learnt in told.values() for each in (learnt, learnt.earlier) if each is not None]
    gone = sum(each.passed.gone for each in rounds)
    if gone and not any(each.samples for each in rounds):
        what = f"{gone} images are not there any more, or are not what was inspected"
        fix = "call from the folder that saec inspect was called from, or put the images back"
        raise BadInput(what, where=verdicts[0].path, fix=fix)
    dropped = [each.applied.version for each in rounds if each.applied is not None and not each.applied.kept]
    if dropped:
        named = ", ".join(str(version) for version in dropped)
        raise GateFailed(f"worse on the probe set and dropped: version {named}; the station is as it was")


def _found(verdict: Verdict, run: Path) -> Verdict:
    """Return the verdict with the place where its image is: as recorded, or seen from the run folder or one above it,
    from where saec inspect may have been called. Another file of that name is told by its hash."""
    if Path(verdict.path).is_file():
        return verdict
    whole = run.resolve()
    inside = next((place / verdict.path for place in (whole, *whole.parents) if (place / verdict.path).is_file()), None)
    return verdict if inside is None else replace(verdict, path=str(inside))


def _by_content(people: Mapping[str, Label], verdicts: Sequence[Verdict], file: Path) -> dict[str, Label]:
    """Return the labels by content hash, having said how many of them are about no part of this run."""
    from saec.cli.console import console

    found, used = {}, set()
    for verdict in verdicts:
        for name in (verdict.sha256, verdict.part_id, verdict.path):
            if name in people:
                found[verdict.sha256] = people[name]
                used.add(name)
    others = [name for name in people if name not in used]
    some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    if not found:
        about = f"they are about {some}" if some else "there are none"
        what = f"no label is about a part of this run, such as {verdicts[0].part_id}; {about}"
        raise BadInput(what, where=file, fix="name parts by id, path or SHA-256")
    if others:
        text = f"{len(used)} of {len(people)} labels are about parts of this run; not about any: {some}"
        console(stderr=True).print(text)
    return found


def _as_json(learnt: Learnt) -> dict[str, Any]:
    from dataclasses import asdict

    applied = learnt.applied
    tree = asdict(learnt) | {"earlier": None if learnt.earlier is None else _as_json(learnt.earlier)}
    return tree | {"applied": None if applied is None else {**asdict(applied), "slot": str(applied.slot)}}


def _errors_json(errors: Mapping[str, SaecError]) -> dict[str, Any]:
    return {product: {"error": str(error)} for product, error in errors.items()}
