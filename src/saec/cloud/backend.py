"""What a backend may offer beyond :class:`saec.types.Backend`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from saec.types import Backend


@runtime_checkable
class WarmsUp(Protocol):
    """A backend with work to do before its first question: loading weights, checking that its endpoint answers."""

    def warm_up(self) -> None:
        """Get ready; may set ``model_id``. Called once, in the thread that will call ``judge``."""
        ...


def warm_up(backend: Backend) -> None:
    """Run the backend's warm-up, where it has one."""
    if isinstance(backend, WarmsUp):
        backend.warm_up()
