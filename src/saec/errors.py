"""Errors that a user can act on. The command line turns them into one line and an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SaecError(Exception):
    """Base of all errors raised on purpose by this package."""


class BadInput(SaecError):
    """The user's input cannot be used: exit code 2, one line that says what, where, and what to do.

    >>> str(BadInput("no images found", where="parts/", fix="pass a folder with good/ and defect/"))
    'no images found: parts/ (pass a folder with good/ and defect/)'
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what = what
        self.where = str(where)
        self.fix = fix
        super().__init__(what + (f": {self.where}" if self.where else "") + (f" ({fix})" if fix else ""))


class GateFailed(SaecError):
    """The command ran to its end but a stated gate was not met: exit code 1."""


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a message and where in it, without repeating the message."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(step) for step in first['loc']) or 'message'}: {first['msg']}"
