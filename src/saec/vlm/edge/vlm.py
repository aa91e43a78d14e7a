"""An exported VLM in ONNX Runtime: decisions, evidence, and free questions. No torch, no transformers.

One thread at a time: conversations share the graphs' threads, and more callers than that would only wait for the same
cores. The folder it is loaded from is a :mod:`saec.vlm.contract.bundle`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from saec.errors import BadInput
from saec.types import Image
from saec.vlm.answers import Decision
from saec.vlm.contract.bundle import DECODER, EMBEDDING, TOKENIZER, VISION, Bundle, read_bundle
from saec.vlm.edge.chat import ChatPrompts, Feeds, fit, refuse_controls
from saec.vlm.edge.generate import GREEDY, Sampling, generate, pieces
from saec.vlm.edge.kv import Prefix
from saec.vlm.edge.session import Array, Conversation, Decoder, open_graph
from saec.vlm.looks import decisions
from saec.vlm.loupe.inputs import LoupePrompts
from saec.vlm.prompt import Ask, Question, ask_evidence


class Prompts(Protocol):
    """How a family is asked."""

    def ids(self, question: Question) -> list[int]:
        """Return the ids of a question, which end after its prefill."""
        ...

    def text_ids(self, text: str, *, system: str, images: int) -> list[int]:
        """Return the ids of a free question about pictures, which end where the answer begins."""
        ...

    def pictures(self, question: Question) -> list[Feeds]:
        """Return the vision graph's inputs for each image of a question."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A question that was decided, and the model's state after it: its evidence needs no second look."""

    question: Question
    ids: tuple[int, ...]
    after: Conversation


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """The beginning of free questions about one picture: instructions and image, and their keys and values."""

    ids: tuple[int, ...]
    prefix: Prefix
    system: str
    images: int


@dataclass(slots=True, eq=False)
class Answer:
    """An answer as it comes: iterate over it, once, for pieces of text.

    ``timing_ms`` has ``vision`` and ``prefill``, and with the first token ``first_token`` since the question; at the
    end ``decode``, the time of all tokens but the first. ``reused`` of ``prompt_tokens`` were not computed again.
    """

    prompt_tokens: int
    reused: int
    timing_ms: dict[str, float]
    tokens: int = 0
    _pieces: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self._pieces


class OnnxVlm:
    """A bundle that answers. One thread at a time."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        decoder: Decoder,
        embedding: ort.InferenceSession,
        vision: ort.InferenceSession | None,
    ) -> None:
        self.bundle = bundle
        self.model_id = bundle.model_id
        self._tokenizer = tokenizer
        self._decoder, self._embedding, self._vision = decoder, embedding, vision
        loupe = bundle.family == "loupe"
        self._prompts: Prompts = _LoupePrompts(tokenizer) if loupe else ChatPrompts(tokenizer, bundle)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 2) -> Self:
        """Load a bundle; its files are held to their hashes first.

        Raises:
            BadInput: no bundle, or a damaged one.
        """
        bundle = read_bundle(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exceptions
            raise BadInput(f"not a usable tokenizer ({error})", where=folder / TOKENIZER) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        decoder = Decoder(folder / DECODER, bundle.signature, threads=threads)
        embedding = open_graph(folder / EMBEDDING, threads=1)
        vision = None if bundle.vision is None else open_graph(folder / VISION, threads=threads)
        return cls(bundle, tokenizer, decoder, embedding, vision)

    def look(self, question: Question) -> tuple[NDArray[np.float64], Seen]:
        """Return the log-probabilities [2] of the labels 0 and 1, and what evidence can be asked from.

        Raises:
            BadInput: the model has no label tokens, or the question does not fit into its context.
        """
        labels = self.bundle.prompt.labels
        if labels is None:
            raise BadInput("this model was exported without labels: it cannot decide", where=self.bundle.name)
        ids = self._prompts.ids(question)
        conversation = self._decoder.open()
        logits = self._feed(conversation, ids, lambda: self._prompts.pictures(question)).astype(np.float64)
        highest = logits.max()
        found = logits[list(labels)] - highest - np.log(np.exp(logits - highest).sum())
        return found, Seen(question, tuple(ids), conversation)

    def decide(self, question: Question) -> tuple[Decision, Seen]:
        """Decide one question from one look; see :meth:`look`."""
        found, seen = self.look(question)
        return decisions(found[None, None])[0], seen

    def evidence(
        self, question: Question, seen: Seen | None = None, *, max_tokens: int, deadline: float | None = None
    ) -> str:
        """Return the greedy answer to the question for evidence, cut off after ``max_tokens`` or at the context's end.

        ``seen`` is what deciding about the same pictures left. No token is computed once :func:`time.monotonic` has
        passed ``deadline``.
        """
        asked = ask_evidence(question) if question.ask is Ask.LABEL else question
        ids = self._prompts.ids(asked)
        shared = 0 if seen is None or not _same_images(seen.question, asked) else _common(seen.ids, ids)
        conversation = self._decoder.open() if seen is None or not shared else seen.after.fork(shared)
        logits = self._feed(conversation, ids, lambda: self._prompts.pictures(asked))
        most, ends = min(max_tokens, conversation.left), self.bundle.prompt.ends
        tokens = generate(conversation, self._embed, logits, ends=ends, max_tokens=most, deadline=deadline)
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def begin(self, image: Image | None, *, system: str = "") -> Start:
        """Compute the beginning that all free questions about an image share.

        Raises:
            BadInput: it does not fit, or the model takes no image or no instructions.
        """
        refuse_controls(self._tokenizer, system)
        images = 0 if image is None else 1
        # Where a user's text begins is where the prompts of two texts part.
        one, other = (self._prompts.text_ids(text, system=system, images=images) for text in ("0", "a"))
        ids = one[: _common(one, other)]
        conversation = self._decoder.open()
        self._feed(conversation, ids, lambda: self._pictures(image))
        return Start(tuple(ids), conversation.keep(), system, images)

    def stream(
        self,
        image: Image | None,
        text: str,
        *,
        system: str = "",
        start: Start | None = None,
        max_tokens: int = 128,
        sampling: Sampling = GREEDY,
        cut: bool = False,
        deadline: float | None = None,
    ) -> Answer:
        """Ask a free question about an image, or none; the prompt is computed at once, the answer as it is read.

        ``start`` is :meth:`begin` of the same image and instructions, which then are not given again; it is not
        changed. ``cut`` allows the middle of a text that is too long to be cut out.

        Raises:
            BadInput: a text with control tokens or another image, a prompt that is too long with ``max_tokens``, an
                image that this model does not take, or a start of another model.
        """
        begun = time.monotonic()
        if start is not None:
            system, images = start.system, start.images
        else:
            images = 0 if image is None else 1
            refuse_controls(self._tokenizer, system)
        refuse_controls(self._tokenizer, text)
        room = self._decoder.signature.cache + 1 - max_tokens
        ids = fit(lambda t: self._prompts.text_ids(t, system=system, images=images), text, room, cut=cut)
        shared = 0 if start is None else _common(start.ids, ids)
        if start is not None and (shared == 0 or self.bundle.prompt.image_token in ids[shared:]):
            raise BadInput("the saved beginning is not that of this prompt", fix="make it again with saec vlm cache")
        conversation = self._decoder.open() if start is None else self._decoder.open(start.prefix, shared)
        answer = Answer(len(ids), conversation.length, {})
        logits = self._feed(conversation, ids, lambda: self._pictures(image), answer.timing_ms)
        tokens = generate(
            conversation,
            self._embed,
            logits,
            ends=self.bundle.prompt.ends,
            max_tokens=max_tokens,
            sampling=sampling,
            deadline=deadline,
        )
        answer._pieces = pieces(self._tokenizer, _timed(answer, tokens, begun))
        return answer

    def _feed(
        self,
        conversation: Conversation,
        ids: Sequence[int],
        pictures: Callable[[], list[Feeds]],
        timing_ms: dict[str, float] | None = None,
    ) -> Array:
        """Feed what a conversation does not hold of a prompt yet, visual tokens in their places; return the logits."""
        begun = time.monotonic()
        known = conversation.length
        embeds = self._embed(ids[known:])
        places = np.flatnonzero(np.asarray(ids) == self.bundle.prompt.image_token)
        new = places[places >= known] - known
        if len(new):
            # Images that the conversation has seen come first.
            seen = np.concatenate([self._see(feeds) for feeds in pictures()])
            embeds[new] = seen[len(seen) - len(new) :]
        looked = time.monotonic()
        logits = conversation.feed(embeds)
        if timing_ms is not None:
            timing_ms |= {"vision": (looked - begun) * 1e3, "prefill": (time.monotonic() - looked) * 1e3}
        return logits

    def _embed(self, ids: Sequence[int]) -> NDArray[Any]:
        """Return embeddings [n, H]."""
        (found,) = self._embedding.run(None, {"input_ids": np.asarray(ids, np.int32)[None]})
        return np.asarray(found[0])

    def _see(self, feeds: Feeds) -> Array:
        """Return the visual tokens [T, H] of one image."""
        if self._vision is None:
            raise BadInput("this model sees no images", where=self.bundle.name)
        (found,) = self._vision.run(None, feeds)
        return np.asarray(found[0], np.float32)

    def _pictures(self, image: Image | None) -> list[Feeds]:
        if image is None:
            return []
        seen = (image.shape[1], image.shape[0])
        return self._prompts.pictures(Question(Ask.LABEL, "", (image,), "", "", image, seen))


class _LoupePrompts:
    """Loupe's own prompts: one picture, no instructions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._prompts = LoupePrompts(tokenizer)
        self.ids = self._prompts.ids

    def text_ids(self, text: str, *, system: str, images: int) -> list[int]:
        if system or images != 1:
            raise BadInput("Loupe takes one image and a question, and no instructions", fix="leave --system out")
        return self._prompts.text_ids(text)

    def pictures(self, question: Question) -> list[Feeds]:
        return [self._prompts.picture(question)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two prompts begin with in common, at least one of the other's left over to be fed."""
    same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return min(same, len(one), len(other) - 1)


def _same_images(one: Question, other: Question) -> bool:
    images = [[item for item in question.content if not isinstance(item, str)] for question in (one, other)]
    return len(images[0]) == len(images[1]) and all(a is b for a, b in zip(*images, strict=True))


def _timed(answer: Answer, tokens: Iterator[int], begun: float) -> Iterator[int]:
    first = 0.0
    for token in tokens:
        now = time.monotonic()
        answer.tokens += 1
        if answer.tokens == 1:
            first = now
            answer.timing_ms["first_token"] = (now - begun) * 1e3
        answer.timing_ms["decode"] = (now - first) * 1e3
        yield token
