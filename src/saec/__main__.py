"""``python -m saec``."""

from saec.cli import main

main()
