"""Gemma 3's prompts: turns messages, with or without images, into text and into token ids.

A prompt begins with one BOS. Each turn is ``<start_of_turn>``, the role, a newline, the content, ``<end_of_turn>`` and
a newline. The assistant's role is written ``model``. A system message has no turn of its own: its text and two
newlines go in front of the first user content. Source: the ``chat_template`` of the released instruction-tuned
checkpoints.

An image is ``<start_of_image>``, one image token for each of its soft tokens, and ``<end_of_image>``, with two newlines
on each side. The crops of Pan & Scan follow it, with fixed words around them. Source: transformers' Gemma3Processor.
The text between two images and these newlines are encoded as one string, because the tokenizer merges the newlines with
those of the user's text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypedDict

from gemma3.errors import BadInput, counted
from gemma3.tokenizer import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SOFT_TOKEN,
    START_OF_IMAGE,
    START_OF_TURN,
    Tokenizer,
)

IMAGE_MARKER = "<image>"

# The same prompts as a Jinja template, for programs that render one. The tests compare it with the released template.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set prefix = (system if system is string else system[0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{ raise_exception('turns alternate user / assistant, beginning with user') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\\n' }}
    {{- prefix if loop.first else '' }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- else -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- else -%}
                {{ part['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Image:
    """An image in a prompt, followed by ``crops`` Pan & Scan crops of it."""

    crops: int = 0


Part = str | Image


class Message(TypedDict):
    """One message of a conversation: a role, and text or a sequence of texts and images.

    ``role`` is "system" (first message only, one text), "user" or "assistant". A chat template may know other roles,
    and may read other keys.
    """

    role: str
    content: str | Sequence[Part]


class ChatFormat(Protocol):
    """How conversations become token ids: in Gemma's own form, or as another chat template says.

    ``template`` is Jinja text, and ``variables`` are what it takes besides the conversation.
    """

    @property
    def name(self) -> Literal["gemma", "template"]: ...

    @property
    def template(self) -> str: ...

    @property
    def variables(self) -> Mapping[str, str]: ...

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tokens_per_image: int | None = None,
    ) -> list[int]:
        """The token ids of a conversation. Markers are special tokens; all content is plain text.

        Each image, and each of its crops, has ``tokens_per_image`` soft tokens; None means a text-only model. Raises
        BadInput for a conversation that the format refuses, and for an image in a text-only model's prompt.
        """


def render_chat(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation with its special tokens spelled out. It is for reading, not for encoding.

    An image is shown as ``<start_of_image>``. Raises BadInput when the roles do not alternate user / assistant after
    an optional system message, when there is no user message, and when the system message is not one text.
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
    """The token ids of a conversation. Markers of turns and images are special tokens; all content is plain text.

    Each image, and each of its crops, has ``tokens_per_image`` soft tokens; None means a text-only model. Raises
    BadInput as ``render_chat`` does, for an image in a text-only model's prompt, and when the tokenizer lacks one of
    the markers.
    """
    start, end = tokenizer.special_id(START_OF_TURN), tokenizer.special_id(END_OF_TURN)
    newline = tokenizer.encode("\n", bos=False)
    ids = [tokenizer.bos_id]
    for turn in _turns(messages):
        ids += [start, *encode_parts(tokenizer, turn, tokens_per_image), end, *newline]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("model\n", bos=False)]
    return ids


class GemmaFormat:
    """The form of the released instruction-tuned checkpoints."""

    name: Literal["gemma"] = "gemma"
    template = CHAT_TEMPLATE
    variables: Mapping[str, str] = MappingProxyType({})

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tokens_per_image: int | None = None,
    ) -> list[int]:
        """``encode_chat``."""
        return encode_chat(tokenizer, messages, add_generation_prompt, tokens_per_image=tokens_per_image)


GEMMA: ChatFormat = GemmaFormat()


def encode_prompt(tokenizer: Tokenizer, parts: Sequence[Part], tokens_per_image: int | None = None) -> list[int]:
    """The token ids of a text to continue, with its images. It begins with BOS and has no turns.

    Raises BadInput for an image in a text-only model's prompt, and when the tokenizer lacks one of the image markers.
    """
    return [tokenizer.bos_id, *encode_parts(tokenizer, parts, tokens_per_image)]


def place_images(text: str, images: Sequence[Image]) -> list[Part]:
    """The parts of a prompt: ``text`` with ``images`` in place of its markers ``<image>``, in order.

    If the text has no marker, the images come first. Without images the text is unchanged, markers included. Raises
    BadInput when there are images and markers, but not equally many.
    """
    texts = text.split(IMAGE_MARKER) if images else [text]
    if len(texts) == 1:
        return [*images, text]
    if len(texts) - 1 != len(images):
        raise BadInput(
            f"the text has {counted(len(texts) - 1, 'marker')} {IMAGE_MARKER} for {counted(len(images), 'image')}; "
            "write one for each image, or none to put the images first"
        )
    parts: list[Part] = [texts[0]]
    for image, following in zip(images, texts[1:], strict=True):
        parts += [image, following]
    return parts


def _turns(messages: Sequence[Message]) -> Iterator[list[Part]]:
    """For each turn, the parts between its markers, including the line with its role."""
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


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part], tokens_per_image: int | None) -> list[int]:
    """The token ids of texts and images between two markers. Raises BadInput as ``encode_prompt`` does."""
    images = sum(isinstance(part, Image) for part in parts)
    if not images:
        return tokenizer.encode("".join(map(str, parts)), bos=False)
    if tokens_per_image is None:
        raise for_text_only(images)
    start, end = tokenizer.special_id(START_OF_IMAGE), tokenizer.special_id(END_OF_IMAGE)
    image = [start, *[tokenizer.special_id(IMAGE_SOFT_TOKEN)] * tokens_per_image, end]
    ids: list[int] = []
    text = ""
    for part in parts:
        for text_or_image in [part] if isinstance(part, str) else _with_crops(part.crops):
            if text_or_image is None:
                ids += tokenizer.encode(text, bos=False) + image
                text = ""
            else:
                text += text_or_image
    return ids + tokenizer.encode(text, bos=False)


def for_text_only(images: int) -> BadInput:
    """The error for ``images`` images in a text-only model's prompt."""
    return BadInput(f"{counted(images, 'image')} for a text-only model; leave images out, or use a multimodal one")


def _with_crops(crops: int) -> list[str | None]:
    """The prompt of an image and its crops: a list of texts, with None in place of the tokens of each."""
    one: list[str | None] = ["\n\n", None, "\n\n"]
    if not crops:
        return one
    after = [item for _ in range(crops) for item in (" ", *one)]
    return ["Here is the original image ", *one, " and here are some crops to help you see better", *after]
