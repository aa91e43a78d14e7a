"""``saec vlm width``: let a model answer from the tokens of another tower."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from saec.cli.options import ConfigOption, SetOption
from saec.errors import BadInput

POOR = 0.3
"""R² below which a projector comes with a warning."""


def width(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of parts that both towers look at.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="For mllm.width of the cloud.", show_default=False)
    ],
    limit: Annotated[int, typer.Option(help="At most this many images.", min=1)] = 300,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Fit how the tokens of the edge's tower (settings of tokens) become those that the cloud's model (mllm) takes.

    Needed where both have different towers, such as one with an adapter that the other has not yet. Says how much of
    the tokens' variance it gives back on images that it was not fitted to.
    """
    import numpy as np

    from saec.cli.console import console, say, say_path
    from saec.cli.measured import images_of
    from saec.cli.options import settings_of
    from saec.vlm.tokens.codec import standardised
    from saec.vlm.tokens.tower import TowerTokeniser
    from saec.vlm.tokens.width import FEWEST, fit_width, held_out_r2

    if out.is_dir() or not out.resolve().parent.is_dir():
        raise BadInput("no file can be written here", where=out, fix="pass a file in a folder that is there")
    settings = settings_of(config, set_)
    wanted = settings.tokens.model_copy(update={"model": settings.mllm.model, "adapter": settings.mllm.adapter})
    device = TowerTokeniser.load(settings)
    cloud = TowerTokeniser.load(settings.model_copy(update={"tokens": wanted}))
    shown = images_of(images, limit)
    x = np.stack([device.basis.coordinates(device.plain(device.see(image)), settings.tokens.dims) for image in shown])
    y = np.stack([standardised(cloud.plain(cloud.see(image))) for image in shown])
    made, r2 = fit_width(x, y, source=device.model_id, target=cloud.model_id), held_out_r2(x, y)
    try:
        made.save(out)
    except OSError as error:
        fix = error.strerror or "check the disk"
        raise BadInput("the projector cannot be written", where=out, fix=fix) from None
    say(f"{len(shown)} images: {made.source} becomes {made.target}")
    quality = "unknown, too few images" if r2 is None else f"{r2:.2f} (1: all of the tokens' variance, 0: none)"
    say(f"R² on every fifth image, fitted to the others: {quality}")
    for warning in _warnings(len(shown) < FEWEST, made.source == made.target, r2):
        console(stderr=True).print(f"warning: {warning}")
    say_path("Saved", out)


def _warnings(few: bool, same: bool, r2: float | None) -> Iterator[str]:
    from saec.vlm.tokens.width import FEWEST

    if same:
        yield "both towers are the same: the cloud takes these tokens as they are, and a projector only loses"
    if few:
        yield f"with fewer than {FEWEST} images it hardly holds for others"
    if r2 is not None and r2 < POOR:
        yield f"R² below {POOR:g}: answers from these tokens will be poor; try saec bench uplink before relying on them"
