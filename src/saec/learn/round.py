"""A round that has begun, as it lies on the line's disk: its samples, the request, and the answer once it is here.

The images stay where they are: a sample is the part's verdict, which names its file, and a person's label. From these
a round can be begun anew whenever what went up is of no use any more.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.desk import Name
from saec.config import Settings
from saec.data.hashing import sha256_json
from saec.data.manifest import write_atomic
from saec.edge.station import folder_name
from saec.errors import BadInput, first_problem
from saec.fleet.sqlite_file import lock
from saec.fleet.verdict_json import verdict_from_json, verdict_to_json
from saec.learn.teacher import Request
from saec.types import CloudError, Label, Reason, Verdict

ROUND = "round.json"


class RoundOver(CloudError):
    """A round has ended without an update, and would end so again; its samples come again with the next one."""

    def __init__(self, why: str) -> None:
        what = f"{why}; the round is closed, and its samples come again with the next one"
        super().__init__(Reason.CLOUD_BAD_ANSWER, what)


@dataclass(frozen=True, slots=True)
class Line:
    """One product of a station on a line. ``station`` is its folder, with its slots. Samples go up as
    ``settings.cloud.uplink`` says; ``settings.learn`` says the rest."""

    station: Path
    product: str
    settings: Settings

    @property
    def home(self) -> Path:
        """Where rounds lie: in the station's folder, with which they go when another is fitted in its place."""
        return self.station / "learn" / folder_name(self.product)

    @property
    def key(self) -> bytes | None:
        """What updates are authenticated with: the cloud service's token."""
        token = self.settings.cloud.token
        return None if token is None else token.encode()


class Taken(BaseModel):
    """One sample: the verdict on the part, its path absolute, and what a person calls it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: dict[str, Any]
    human: Label | None = None

    @classmethod
    def of(cls, verdict: Verdict, human: Label | None) -> Taken:
        """Take a part."""
        return cls(verdict=json.loads(verdict_to_json(verdict)), human=human)

    @property
    def sha256(self) -> str:
        """The content hash of its image."""
        return str(self.verdict["sha256"])

    def as_verdict(self) -> Verdict:
        """Return the verdict.

        Raises:
            BadInput: it is none.
        """
        return verdict_from_json(json.dumps(self.verdict), where=self.verdict.get("part_id", ""))


class Round(BaseModel):
    """``samples`` by the names of their frames; ``given`` identifies what the call that began it was given, ``uplink``
    how samples travel, ``result`` is the cloud's answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begun: str
    given: Name
    uplink: Literal["image", "crop", "tokens"]
    request: dict[str, Any]
    samples: dict[Name, Taken] = Field(min_length=1)
    result: dict[str, Any] | None = None

    @property
    def asked(self) -> Request:
        """The request, read."""
        return Request.model_validate(self.request)

    @property
    def job(self) -> str:
        """The id of the cloud's job: the same request is the same job."""
        return sha256_json(self.request)

    def save(self, home: Path) -> None:
        """Make it durable.

        Raises:
            OSError: the disk refuses.
        """
        write_atomic(home / ROUND, self.model_dump_json())

    @classmethod
    def load(cls, home: Path) -> Round | None:
        """Return the round that is open, ``None`` where there is none.

        Raises:
            BadInput: it is damaged, or of another version.
        """
        file = home / ROUND
        try:
            found = cls.model_validate_json(file.read_bytes())
            found.asked  # noqa: B018 - it must be one
            for taken in found.samples.values():
                taken.as_verdict()
        except FileNotFoundError:
            return None
        except ValidationError as error:
            why = first_problem(error)
        except BadInput as error:
            why = error.what
        else:
            return found
        fix = "remove the file: its samples are asked about again"
        raise BadInput(f"the round is damaged ({why})", where=file, fix=fix)


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Keep other processes from learning here inside the block; the system ends it with the process.

    Raises:
        BadInput: another one is at it, or the folder cannot be written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = lock(home / "round")
    except sqlite3.OperationalError as error:
        what = f"this product learns already, in another process ({error})"
        raise BadInput(what, where=home, fix="wait for it to end") from None
    except OSError as error:
        raise BadInput("the folder cannot be written", where=home, fix=error.strerror or "check it") from None
    with closing(held):
        yield


def given_by(verdicts: Sequence[Verdict], labels: Mapping[str, Label]) -> str:
    """Return what identifies the parts and labels of a call."""
    return sha256_json({"parts": sorted(v.sha256 for v in verdicts), "labels": {k: str(v) for k, v in labels.items()}})
