"""Small models for the tests of the registry: their manifest, their wheels, and a hub that serves them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from saec.vlm.manifest import HubSource, ModelEntry, PinnedFile, WheelSource

TOWER, WORDS = b"tower" * 1000, b"words" * 900
BYTES = {"tower.onnx": TOWER, "words.gguf": WORDS}
MEMBERS = {"tower.onnx": "eye/models/tower.onnx", "words.gguf": "mouth/words.gguf"}
EYE = WheelSource(kind="wheel", package="Eye-Model", version="0.1.1", members={"tower.onnx": MEMBERS["tower.onnx"]})
MOUTH = WheelSource(kind="wheel", package="mouth", version="2.0", members={"words.gguf": MEMBERS["words.gguf"]})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


TINY = ModelEntry(
    name="tiny",
    family="loupe",
    licence="MIT",
    about="Two files from two wheels.",
    files=tuple(PinnedFile(path=path, size=len(data), sha256=sha256(data)) for path, data in BYTES.items()),
    sources=(EYE, MOUTH),
)
LEARNT = ModelEntry(
    name="learnt",
    family="smolvlm",
    licence="Apache-2.0",
    about="Files that only the hub knows.",
    sources=(HubSource(kind="hub", repo="maker/learnt"),),
)
LEARNT_FILES = {"config.json": b'{"model_type": "smolvlm"}', "model.safetensors": b"\x01" * 40_000}


def wheel(folder: Path, source: WheelSource, members: Mapping[str, bytes], *, version: str | None = None) -> Path:
    """Write a wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    name, version = source.package.replace("-", "_").lower(), version or source.version
    info = f"{name}-{version}.dist-info"
    inside = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in inside.items():
            archive.writestr(member, data)
    return path


def wheels(folder: Path) -> Path:
    """Both wheels of ``tiny``."""
    wheel(folder, EYE, {MEMBERS["tower.onnx"]: TOWER})
    wheel(folder, MOUTH, {MEMBERS["words.gguf"]: WORDS})
    return folder


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@dataclass
class Hub:
    """A hub with one repository, as far as ``huggingface_hub`` asks: what it states, and files by range."""

    files: dict[str, bytes]
    stated: dict[str, bytes] = field(default_factory=dict)
    """What it claims a file to be, where that is not what it serves."""
    commit: str = "a" * 40
    stall_after: int | None = None
    """Serve so many bytes of a file, then hang until released."""
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of every request."""
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def listing(self) -> bytes:
        siblings = []
        for name, served in self.files.items():
            data = self.stated.get(name, served)
            one: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
            if name.endswith(".safetensors"):
                one["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return json.dumps({"id": "maker/learnt", "sha": self.commit, "siblings": siblings}).encode()

    def downloads(self, name: str) -> list[str | None]:
        return [span for path, span in self.asked if path.endswith("/" + name)]

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, span = self.path.partition("?")[0], self.headers.get("Range")
                hub.asked.append((path, span))
                if path.startswith("/api/models/maker/learnt/revision/"):
                    self._send(200, hub.listing())
                    return
                found = re.fullmatch(rf"/maker/learnt/resolve/{hub.commit}/(.+)", path)
                data = hub.files.get(found[1]) if found else None
                if data is None:
                    self._send(404, b"")
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0
                self._send(206 if span else 200, data[start:], of=len(data) if span else None, start=start)

            def _send(self, status: int, body: bytes, *, of: int | None = None, start: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if of is not None:
                    self.send_header("Content-Range", f"bytes {start}-{of - 1}/{of}")
                self.end_headers()
                if hub.stall_after is not None and len(body) > hub.stall_after:
                    self.wfile.write(body[: hub.stall_after])
                    self.wfile.flush()
                    hub.stalled.set()
                    hub.released.wait(30)
                    return
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
