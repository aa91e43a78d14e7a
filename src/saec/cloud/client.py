"""The edge's side: ask a cloud service over HTTP, or a backend in the same process.

One question, one try: repeating and the circuit breaker belong to :mod:`saec.route`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import httpx
from pydantic import ValidationError

from saec.cloud import wire
from saec.cloud.images import encode_jpeg, shrink
from saec.cloud.transport import Reply, Tally, Uplink
from saec.config import CloudSettings
from saec.errors import BadInput
from saec.types import CloudError, Image, Opinion, Query, Reason

_KEPT_REFERENCES = 64


@dataclass(frozen=True, slots=True)
class _Reference:
    image: Image
    sha256: str
    jpeg: bytes


class HttpCloudClient:
    """Asks a cloud service; thread-safe, with pooled connections.

    The image is shrunk to ``max_side`` and sent as JPEG (see :mod:`saec.cloud.images`); a reference image goes up once
    and is named by its hash afterwards, so a caller must not change a reference array it has passed.
    ``Opinion.uplink_bytes`` and ``CloudError.uplink_bytes`` are the exact bytes of the request bodies of that question:
    frame, JSON header, JPEG, anomaly map, and reference images that it was the first to need. HTTP headers, TLS and TCP
    are not in it.
    """

    def __init__(
        self,
        url: str,
        settings: CloudSettings,
        *,
        transport: httpx.BaseTransport | None = None,
        model_id: str = "cloud",
    ) -> None:
        self.model_id = model_id
        self._settings = settings
        self._uplink = Uplink(url, token=settings.token, connections=settings.in_flight, transport=transport)
        self._references: OrderedDict[int, _Reference] = OrderedDict()
        self._uploaded: set[str] = set()
        self._lock = threading.Lock()
        self._uploading = threading.Lock()

    @property
    def uplink_bytes(self) -> int:
        """Request body bytes of all questions so far, failed ones included."""
        return self._uplink.bytes_sent

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Return the service's opinion within ``deadline_s`` seconds.

        Raises:
            CloudError: CLOUD_TIMEOUT, CLOUD_REFUSED (with the wait asked for), CLOUD_UNREACHABLE or CLOUD_BAD_ANSWER.
        """
        begun = time.monotonic()
        deadline = begun + deadline_s
        tally = Tally()
        try:
            references, body = self._encode(query)
            encoded = time.monotonic()
            self._upload(references.values(), deadline, tally)
            reply = self._ask(body, deadline, tally)
            if reply.status == 409:  # the service was restarted, or forgot a reference image for want of room
                self._uploaded.difference_update(_missing(reply))
                self._upload(references.values(), deadline, tally)
                reply = self._ask(body, deadline, tally)
            opinion = self._opinion(reply, query)
        except CloudError as error:
            error.uplink_bytes = tally.bytes
            raise
        self.model_id = opinion.model_id
        timing_ms = {**opinion.timing_ms, "encode": round((encoded - begun) * 1e3, 3)}
        return replace(opinion, uplink_bytes=tally.bytes, timing_ms=timing_ms)

    def close(self) -> None:
        """Close the pooled connections."""
        self._uplink.close()

    def _encode(self, query: Query) -> tuple[dict[str, _Reference], bytes]:
        """Return the question's reference images by name, and its body."""
        side, quality = self._settings.max_side, self._settings.jpeg_quality
        try:
            references = {each.sha256: each for each in map(self._reference, query.references)}
            return references, wire.encode_question(query, list(references), max_side=side, jpeg_quality=quality)
        except ValueError as error:
            raise CloudError(Reason.CLOUD_REFUSED, f"this part cannot be put to the cloud ({error})") from None

    def _ask(self, body: bytes, deadline: float, tally: Tally) -> Reply:
        headers = {
            "Content-Type": wire.CONTENT_TYPE,
            wire.DEADLINE_HEADER: f"{max(0.0, deadline - time.monotonic()) * 1e3:.1f}",
        }
        return self._uplink.request("POST", "/v1/judge", deadline=deadline, body=body, headers=headers, tally=tally)

    def _upload(self, references: Iterable[_Reference], deadline: float, tally: Tally) -> None:
        """Upload what the service does not have yet; the first of several questions at once does it for all."""
        if all(each.sha256 in self._uploaded for each in references):
            return
        if not self._uploading.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise CloudError(Reason.CLOUD_TIMEOUT, "the upload of a reference image took too long")
        try:
            for each in references:
                if each.sha256 not in self._uploaded:
                    path = f"/v1/references/{each.sha256}"
                    reply = self._uplink.request("PUT", path, deadline=deadline, body=each.jpeg, tally=tally)
                    if reply.status != 204:
                        raise reply.refusal()
                    self._uploaded.add(each.sha256)
        finally:
            self._uploading.release()

    def _reference(self, image: Image) -> _Reference:
        """Return the JPEG and name of a reference image, coded once for each array."""
        with self._lock:
            known = self._references.get(id(image))
            if known is not None:
                self._references.move_to_end(id(image))
                return known
        jpeg = encode_jpeg(shrink(image, self._settings.max_side), self._settings.jpeg_quality)
        made = _Reference(image, hashlib.sha256(jpeg).hexdigest(), jpeg)
        with self._lock:
            # Holding the array keeps its id from being given to another one.
            self._references[id(image)] = made
            while len(self._references) > _KEPT_REFERENCES:
                self._references.popitem(last=False)
        return made

    def _opinion(self, reply: Reply, query: Query) -> Opinion:
        if reply.status != 200:
            raise reply.refusal()
        try:
            return wire.decode_opinion(reply.body, query.original_size)
        except wire.BadAnswer as error:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, f"the answer cannot be used ({error})") from None


def probe(url: str, settings: CloudSettings, *, transport: httpx.BaseTransport | None = None) -> wire.Health:
    """Ask a service who it is, before a run begins; the answer's ``model_id`` names the model.

    Raises:
        BadInput: nothing answers there, it is not a cloud service of this version, it is not ready, or it refuses the
            token.
    """
    uplink = Uplink(url, token=settings.token, connections=1, transport=transport)
    try:
        reply = uplink.request("GET", "/v1/model", deadline=time.monotonic() + min(settings.timeout_s, 5.0))
    except CloudError as error:
        what = f"the cloud service does not answer ({error})"
        raise BadInput(what, where=url, fix="start it with saec cloud serve, or pass --cloud off") from None
    finally:
        uplink.close()
    if reply.status == 401:
        raise BadInput("the cloud service refuses the token", where=url, fix="set cloud.token to its serve.token")
    try:
        health = wire.Health.model_validate_json(reply.body)
    except ValidationError:
        what = f"this is not a saec cloud service (status {reply.status})"
        raise BadInput(what, where=url, fix="check host and port") from None
    if health.wire != wire.VERSION:
        what = f"the cloud service speaks wire version {health.wire}, not {wire.VERSION}"
        raise BadInput(what, where=url, fix="install the same version of saec on both sides")
    if health.status != "ready":
        raise BadInput(f"the cloud service is {health.status}", where=url, fix="wait until its /healthz says ready")
    return health


def _missing(reply: Reply) -> list[str]:
    missing = reply.problem.get("missing")
    return [str(name) for name in missing] if isinstance(missing, list) else []
