"""A compressed update on its way: a frame of kind ``update``, bound to its base and authenticated.

The header names target, both hashes, both versions, the figures of the validation and where it comes from; the arrays
are the change's. The HMAC-SHA256 under the service's token covers all of it, so whoever lacks the token can neither
change a byte nor make an update. The cloud validates the *decoded* state, whose hash the header states: what a device
has after applying is that very state.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from saec.errors import BadInput, first_problem
from saec.fleet.frame import BadFrame, Frame, decode_frame, encode_frame
from saec.learn.delta import Delta
from saec.learn.state import BANKS, State, check_names, digest
from saec.vlm.trained import WEIGHTS

KIND = "update"

ADAPTER = "adapter"
"""The target of an update of an adapter; that of a station's product is ``product:NAME``."""

_MAC = "hmac"
_FIELDS = ("target", "base_sha256", "new_sha256", "version", "previous", "figures", "provenance", "delta")


class Refused(BadInput):
    """An update that must not be applied here; the text says which of its claims does not hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """A change of ``target``. ``previous`` is the version that it was made for; versions only grow."""

    target: str
    base_sha256: str
    new_sha256: str
    version: int
    previous: int
    delta: Delta
    figures: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, base: State) -> State:
        """Return the new state.

        Raises:
            Refused: made for another base, or it does not decode to the state that it names.
        """
        if (found := base.sha256) != self.base_sha256:
            what = f"the update was made for another base ({self.base_sha256[:12]}, here is {found[:12]})"
            raise Refused(what, where=self.target, fix="ask for one for this version")
        try:
            new = self.delta.apply(base)
        except ValueError as error:
            raise Refused(f"the update is damaged ({error})", where=self.target, fix="fetch it again") from None
        if new.sha256 != self.new_sha256:
            raise Refused("the update does not make the state that it names", where=self.target, fix="fetch it again")
        return new


def product_target(product: str) -> str:
    """Return the target of an update of a station's product."""
    return f"product:{product}"


def product_of(target: str) -> str | None:
    """Return the product of a target, ``None`` for an adapter.

    Raises:
        Refused: neither.
    """
    kind, _, product = target.partition(":")
    if target != ADAPTER and (kind != "product" or not product):
        raise Refused("an update of something unknown", where=target, fix="update saec")
    return product or None


def encode_update(update: Update, key: bytes | None) -> bytes:
    """Return the update as a frame, authenticated where there is a key."""
    header = {
        "target": update.target,
        "base_sha256": update.base_sha256,
        "new_sha256": update.new_sha256,
        "version": update.version,
        "previous": update.previous,
        "figures": dict(update.figures),
        "provenance": dict(update.provenance),
        "delta": dict(update.delta.header),
    }
    header |= {} if key is None else {_MAC: _mac(header, update.delta, key)}
    return encode_frame(Frame(KIND, header, update.delta.arrays))


def decode_update(data: bytes, key: bytes | None, most: int) -> Update:
    """Return the update in ``data``, which unpacks to at most ``most`` bytes, after checking who made it.

    Raises:
        Refused: cut off, changed, too large, no update, not made with this key, or it names files that its target does
            not have.
    """
    try:
        frame = decode_frame(data, kinds=(KIND,), most=most)
    except BadFrame as error:
        fix = "pass what saec learn diff or the cloud made, whole"
        raise Refused(f"no update ({error})", fix=fix) from None
    header = dict(frame.header)
    mac = header.pop(_MAC, None)
    if set(header) != set(_FIELDS):
        raise Refused("no update (its header has other fields)", fix="update saec")
    delta = Delta(header["delta"], frame.arrays)
    if key is None and mac is not None:
        raise Refused("the update is authenticated, but there is no key to check it with", fix="pass the token")
    if key is not None and (mac is None or not hmac.compare_digest(str(mac), _mac(header, delta, key))):
        what = "the update is not authenticated" if mac is None else "the update was not made with this key"
        raise Refused(what, fix="fetch it from the cloud service with its token")
    _check(str(header["target"]), delta.header)
    try:
        return Update(
            target=str(header["target"]),
            base_sha256=str(header["base_sha256"]),
            new_sha256=str(header["new_sha256"]),
            version=int(header["version"]),
            previous=int(header["previous"]),
            delta=delta,
            figures=dict(header["figures"]),
            provenance=dict(header["provenance"]),
        )
    except (TypeError, ValueError) as error:
        raise Refused(f"no update ({error})", fix="update saec") from None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    set: dict[str, Any]
    gone: list[str]


class _Header(BaseModel):
    """What a delta's header must be before anything reads it."""

    model_config = ConfigDict(extra="forbid")

    ways: dict[str, Literal["dense", "rows", "gone"]]
    document: _Document
    sparse: dict[str, Any] | None
    error: float


def _check(target: str, header: Mapping[str, Any]) -> None:
    """Refuse a delta that is built otherwise, or whose names would become other files than the target's."""
    main = WEIGHTS if product_of(target) is None else BANKS
    try:
        found = _Header.model_validate(header)
        check_names(found.ways, [*found.document.set, *found.document.gone], main)
    except ValidationError as error:
        raise Refused(f"no update ({first_problem(error)})", fix="update saec") from None
    except BadInput as error:
        raise Refused(
            f"the update must not be applied ({error})", where=target, fix="do not trust its source"
        ) from None


def _mac(header: Mapping[str, Any], delta: Delta, key: bytes) -> str:
    return hmac.digest(key, digest(delta.arrays, header), "sha256").hex()
