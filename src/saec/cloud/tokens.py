"""The token uplink: what goes to the cloud is what a tower on the edge saw, and no image leaves the line."""

from __future__ import annotations

import time
from dataclasses import replace

from saec.cloud.onnx_vlm import TOKENS
from saec.types import CloudClient, CloudError, Opinion, Query, Reason, Tokeniser
from saec.vlm.view import pixels_of


def tokenised(query: Query, tokeniser: Tokeniser) -> Query:
    """Return the question with tokens in place of all images.

    Raises:
        BadInput: its image is not there any more.
    """
    tokens = tokeniser.tokens(pixels_of(query))
    return replace(query, image=None, region=None, references=(), tokens=tokens)


class TokenClient:
    """Asks another client, with visual tokens in place of the part's image and of the reference images.

    They are made when the question is about to be sent: local verdicts do not wait for them. Thread-safe.
    """

    def __init__(self, client: CloudClient, tokeniser: Tokeniser) -> None:
        self._client, self._tokeniser = client, tokeniser
        self.model_id = f"{client.model_id.removesuffix(TOKENS)}{TOKENS}"

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Return the opinion within ``deadline_s`` seconds, which include making the tokens.

        Raises:
            CloudError: as the other client, or CLOUD_REFUSED for a part of which no tokens can be made.
        """
        begun = time.monotonic()
        try:
            asked = tokenised(query, self._tokeniser)
        except Exception as error:  # whatever a model throws, the edge's verdict stands
            what = f"no tokens of this part ({type(error).__name__}: {error})"
            raise CloudError(Reason.CLOUD_REFUSED, what) from error
        spent = time.monotonic() - begun
        opinion = self._client.judge(asked, deadline_s=max(0.0, deadline_s - spent))
        self.model_id = opinion.model_id
        return replace(opinion, timing_ms={**opinion.timing_ms, "tokens": round(spent * 1e3, 3)})

    def close(self) -> None:
        """Close the other client."""
        self._client.close()
