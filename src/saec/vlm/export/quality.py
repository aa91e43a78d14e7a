"""What rounding costs: the answers of two bundles to the same real questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saec.vlm.contract.bundle import Bundle, read_bundle
from saec.vlm.edge.chat import Feeds
from saec.vlm.edge.family import open_tokenizer, prompts_of
from saec.vlm.edge.graphs import Graphs
from saec.vlm.edge.session import Array
from saec.vlm.looks import log_softmax
from saec.vlm.prompt import Question

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A question about an image, or a text, with the name and the hash of the file it comes from."""

    name: str
    sha256: str
    ask: Question | str


class Asked:
    """A bundle that examples are put to. One thread at a time.

    Raises:
        BadInput: no bundle, or a damaged one.
    """

    def __init__(self, folder: Path, *, threads: int = 2) -> None:
        self.bundle: Bundle = read_bundle(folder)
        self._prompts = prompts_of(self.bundle, open_tokenizer(folder))
        self._graphs = Graphs.load(folder, self.bundle, threads=threads)

    def logits(self, example: Example) -> Doubles:
        """Return the log-probabilities [V] of the token after an example."""
        ids, pictures = self._prompt(example)
        return log_softmax(self._graphs.feed(self._graphs.open(), ids, lambda: pictures))

    def embeddings(self, example: Example) -> Array:
        """Return the embeddings [tokens, H] of an example's prompt, visual tokens in their places."""
        ids, pictures = self._prompt(example)
        embeds = np.array(self._graphs.embed(ids), np.float32)
        if pictures:
            embeds[np.asarray(ids) == self.bundle.prompt.image_token] = np.concatenate(
                [self._graphs.see(feeds) for feeds in pictures]
            )
        return embeds

    def _prompt(self, example: Example) -> tuple[list[int], list[Feeds]]:
        if isinstance(example.ask, str):
            return self._prompts.text_ids(example.ask, system="", images=0), []
        return self._prompts.ids(example.ask), self._prompts.pictures(example.ask)


def losses(
    labels: tuple[int, int] | None, before: Sequence[Doubles], after: Sequence[Doubles]
) -> Mapping[str, float | int]:
    """Return how far log-probabilities [V] moved: the mean Kullback-Leibler divergence in nats, how often the likeliest
    token stayed, and of models that decide the label agreement at 0.5 and mean and largest |ΔP(defect)|."""
    pairs = list(zip(before, after, strict=True))
    found: dict[str, float | int] = {
        "measured_on": len(pairs),
        "mean_kl": float(np.mean([(np.exp(one) * (one - other)).sum() for one, other in pairs])),
        "top1_agreement": float(np.mean([one.argmax() == other.argmax() for one, other in pairs])),
    }
    if labels is not None:
        good, defect = labels
        p = np.array([[1 / (1 + np.exp(each[good] - each[defect])) for each in pair] for pair in pairs])
        moved = np.abs(p[:, 0] - p[:, 1])
        found["label_agreement"] = float(np.mean((p[:, 0] >= 0.5) == (p[:, 1] >= 0.5)))
        found |= {"mean_delta_p": float(moved.mean()), "max_delta_p": float(moved.max())}
    return found
