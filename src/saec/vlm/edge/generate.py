"""From logits to tokens and from tokens to text, as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from saec.vlm.edge.session import Array, ContextFull, Conversation

Embed = Callable[[list[int]], NDArray[Any]]
"""Token ids to embeddings [n, H]."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn: the likeliest one at ``temperature`` 0, else from the smallest set of the likeliest that
    has ``top_p`` of the probability (nucleus sampling, Holtzman et al. 2020). The same ``seed`` draws the same."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def picker(self) -> Callable[[Array], int]:
        """Return a function from logits [V] to a token, with random numbers of its own."""
        if self.temperature <= 0:
            return lambda logits: int(logits.argmax())
        rng = np.random.default_rng(self.seed)
        return lambda logits: self._draw(logits, rng)

    def _draw(self, logits: Array, rng: np.random.Generator) -> int:
        scaled = (logits - logits.max()).astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        p = np.exp(scaled[order])
        p /= p.sum()
        kept = int(np.searchsorted(p.cumsum(), self.top_p)) + 1
        return int(order[rng.choice(len(p[:kept]), p=p[:kept] / p[:kept].sum())])


GREEDY = Sampling()


def generate(
    conversation: Conversation,
    embed: Embed,
    logits: Array,
    *,
    ends: Collection[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    deadline: float | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow ``logits``, until one of ``ends`` (which is not yielded), at most ``max_tokens``.

    Nothing more is computed once :func:`time.monotonic` has passed ``deadline``.

    Raises:
        ContextFull: what is there and ``max_tokens`` together do not fit; before anything is yielded.
    """
    if max_tokens > conversation.left:
        raise ContextFull(conversation.length + max_tokens, conversation.length + conversation.left)
    pick = sampling.picker()
    for number in range(1, max_tokens + 1):
        token = pick(logits)
        if token in ends:
            return
        yield token
        if number == max_tokens or (deadline is not None and time.monotonic() >= deadline):
            return
        logits = conversation.feed(embed([token]))


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they come; bytes of a character that is not complete yet are held back.

    The pieces together are the text of all tokens; control tokens have none.
    """
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]


@dataclass(slots=True, eq=False)
class Answer:
    """An answer as it comes: iterate over it, once, for pieces of text.

    ``timing_ms`` has ``prefill``, ``vision`` if an image was looked at, and with the first token ``first_token`` since
    the question; at the end ``decode``, the time of all tokens but the first. ``reused`` of ``prompt_tokens`` were not
    computed again.
    """

    prompt_tokens: int
    reused: int
    timing_ms: dict[str, float]
    tokens: int = 0
    _pieces: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def follow(self, tokenizer: Tokenizer, tokens: Iterator[int], *, since: float) -> None:
        """Take the text from ``tokens`` as they come, and their times; the question was asked at ``since``."""
        self._pieces = pieces(tokenizer, self._timed(tokens, since))

    def _timed(self, tokens: Iterator[int], since: float) -> Iterator[int]:
        first = since
        for token in tokens:
            now = time.monotonic()
            self.tokens += 1
            if self.tokens == 1:
                first = now
                self.timing_ms["first_token"] = (now - since) * 1e3
            self.timing_ms["decode"] = (now - first) * 1e3
            yield token
