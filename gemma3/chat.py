"""Gemma 3's prompts: messages to text, as the checkpoint's template shows it, and to ids; with images between.

BOS once; then each turn is ``<start_of_turn>`` role newline content ``<end_of_turn>`` newline. The assistant's role
is written ``model``. A system message has no turn of its own: it goes in front of the first user content with
two newlines. Source: the ``chat_template`` of the released instruction-tuned checkpoints.

An image is ``<start_of_image>``, its soft tokens' places and ``<end_of_image>``, with two newlines on each side; Pan
& Scan's crops follow it with a sentence around them. Source: transformers' Gemma3Processor. Text is encoded
between images as one string with these newlines: the tokenizer merges them with the user's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from gemma3.errors import BadInput
from gemma3.tokenizer import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SOFT_TOKEN,
    START_OF_IMAGE,
    START_OF_TURN,
    Tokenizer,
)

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Image:
    """A picture's place in a prompt, and how many Pan & Scan crops of it follow the whole."""

    crops: int = 0


Part = str | Image


class Message(TypedDict):
    """``role`` is "system" (first message only; text), "user" or "assistant"."""

    role: str
    content: str | Sequence[Part]


def render_chat(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation, special tokens spelled out: for eyes and comparison, not for encoding.

    An image is its ``<start_of_image>``. Raises BadInput when the roles do not alternate user / assistant after an
    optional system message.
    """
    turns = (
        START_OF_TURN + "".join(START_OF_IMAGE if isinstance(part, Image) else part for part in turn) + END_OF_TURN
        for turn in _turns(messages)
    )
    return (
        "<bos>" + "".join(f"{turn}\n" for turn in turns) + (f"{START_OF_TURN}model\n" if add_generation_prompt else "")
    )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    tokens_per_image: int | None = None,
) -> list[int]:
    """The ids of a conversation: BOS once, turns and images marked by id, everything the users wrote as plain text.

    Each image, and each of its crops, holds ``tokens_per_image`` soft tokens (None: a text-only model). Raises
    BadInput as ``render_chat`` does, for an image to a text-only model, and when the tokenizer has no such markers.
    """
    start, end = tokenizer.special_id(START_OF_TURN), tokenizer.special_id(END_OF_TURN)
    newline = tokenizer.encode("\n", bos=False)
    ids = [tokenizer.bos_id]
    for turn in _turns(messages):
        ids += [start, *_encode(tokenizer, turn, tokens_per_image), end, *newline]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("model\n", bos=False)]
    return ids


def encode_prompt(tokenizer: Tokenizer, parts: Sequence[Part], tokens_per_image: int | None = None) -> list[int]:
    """The ids of a text to continue, images where they stand in ``parts``: BOS, no turns. Raises as ``encode_chat``."""
    return [tokenizer.bos_id, *_encode(tokenizer, parts, tokens_per_image)]


def place_images(text: str, images: Sequence[Image]) -> list[Part]:
    """``images`` where ``text`` says ``<image>``, in order; in front of it where it never does.

    Without images the text stays as it is. Raises BadInput when the marks are not as many as the images.
    """
    pieces = text.split(IMAGE_MARK) if images else [text]
    if len(pieces) == 1:
        return [*images, text]
    if len(pieces) - 1 != len(images):
        raise BadInput(
            f"the text says {IMAGE_MARK} {len(pieces) - 1} times for {len(images)} images; say it once for each, "
            "or never to have them in front"
        )
    parts: list[Part] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [image, piece]
    return parts


def _turns(messages: Sequence[Message]) -> Iterator[list[Part]]:
    """What stands between the markers of each turn."""
    prefix = ""
    if messages and messages[0]["role"] == "system":
        prefix = _system_text(messages[0]["content"]) + "\n\n"
        messages = messages[1:]
    if not messages:
        raise BadInput("the conversation has no user message; give at least one")
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise BadInput(
                f"message {index + 1} after the system text has role {message['role']!r}, expected {expected!r}: "
                "turns alternate user / assistant, beginning with user"
            )
        role = "model" if message["role"] == "assistant" else "user"
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        trimmed = [part if isinstance(part, Image) else part.strip() for part in parts]
        yield [f"{role}\n{prefix if index == 0 else ''}", *trimmed]


def _system_text(content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1 or isinstance(content[0], Image):
        raise BadInput(f"the system message is {list(content)}, expected one text; images go into a user's message")
    return content[0]


def _encode(tokenizer: Tokenizer, parts: Sequence[Part], tokens_per_image: int | None) -> list[int]:
    images = sum(isinstance(part, Image) for part in parts)
    if not images:
        return tokenizer.encode("".join(map(str, parts)), bos=False)
    if tokens_per_image is None:
        raise BadInput(f"images for a text-only model: {images}; leave them out, or use a checkpoint that sees")
    start, end = tokenizer.special_id(START_OF_IMAGE), tokenizer.special_id(END_OF_IMAGE)
    image = [start, *[tokenizer.special_id(IMAGE_SOFT_TOKEN)] * tokens_per_image, end]
    ids: list[int] = []
    text = ""
    for part in parts:
        for piece in [part] if isinstance(part, str) else _shown(part.crops):
            if piece is None:
                ids += tokenizer.encode(text, bos=False) + image
                text = ""
            else:
                text += piece
    return ids + tokenizer.encode(text, bos=False)


def _shown(crops: int) -> list[str | None]:
    """What stands for a picture: text, and None where the tokens of the whole and then of each crop go."""
    shown: list[str | None] = ["\n\n", None, "\n\n"]
    if not crops:
        return shown
    after = [piece for _ in range(crops) for piece in (" ", *shown)]
    return ["Here is the original image ", *shown, " and here are some crops to help you see better", *after]
