"""How the families of exported VLMs are asked: Loupe in a form of its own, all others through their chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.vlm.contract.bundle import TOKENIZER, Bundle
from saec.vlm.edge.chat import ChatPrompts, Feeds
from saec.vlm.loupe.inputs import LoupePrompts
from saec.vlm.prompt import Question


class Prompts(Protocol):
    """From questions to token ids and pictures."""

    def ids(self, question: Question) -> list[int]:
        """Return the ids of a question, which end after its prefill."""
        ...

    def text_ids(self, text: str, *, system: str, images: int) -> list[int]:
        """Return the ids of a free question about pictures, which end where the answer begins."""
        ...

    def pictures(self, question: Question) -> list[Feeds]:
        """Return the vision graph's inputs for each image of a question."""
        ...

    def shared(self, question: Question, ids: Sequence[int]) -> int:
        """Return how many ids begin the prompts of all parts that are shown with the same references."""
        ...


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a bundle, which cuts and pads nothing.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exceptions
        raise BadInput(f"not a usable tokenizer ({error})", where=folder / TOKENIZER) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def prompts_of(bundle: Bundle, tokenizer: Tokenizer) -> Prompts:
    """Return the prompts of a bundle's family.

    Raises:
        BadInput: it has no chat template, or one that cannot be used.
    """
    return _Loupe(tokenizer) if bundle.family == "loupe" else ChatPrompts(tokenizer, bundle)


def at_its_size(bundle: Bundle, settings: MllmSettings) -> MllmSettings:
    """Return the settings with the image sizes they leave open: what the vision graph sees, and no larger."""
    if bundle.vision is None:
        return settings
    own = {"max_side": bundle.vision.preprocess.side, "side_multiple": 1}
    return settings.model_copy(update={k: v for k, v in own.items() if k not in settings.model_fields_set})


class _Loupe:
    """One picture, no instructions, and next to nothing before the picture."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._prompts = LoupePrompts(tokenizer)
        self.ids = self._prompts.ids

    def text_ids(self, text: str, *, system: str, images: int) -> list[int]:
        if system or images != 1:
            what = "Loupe takes no instructions" if system else "Loupe answers about an image only"
            raise BadInput(what, fix="leave --system out" if system else "pass --image")
        return self._prompts.text_ids(text)

    def pictures(self, question: Question) -> list[Feeds]:
        return [self._prompts.picture(question)]

    def shared(self, question: Question, ids: Sequence[int]) -> int:
        return 0
