"""Text and conversations from files, as rows of token ids: what calibration and training read.

Each row begins with BOS, as everything the model has ever seen does: a document's first row by itself, and the rows
that continue it too. Documents follow one another within a row.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3.chat import Message, encode_chat
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer

CHAT_SUFFIX = ".jsonl"


def pack(paths: Sequence[Path], tokenizer: Tokenizer, length: int, vocab_size: int) -> NDArray[np.int32]:
    """int32 [rows, length] of the files in their order; what does not fill a last row is left out.

    ``.jsonl`` files hold a conversation a line, ``{"messages": [{"role", "content"}, …]}``; any other is one
    document of plain text. Raises BadInput for a file that is missing, empty or no text, for a line that is no
    conversation, for ids that a model with ``vocab_size`` rows does not have, and when there is less than a row.
    """
    if length < 2:
        raise BadInput(f"rows of {length} tokens; give at least 2")
    stream: list[int] = []
    for path in paths:
        for ids in documents(path, tokenizer):
            if max(ids) >= vocab_size:
                raise BadInput(
                    f"{path}: token {max(ids)} is outside the model's vocabulary of {vocab_size}; "
                    "the tokenizer.model is another checkpoint's"
                )
            stream += ids
    rows: list[list[int]] = []
    start = 0
    while start < len(stream):
        lead = [] if stream[start] == tokenizer.bos_id else [tokenizer.bos_id]
        end = start + length - len(lead)
        rows.append(lead + stream[start:end])
        start = end
    if len(rows[-1]) < length:
        rows.pop()
    if not rows:
        raise BadInput(f"{', '.join(map(str, paths))}: {len(stream)} tokens in all, less than one row of {length}")
    return np.array(rows, np.int32)


def documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each document of a file, BOS in front. Raises BadInput as ``pack`` does."""
    text = _read(path)
    if path.suffix != CHAT_SUFFIX:
        yield tokenizer.encode(text, bos=True)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield encode_chat(tokenizer, _messages(line), add_generation_prompt=False)
        except BadInput as error:
            raise BadInput(f"{path}: line {number}: {error}") from None


def read_utf8(path: Path) -> str:
    """The file's text, its line ends as they are. Raises BadInput when it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from None


def _read(path: Path) -> str:
    text = read_utf8(path)
    if not text.strip():
        raise BadInput(f"{path}: holds no text; give a file that does")
    if "\0" in text:
        raise BadInput(f"{path}: has a NUL character at {text.index(chr(0))}: binary data, give text")
    return text


def _messages(line: str) -> list[Message]:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})") from None
    messages = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(messages, list):
        raise BadInput('no list under "messages"')
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise BadInput(f"a message is {json.dumps(message)[:60]}, expected text under 'role' and 'content'")
    return messages
