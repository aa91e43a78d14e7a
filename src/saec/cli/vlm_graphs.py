"""``saec vlm validate`` and ``saec vlm rename``: decoder graphs held to their signature, cache tensors renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.evaluate.table import Table
    from saec.vlm.contract.signature import Signature
    from saec.vlm.export.validate import Problem


def validate(
    target: Annotated[
        Path, typer.Argument(metavar="DIR|FILE.onnx", help="An exported model, or a decoder alone.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="CHECKPOINT",
            help="Folder with config.json, or .gguf file, whose decoder it must be. Default: what the target says.",
            show_default=False,
        ),
    ] = None,
    kv_style: Annotated[
        Literal["dot", "genie"] | None,
        typer.Option("--kv-style", help="How cache tensors must be called.", show_default=False),
    ] = None,
    cache: Annotated[
        int | None, typer.Option("--cache", min=1, help="Tokens in the cache.", show_default=False)
    ] = None,
    ar: Annotated[
        int | None, typer.Option("--ar", min=1, help="New tokens at a time, of a fixed graph.", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None, typer.Option("--dtype", help="Number format.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Compare inputs and outputs of a decoder with what its model's configuration asks for; exit code 1 if they differ.

    Names, shapes and number formats count, and that all weights are there; of an exported model also that no file has
    changed since. What is not given is as the target's own record says.
    """
    from saec.cli.console import print_json, print_tables, say
    from saec.errors import GateFailed
    from saec.vlm.contract.bundle import read_bundle
    from saec.vlm.export.validate import stored_signature, validate_bundle, validate_decoder

    bundle = read_bundle(target) if target.is_dir() else None
    stored = bundle.signature if bundle else stored_signature(target)
    signature = _asked(target, stored, config, {"style": kv_style, "cache": cache, "n": ar, "dtype": dtype})
    if bundle:
        problems = validate_bundle(target, bundle.model_copy(update={"signature": signature}))
    else:
        problems = validate_decoder(target, signature)
    if json_:
        tree = {"target": str(target), "signature": signature.model_dump(mode="json")}
        print_json(tree | {"problems": [asdict(problem) for problem in problems]})
    elif problems:
        print_tables(_table(target, problems))
    else:
        say(f"{len(signature.inputs)} inputs and {len(signature.outputs)} outputs of the decoder are right.")
    if problems:
        raise GateFailed(f"{target} differs from its signature in {len(problems)} places")


def rename(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="A decoder.", show_default=False)],
    to: Annotated[
        Literal["dot", "genie"],
        typer.Option("--to", help="past_key_values.0.key or past_key_0_in.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE.onnx", help="Where to write it, weights beside it.", show_default=False
        ),
    ],
    json_: JsonOption = False,
) -> None:
    """Give a decoder's cache tensors their names in the other style; the graph stays the same, bit by bit."""
    from saec.cli.console import print_json, say_path
    from saec.vlm.export.rename import rename as write

    written = write(file, to, out)
    if json_:
        print_json({"style": to, "files": [str(path) for path in written]})
        return
    for path in written:
        say_path("Written", path)


def _asked(target: Path, stored: Signature | None, config: Path | None, changes: Mapping[str, object]) -> Signature:
    """Return the signature that the target must have: its own, but for what the options say."""
    from saec.errors import BadInput
    from saec.vlm.contract.signature import Signature
    from saec.vlm.export.weights import config_shape

    given = {key: value for key, value in changes.items() if value is not None}
    if config is not None:
        given["shape"] = config_shape(config)
    if stored is not None:
        return stored.model_copy(update=given)
    if "shape" not in given or "cache" not in given:
        fix = "pass --config CHECKPOINT and --cache TOKENS"
        raise BadInput("the file does not say which signature it should have", where=target, fix=fix)
    return Signature.model_validate(given)


def _table(target: Path, problems: Sequence[Problem]) -> Table:
    from saec.evaluate.table import Table

    columns = ("file", "what", "name", "kind", "expected", "found")
    return Table(f"Problems of {target}", columns, [asdict(problem) for problem in problems])
