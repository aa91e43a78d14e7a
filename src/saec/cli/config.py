"""``saec config``: every setting, what it means, and what it is now."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption, settings_of

app = typer.Typer(no_args_is_help=True, help="Show the settings.")


@app.command()
def show(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Only this section.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Show all settings with their meaning and current value: defaults < --config < environment < --set.

    As an environment variable route.deadline_ms is SAEC_ROUTE__DEADLINE_MS. Tokens and keys are not shown.
    """
    from rich.table import Table

    from saec.cli.console import console, print_json
    from saec.errors import BadInput

    tree = _tree(settings_of(config, set_))
    if section is not None:
        if section not in tree:
            raise BadInput("no such section", where=section, fix=f"one of {', '.join(tree)}")
        tree = {section: tree[section]}
    if json_:
        print_json(tree)
        return
    table = Table(show_lines=False, pad_edge=False, box=None)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("meaning")
    for name, fields in tree.items():
        for key, entry in fields.items():
            text = _text(entry["value"])
            changed = entry["value"] != entry["default"]
            table.add_row(f"{name}.{key}", f"{text} *" if changed else text, entry["meaning"])
        table.add_section()
    console().print(table)
    if any(entry["value"] != entry["default"] for fields in tree.values() for entry in fields.values()):
        console().print("* not the default")


def _tree(settings: Any) -> dict[str, dict[str, dict[str, Any]]]:
    from saec.evaluate.run_record import shown_settings

    values, defaults = shown_settings(settings), shown_settings(type(settings)())
    return {
        section: {
            key: {
                "value": values[section][key],
                "default": defaults[section][key],
                "meaning": field.description or "",
            }
            for key, field in type(getattr(settings, section)).model_fields.items()
        }
        for section in type(settings).model_fields
    }


def _text(value: object) -> str:
    return "–" if value is None else str(value)
