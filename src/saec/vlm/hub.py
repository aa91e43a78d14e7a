"""The Hugging Face hub as a source of models: what it states about a repository, and its files.

Endpoint, token, proxy and offline mode are those of ``huggingface_hub`` itself. Its functions for whole files drop what
they had when they are killed (version 2.4 does), so the one below them that resumes is called: a partial file carries
its hash as its name and is continued by an HTTP range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url

# HTTPError is that of whichever HTTP client it uses: which one that is changed between versions.
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]
from pydantic import ValidationError

from saec.vlm.manifest import FileSpec, HubSource
from saec.vlm.sources import SourceError, belongs


class _Silent(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Stated:
    """The files of a repository at one commit, each with its SHA-256 (large files) or git's SHA-1 (small ones)."""

    commit: str
    files: tuple[FileSpec, ...]


class HubFiles:
    """A repository of the hub, held to one commit from the first question on."""

    def __init__(self, source: HubSource, endpoint: str | None = None) -> None:
        self.label = f"hub {source.repo}"
        self.revision: str | None = None
        self._source, self._endpoint = source, endpoint
        self._stated: _Stated | None = None

    def listing(self) -> Sequence[FileSpec]:
        """Return the checkpoint's files as the hub states them."""
        return self._ask().files

    def fetch(self, wanted: Sequence[FileSpec], scratch: Path) -> Iterator[tuple[FileSpec, Path]]:
        """Yield the wanted files that the repository has."""
        stated = self._ask()
        offered = {file.path for file in stated.files}
        for spec in wanted:
            if spec.path in offered:
                yield spec, self._download(spec, stated.commit, scratch)

    def _ask(self) -> _Stated:
        if self._stated is None:
            source = self._source
            try:
                info = HfApi(endpoint=self._endpoint).model_info(
                    source.repo, revision=source.revision, files_metadata=True, timeout=30
                )
            except (HTTPError, HFValidationError, OSError) as error:
                raise SourceError(_first_line(error)) from None
            found = [_spec(one) for one in info.siblings or () if belongs(one.rfilename)]
            if not any(file.path == "config.json" for file in found):
                raise SourceError("the repository has no config.json")
            self._stated = _Stated(str(info.sha), tuple(found))
            self.revision = self._stated.commit
        return self._stated

    def _download(self, spec: FileSpec, commit: str, scratch: Path) -> Path:
        url = hf_hub_url(self._source.repo, spec.path, revision=commit, endpoint=self._endpoint)
        partial = scratch / f"{spec.sha256 or spec.git_blob}.part"
        # Without compression: a compressed answer cannot be continued in the middle.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        try:
            with partial.open("ab") as file:
                have = file.tell()
                http_get(url, file, resume_size=have, headers=headers, expected_size=spec.size, tqdm_class=_Silent)
        except (HTTPError, OSError) as error:
            if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
                raise  # the disk, not the network
            if partial.stat().st_size > spec.size:
                partial.unlink()  # nothing that could be continued
            raise SourceError(f"{spec.path}: {_first_line(error)}") from None
        return partial


def _spec(one: Any) -> FileSpec:
    sha256 = one.lfs.sha256 if one.lfs else None
    if sha256 is None and one.blob_id is None:
        raise SourceError(f"no hash is stated for {one.rfilename!r}")
    try:
        return FileSpec(path=one.rfilename, size=one.size, sha256=sha256, git_blob=None if sha256 else one.blob_id)
    except ValidationError:
        raise SourceError(f"no usable path, size and hash are stated for {one.rfilename!r}") from None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
