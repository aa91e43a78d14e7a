"""The graphs of a bundle as one: token ids and pictures in, logits out, keys and values kept in conversations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from saec.errors import BadInput
from saec.vlm.contract.bundle import DECODER, EMBEDDING, PROJECTOR, VISION, Bundle
from saec.vlm.edge.chat import Feeds
from saec.vlm.edge.session import Array, Conversation, Decoder, open_graph

Pictures = Callable[[], Sequence[Feeds]]
"""Returns the vision graph's inputs for all images of a prompt; called if one of them has to be looked at."""


class Graphs:
    """Decoder, embedding, vision tower, and the projector of tokens that come in an image's place. One thread at a
    time."""

    def __init__(
        self,
        bundle: Bundle,
        decoder: Decoder,
        embedding: ort.InferenceSession,
        vision: ort.InferenceSession | None,
        projector: ort.InferenceSession | None = None,
    ) -> None:
        self._bundle = bundle
        self._embedding, self._vision, self._projector = embedding, vision, projector
        self.open = decoder.open

    @classmethod
    def load(cls, folder: Path, bundle: Bundle, *, threads: int) -> Self:
        """Load them.

        Raises:
            BadInput: one is missing or unusable, or the decoder has a layout that this runtime does not feed.
        """
        decoder = Decoder(folder / DECODER, bundle.signature, threads=threads)
        vision = None if bundle.vision is None else open_graph(folder / VISION, threads=threads)
        projector = None if bundle.tower is None else open_graph(folder / PROJECTOR, threads=threads)
        return cls(bundle, decoder, open_graph(folder / EMBEDDING, threads=1), vision, projector)

    def feed(
        self,
        conversation: Conversation,
        ids: Sequence[int],
        pictures: Pictures,
        timing_ms: dict[str, float] | None = None,
    ) -> Array:
        """Feed what a conversation does not hold yet of a prompt ``ids``; return the logits [V] after it.

        Visual tokens take the places of image tokens; images that the conversation has seen are not looked at again.
        To ``timing_ms`` are added ``prefill``, and ``vision`` if an image was looked at.

        Raises:
            BadInput: it does not fit into the context, or the model sees no images.
        """
        known = conversation.length
        places = np.flatnonzero(np.asarray(ids) == self._bundle.prompt.image_token)
        new = places[places >= known] - known
        begun = time.monotonic()
        seen = self._seen(len(new), pictures) if len(new) else None
        looked = time.monotonic()
        embeds = self.embed(ids[known:])
        if seen is not None:
            embeds[new] = seen
        logits = conversation.feed(embeds)
        if timing_ms is not None:
            timing_ms["prefill"] = timing_ms.get("prefill", 0.0) + (time.monotonic() - looked) * 1e3
            timing_ms |= {} if seen is None else {"vision": (looked - begun) * 1e3}
        return logits

    def embed(self, ids: Sequence[int]) -> NDArray[Any]:
        """Return the embeddings [n, H] of tokens."""
        (found,) = self._embedding.run(None, {"input_ids": np.asarray(ids, np.int32)[None]})
        return np.asarray(found[0])

    def see(self, feeds: Feeds) -> Array:
        """Return the visual tokens [T, H] of one image, or of its tower's tokens.

        Raises:
            BadInput: the model sees no images, or takes no tokens.
        """
        graph = self._projector if "tokens" in feeds else self._vision
        if graph is None:
            raise BadInput("this model sees no images, or takes no tokens", where=self._bundle.name)
        (found,) = graph.run(None, feeds)
        return np.asarray(found[0], np.float32)

    def _seen(self, tokens: int, pictures: Pictures) -> Array:
        """Return the visual tokens of the last images, ``tokens`` in all."""
        images = tokens // (1 if self._bundle.vision is None else self._bundle.vision.tokens)
        return np.concatenate([self.see(feeds) for feeds in pictures()[-images:]])
