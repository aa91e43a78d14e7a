"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps, where the state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stop:
    """True once the process was asked to stop. A second Ctrl-C interrupts at once. A context manager."""

    def __init__(self) -> None:
        self._asked = False
        self._former: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
