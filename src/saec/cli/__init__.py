"""The command line."""


def main() -> None:
    """Entry point of ``saec``."""
    raise SystemExit(2)
