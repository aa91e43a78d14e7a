"""Versions made and taken back in a process of its own, to be killed at any moment: ``python slots_killed.py ROOT``.

Every file of a version holds its number. A line is printed once a version counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from saec.fleet.slots import Slots


def main(root: Path) -> None:
    slots = Slots(root)
    while True:
        with slots.alone():
            version = slots.pointer.highest + 1

            def fill(folder: Path, number: int = version) -> None:
                for name in ("a/weights", "b/weights", "index"):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(f"{number}\n" * 2000)

            slots.stage(fill)
            if version % 5 == 0:
                slots.refuse(version, f"{version:08}", {})
            else:
                slots.switch(version, f"{version:08}")
            if version % 3 == 0:
                slots.back()
        print(version, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
