"""``saec vlm width``: let a model answer from the tokens of another tower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saec.cli.options import ConfigOption, SetOption


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

    Needed where both have different towers, such as one with an adapter that the other has not yet.
    """
    import numpy as np

    from saec.cli.console import say, say_path
    from saec.cli.measured import images_of
    from saec.cli.options import settings_of
    from saec.vlm.tokens.codec import standardised
    from saec.vlm.tokens.tower import TowerTokeniser
    from saec.vlm.tokens.width import fit_width

    settings = settings_of(config, set_)
    wanted = settings.tokens.model_copy(update={"model": settings.mllm.model, "adapter": settings.mllm.adapter})
    device = TowerTokeniser.load(settings)
    cloud = TowerTokeniser.load(settings.model_copy(update={"tokens": wanted}))
    shown = images_of(images, limit)
    x = [device.basis.coordinates(device.plain(device.see(image)), settings.tokens.dims) for image in shown]
    y = [standardised(cloud.plain(cloud.see(image))) for image in shown]
    made = fit_width(np.stack(x), np.stack(y), source=device.model_id, target=cloud.model_id)
    made.save(out)
    say(f"{len(shown)} images: {made.source} becomes {made.target}")
    say_path("Saved", out)
