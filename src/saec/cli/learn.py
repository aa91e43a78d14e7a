"""``saec learn``: a station learns on its own stream; every change is small, proven on a probe set, and can go back."""

from __future__ import annotations

import typer

from saec.cli.learn_diff import diff
from saec.cli.learn_distill import distill
from saec.cli.learn_drift import drift
from saec.cli.learn_round import once
from saec.cli.learn_rounds import rounds
from saec.cli.learn_update import apply, rollback, versions

app = typer.Typer(
    no_args_is_help=True,
    help="Learn from what the edge was unsure of: samples up, a teacher's opinion, a compressed update down.",
)
app.command()(once)
app.command()(rounds)
app.command()(distill)
app.command()(drift)
for command in (diff, apply, rollback, versions):
    app.command()(command)
