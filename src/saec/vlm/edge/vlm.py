"""An exported VLM in ONNX Runtime: decisions, evidence, and free questions. No torch, no transformers.

One thread at a time: conversations share the graphs' threads, and more callers than that would only wait for the same
cores. The folder it is loaded from is a :mod:`saec.vlm.contract.bundle`.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.types import Image, Tokens
from saec.vlm.answers import Decision
from saec.vlm.contract.bundle import BASIS, Bundle, read_bundle
from saec.vlm.edge.chat import fit, refuse_controls
from saec.vlm.edge.family import at_its_size, open_tokenizer, prompts_of
from saec.vlm.edge.generate import GREEDY, Answer, Sampling, generate
from saec.vlm.edge.graphs import Graphs
from saec.vlm.edge.kv import Prefix
from saec.vlm.edge.session import Conversation
from saec.vlm.edge.store import Start
from saec.vlm.looks import decisions, log_softmax
from saec.vlm.prompt import Ask, Question, ask_evidence
from saec.vlm.tokens.codec import Basis
from saec.vlm.tokens.width import WidthProjector


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A question that was decided, and the model's state after it: its evidence needs no second look."""

    question: Question
    ids: tuple[int, ...]
    after: Conversation


class OnnxVlm:
    """A bundle that answers. One thread at a time."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        graphs: Graphs,
        *,
        prefixes: int = 8,
        basis: Basis | None = None,
        width: WidthProjector | None = None,
    ) -> None:
        """Answer with these graphs; the beginnings of the last ``prefixes`` products' prompts are kept. ``basis`` is
        what the tokens are described in that can come in an image's place, ``width`` takes those of another tower."""
        self.bundle = bundle
        self.model_id = bundle.model_id
        self._tokenizer, self._graphs = tokenizer, graphs
        self._prompts = prompts_of(bundle, tokenizer)
        self._beginnings: OrderedDict[bytes, Prefix] = OrderedDict()
        self._most = prefixes
        self._basis, self._width = basis, width

    @classmethod
    def load(cls, folder: Path, *, threads: int = 2, prefixes: int = 8, width: Path | None = None) -> Self:
        """Load a bundle; its files are held to their hashes first.

        Raises:
            BadInput: no bundle, a damaged one, or a width projector of another model.
        """
        bundle = read_bundle(folder)
        tokenizer, graphs = open_tokenizer(folder), Graphs.load(folder, bundle, threads=threads)
        basis = None if bundle.tower is None else Basis.load(folder / BASIS)
        bridge = None if width is None else WidthProjector.load(width)
        if bridge is not None and bridge.target != bundle.tower:
            what = f"the width projector leads to {bridge.target}, and this model takes tokens of {bundle.tower}"
            raise BadInput(what, where=width, fix="make one for this model with saec vlm width")
        return cls(bundle, tokenizer, graphs, prefixes=prefixes, basis=basis, width=bridge)

    def at_its_size(self, settings: MllmSettings) -> MllmSettings:
        """Return the settings with the image sizes they leave open: what the vision graph sees, and no larger."""
        return at_its_size(self.bundle, settings)

    def expand(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return all tokens [L, W] of an image of which some came.

        Raises:
            BadInput: this model takes no tokens, or not those of that tower or basis.
        """
        vision = self.bundle.vision
        if self._basis is None or vision is None:
            fix = "serve Loupe, or set cloud.uplink to image or crop"
            raise BadInput("this model takes no tokens in an image's place", where=self.model_id, fix=fix)
        if self._width is not None and tokens.model_id == self._width.source:
            return self._width.expand(tokens)
        if tokens.model_id != self.bundle.tower or tokens.total != vision.tokens:
            what = f"these are tokens of {tokens.model_id}, and this model takes those of {self.bundle.tower}"
            fix = "install the same version of saec on both sides, with the same adapter, or set mllm.width"
            raise BadInput(what, where=self.model_id, fix=fix)
        return self._basis.expand(tokens)

    def look(self, question: Question, timing_ms: dict[str, float] | None = None) -> tuple[NDArray[np.float64], Seen]:
        """Return the log-probabilities [2] of the labels 0 and 1, and what evidence can be asked from.

        ``timing_ms`` is told what ``vision`` and ``prefill`` took.

        Raises:
            BadInput: the model has no label tokens, or the question does not fit into its context.
        """
        labels = self.bundle.prompt.labels
        if labels is None:
            raise BadInput("this model was exported without labels: it cannot decide", where=self.bundle.name)
        ids = self._prompts.ids(question)
        conversation = self._begun(question, ids)
        logits = self._graphs.feed(conversation, ids, lambda: self._prompts.pictures(question), timing_ms)
        return log_softmax(logits)[list(labels)], Seen(question, tuple(ids), conversation)

    def decide(self, question: Question, timing_ms: dict[str, float] | None = None) -> tuple[Decision, Seen]:
        """Decide one question from one look; see :meth:`look`."""
        found, seen = self.look(question, timing_ms)
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
        conversation = self._begun(asked, ids) if seen is None or not shared else seen.after.fork(shared)
        logits = self._graphs.feed(conversation, ids, lambda: self._prompts.pictures(asked))
        most, ends = min(max_tokens, conversation.left), self.bundle.prompt.ends
        tokens = generate(conversation, self._graphs.embed, logits, ends=ends, max_tokens=most, deadline=deadline)
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def begin(self, image: Image, *, system: str = "", timing_ms: dict[str, float] | None = None) -> Start:
        """Compute the beginning that all free questions about an image share.

        Raises:
            BadInput: it does not fit, or the model takes no image or no instructions.
        """
        refuse_controls(self._tokenizer, system)
        # Where a user's text begins is where the prompts of two texts part.
        one, other = (self._prompts.text_ids(text, system=system, images=1) for text in ("0", "a"))
        ids = one[: _common(one, other)]
        conversation = self._graphs.open()
        seen = (image.shape[1], image.shape[0])
        shown = Question(Ask.LABEL, "", (image,), "", "", image, seen)
        self._graphs.feed(conversation, ids, lambda: self._prompts.pictures(shown), timing_ms)
        return Start(tuple(ids), conversation.keep(), system)

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

        ``start`` is :meth:`begin` of an image and instructions, which then are not given again; it is not changed, and
        the answer is the same token for token. ``cut`` allows the middle of a text that is too long to be cut out.

        Raises:
            BadInput: a text with control tokens or another image, a prompt that is too long with ``max_tokens``, an
                image that this model does not take, or a start of another prompt.
        """
        begun = time.monotonic()
        system = system if start is None else start.system
        for given in (system, text):
            refuse_controls(self._tokenizer, given)
        images = 0 if image is None and start is None else 1
        room = max(0, self.bundle.signature.cache + 1 - max_tokens)
        ids = fit(lambda t: self._prompts.text_ids(t, system=system, images=images), text, room, cut=cut)
        answer = Answer(len(ids), 0 if start is None else _common(start.ids, ids), {})
        if start is None and image is not None:
            # In two steps, though one would do: the very numbers that a saved beginning gives, in 8 bits too.
            start = self.begin(image, system=system, timing_ms=answer.timing_ms)
        conversation = self._graphs.open() if start is None else self._continued(start, ids)
        logits = self._graphs.feed(conversation, ids, tuple, answer.timing_ms)
        tokens = generate(
            conversation,
            self._graphs.embed,
            logits,
            ends=self.bundle.prompt.ends,
            max_tokens=max_tokens,
            sampling=sampling,
            deadline=deadline,
        )
        answer.follow(self._tokenizer, tokens, since=begun)
        return answer

    def _continued(self, start: Start, ids: Sequence[int]) -> Conversation:
        shared = _common(start.ids, ids)
        if shared == 0 or self.bundle.prompt.image_token in ids[shared:]:
            raise BadInput("the saved beginning is not that of this prompt", fix="make it again with saec vlm cache")
        return self._graphs.open(start.prefix, shared)

    def _begun(self, question: Question, ids: Sequence[int]) -> Conversation:
        """Return a conversation that holds what all prompts of the question's product begin with."""
        shared = self._prompts.shared(question, ids) if self._most else 0
        if not shared:
            return self._graphs.open()
        digest = hashlib.blake2b(repr(ids[:shared]).encode(), digest_size=16)
        for image in _images(question.content[: question.shared]):
            digest.update(repr(image.shape).encode())
            digest.update(np.ascontiguousarray(image).data)
        key = digest.digest()
        kept = self._beginnings.pop(key, None)
        if kept is None:
            pictures = self._prompts.pictures(question)[: len(_images(question.content[: question.shared]))]
            conversation = self._graphs.open()
            self._graphs.feed(conversation, ids[:shared], lambda: pictures)
            kept = conversation.keep()
        self._beginnings[key] = kept
        while len(self._beginnings) > self._most:
            self._beginnings.popitem(last=False)
        return self._graphs.open(kept)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two prompts begin with in common, at least one of the other's left over to be fed."""
    same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return min(same, len(one), len(other) - 1)


def _images(content: Sequence[str | Image]) -> list[Image]:
    return [item for item in content if not isinstance(item, str)]


def _same_images(one: Question, other: Question) -> bool:
    images = _images(one.content), _images(other.content)
    return len(images[0]) == len(images[1]) and all(a is b for a, b in zip(*images, strict=True))
