"""The command line: one file for each group of commands."""


def main() -> None:
    """Entry point of ``saec``. Ends the process: 0 done, 1 a gate failed, 2 bad input, 130 interrupted."""
    from saec.cli.app import app

    app(prog_name="saec")
