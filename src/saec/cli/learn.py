"""``saec learn``: a station learns on its own stream; every change is small, proven on a probe set, and can go back."""

from __future__ import annotations

import typer

from saec.cli.learn_distill import distill

app = typer.Typer(
    no_args_is_help=True,
    help="Learn from what the edge was unsure of: samples up, a teacher's opinion, a compressed update down.",
)
app.command()(distill)
