"""Prompts of models with a chat template: the checkpoint's own Jinja, in a sandbox, and text that stays text.

What a user or a product says may not become a control token: a prompt in which it would, by itself or together with
what stands beside it in the template, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from saec.errors import BadInput
from saec.vlm.contract.bundle import Bundle
from saec.vlm.edge.pixels import pixel_values
from saec.vlm.prompt import Question

Feeds = dict[str, NDArray[np.float32]]
"""The vision graph's inputs for one image."""

_MARK = re.compile("\ue000(\\d+)\ue001")
"""Where a text goes, while the template is rendered: characters of Unicode's private area."""

_AROUND = {"smolvlm": "<fake_token_around_image><global-img>{}<fake_token_around_image>"}
"""What a family's processor writes around an image, beside the visual tokens."""

_ELLIPSIS = " … "


class ChatPrompts:
    """Makes token ids and pictures for a bundle with a chat template. Thread-safe.

    Raises:
        BadInput: the bundle has no template, or one that is not Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, bundle: Bundle) -> None:
        if bundle.prompt.template is None:
            raise BadInput("the bundle has no chat template", where=bundle.name, fix="export a chat model")
        self._tokens = tokenizer
        self._bundle = bundle
        self._source = bundle.prompt.template
        image = bundle.prompt.image_token
        self._image = None if image is None else str(tokenizer.id_to_token(image))
        self._controls = {at for at, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._controls |= set() if image is None else {image}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda how: datetime.now().strftime(how)}
        try:
            self._template = environment.from_string(self._source)
        except TemplateError as error:
            raise BadInput(f"the chat template is not usable ({error})", where=bundle.name) from None

    def ids(self, question: Question) -> list[int]:
        """Return the prompt's ids, which end after the question's prefill."""
        content = [item if isinstance(item, str) else None for item in question.content]
        return self._ids(question.system, content, question.prefill)

    def text_ids(self, text: str, *, system: str = "", images: int = 1) -> list[int]:
        """Return the ids of a free question after ``images`` pictures, which end where the answer begins."""
        return self._ids(system, [*[None] * images, text], "")

    def pictures(self, question: Question) -> list[Feeds]:
        """Return the vision graph's inputs for each image of a question."""
        vision = self._bundle.vision
        images = [item for item in question.content if not isinstance(item, str)]
        return [{"pixel_values": pixel_values(image, vision.preprocess)} for image in images if vision is not None]

    def shared(self, question: Question, ids: Sequence[int]) -> int:
        """Return how many ids come before the first image that is the part's own."""
        vision, image = self._bundle.vision, self._bundle.prompt.image_token
        references = sum(not isinstance(item, str) for item in question.content[: question.shared])
        places = [at for at, token in enumerate(ids) if token == image]
        before = references * (1 if vision is None else vision.tokens)
        return places[before] if len(places) > before else 0

    def _ids(self, system: str, content: Sequence[str | None], prefill: str) -> list[int]:
        texts: list[str] = []

        def mark(text: str) -> str:
            texts.append(text)
            return f"\ue000{len(texts) - 1}\ue001"

        messages = [{"role": "system", "content": self._content([system], mark)}] if system else []
        messages.append({"role": "user", "content": self._content(content, mark)})
        if prefill:
            messages.append({"role": "assistant", "content": self._content([prefill], mark)})
        rendered = self._rendered(messages, generation=not prefill)
        if prefill:  # the turn goes on: what the template puts behind it is left away
            last = f"\ue000{len(texts) - 1}\ue001"
            rendered = rendered[: rendered.rfind(last) + len(last)]
        if sorted(map(int, _MARK.findall(rendered))) != list(range(len(texts))):
            raise BadInput("the chat template leaves out or repeats part of the prompt", where=self._bundle.name)
        ids = self._encoded(_MARK.sub(lambda found: texts[int(found[1])], rendered))
        neutral = self._encoded(_MARK.sub(".", rendered))
        if self._controls_in(ids) != self._controls_in(neutral):
            what = "the text contains what this model reads as a control token"
            raise BadInput(what, where=self._bundle.name, fix="leave out text such as <image> or <|im_end|>")
        return self._expanded(ids, content.count(None))

    def _content(self, content: Sequence[str | None], mark: Callable[[str], str]) -> Any:
        """Return a turn's content as the template wants it: a list of parts, or one text with the images in it."""
        if re.search(r"""['"]image['"]""", self._source):
            return [{"type": "image"} if item is None else {"type": "text", "text": mark(item)} for item in content]
        return "".join(f"{self._image}\n" if item is None else mark(item) for item in content)

    def _rendered(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        try:
            rendered = self._template.render(messages=messages, add_generation_prompt=generation)
        except Exception as error:  # noqa: BLE001 - a template is a program, and may fail as any other
            raise BadInput(f"the chat template cannot be used ({error})", where=self._bundle.name) from None
        around = _AROUND.get(self._bundle.family)
        return rendered if around is None else rendered.replace(str(self._image), around.format(self._image))

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokens.encode(text).ids)

    def _controls_in(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._controls]

    def _expanded(self, ids: list[int], images: int) -> list[int]:
        """Put as many image tokens as an image has visual tokens where the template has one."""
        image, vision = self._bundle.prompt.image_token, self._bundle.vision
        if images and vision is None:
            raise BadInput("this model sees no images", where=self._bundle.name)
        if ids.count(-1 if image is None else image) != images:
            raise BadInput("this model, or its chat template, takes no such number of images", where=self._bundle.name)
        if vision is None:
            return ids
        return [each for token in ids for each in [token] * (vision.tokens if token == image else 1)]


def fit(ids_of: Callable[[str], list[int]], text: str, most: int, *, cut: bool) -> list[int]:
    """Return the ids of a prompt of at most ``most`` tokens; where allowed, the middle of the user's text is cut out.

    Its beginning and its end, where the question usually is, are kept, and so is all that is not the user's.

    Raises:
        BadInput: it is too long, and may not be cut or is too long without any text.
    """
    ids = ids_of(text)
    if len(ids) <= most:
        return ids
    fix = "ask something shorter, pass --cut, or allow fewer tokens"
    if not cut:
        raise BadInput(
            f"the prompt has {len(ids)} tokens, and {most} fit into the model's context with an answer", fix=fix
        )
    shortest = ids_of(_ELLIPSIS)
    if len(shortest) > most:
        raise BadInput(
            f"the prompt without any text has {len(shortest)} tokens, and {most} fit with an answer", fix=fix
        )
    # Nearly always more text makes more tokens; the shortest is kept where the search finds no better.
    found, low, high = shortest, 0, len(text)
    while low < high:
        kept = (low + high + 1) // 2
        tried = ids_of(text[: (kept + 1) // 2] + _ELLIPSIS + text[len(text) - kept // 2 :])
        if len(tried) <= most:
            found, low = tried, kept
        else:
            high = kept - 1
    return found


def refuse_controls(tokenizer: Tokenizer, text: str) -> None:
    """Refuse a user's text that spells a control token or an image.

    Raises:
        BadInput: it does; the message names which.
    """
    controls = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special} | {"<image>"}
    for control in sorted(controls):
        if control in text:
            what = f"the text contains {control}, which this model reads as a control token or as another image"
            raise BadInput(what, fix="leave it out: one image is given beside the text")


def _refuse(message: str) -> None:
    raise TemplateError(message)
