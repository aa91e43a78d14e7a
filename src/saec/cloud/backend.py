"""What a backend may offer beyond :class:`saec.types.Backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from saec.types import Backend, Query


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


@runtime_checkable
class Closes(Protocol):
    """A backend with threads or connections to let go of."""

    def close(self) -> None:
        """Let go of them; it is not asked any more."""
        ...


def close(backend: Backend) -> None:
    """Let the backend go of what it holds, if anything."""
    if isinstance(backend, Closes):
        backend.close()


def probe() -> Query:
    """Return the question that a warm-up asks: grey nothing."""
    return Query("probe", "probe", np.full((64, 64, 3), 127, np.uint8), (64, 64))


@runtime_checkable
class Computes(Protocol):
    """A backend that says where it computes, once it is warm: ``cpu``, the name of a GPU, or an endpoint's address."""

    @property
    def device(self) -> str:
        """Where it computes."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A backend that can begin with a question in threads of its own before its batch's turn has come."""

    def prepare(self, query: Query) -> Query:
        """Return at once what to hand to ``judge`` in the query's place. Thread-safe."""
        ...


def prepared(backend: Backend, query: Query) -> Query:
    """Let the backend begin with the query, where it can."""
    return backend.prepare(query) if isinstance(backend, Prepares) else query


@runtime_checkable
class SwapsAdapter(Protocol):
    """A backend whose adapter can be changed while it serves."""

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with the adapter in ``folder``, or with none, from the next batch on. Thread-safe."""
        ...
