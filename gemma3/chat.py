"""Gemma 3's chat format: messages to text, as the checkpoint's template shows it, and to ids.

BOS once; then each turn is ``<start_of_turn>`` role newline content ``<end_of_turn>`` newline. The assistant's role
is written ``model``. A system message has no turn of its own: it goes in front of the first user content with
two newlines. Source: the ``chat_template`` of the released instruction-tuned checkpoints.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict

from gemma3.errors import BadInput
from gemma3.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer


class Message(TypedDict):
    """``role`` is "system" (first message only), "user" or "assistant"."""

    role: str
    content: str


def render_chat(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation, special tokens spelled out: for eyes and comparison, not for encoding.

    Raises BadInput when the roles do not alternate user / assistant after an optional system message.
    """
    turns = (f"{START_OF_TURN}{turn}{END_OF_TURN}\n" for turn in _turns(messages))
    return "<bos>" + "".join(turns) + (f"{START_OF_TURN}model\n" if add_generation_prompt else "")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """The ids of a conversation: BOS once, turn markers by id, everything the users wrote as plain text.

    Raises BadInput as ``render_chat`` does, and when the tokenizer has no turn markers.
    """
    start, end = tokenizer.special_id(START_OF_TURN), tokenizer.special_id(END_OF_TURN)
    newline = tokenizer.encode("\n", bos=False)
    ids = [tokenizer.bos_id]
    for turn in _turns(messages):
        ids += [start, *tokenizer.encode(turn, bos=False), end, *newline]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("model\n", bos=False)]
    return ids


def _turns(messages: Sequence[Message]) -> Iterator[str]:
    """What stands between the markers of each turn."""
    prefix = ""
    if messages and messages[0]["role"] == "system":
        prefix = messages[0]["content"] + "\n\n"
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
        yield f"{role}\n{prefix if index == 0 else ''}{message['content'].strip()}"
