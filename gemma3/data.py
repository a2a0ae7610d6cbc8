"""Text and conversations from files, as rows of token ids for calibration and training.

Every row begins with BOS, even a row that continues a document, because all of the model's training data did. Documents
follow one another within a row. A document with images is never split across rows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gemma3.chat import GEMMA, ChatFormat, Image, Message, Part
from gemma3.config import ModelConfig, VisionConfig
from gemma3.errors import BadInput
from gemma3.images import Pixels, prepare
from gemma3.rows import content_of, read_data
from gemma3.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """Token ids, and the images (uint8 [S, S, 3]) of the image tokens among them, in order.

    The ids begin with BOS, unless a chat template writes none.
    """

    ids: list[int]
    images: list[Pixels]


@dataclass(frozen=True)
class Rows:
    """tokens int32 [rows, length], and the images of each row.

    A row ends in padding where the next document has images and did not fit. The last row may too, if it has images.
    """

    tokens: NDArray[np.int32]
    images: list[list[Pixels]]


def pack(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    length: int,
    config: ModelConfig,
    *,
    pan_and_scan: bool = False,
    chat: ChatFormat = GEMMA,
) -> Rows:
    """The files, in order, as rows of ``length`` tokens. Text that does not fill the last row is left out.

    A file of rows holds one document per row, any other file is one document of plain text (see ``gemma3.rows``).
    Raises BadInput for rows of fewer than 2 tokens, as ``documents`` does, for a conversation with images that does not
    fit a row, for ids outside the vocabulary of ``config``, and when there is less than one row.
    """
    if length < 2:
        raise BadInput(f"rows of {length} tokens; give at least 2")
    rows = list(_rows(_usable(paths, tokenizer, length, config, pan_and_scan, chat), length, tokenizer.bos_id))
    last, images = rows[-1]
    if len(last) < length and not images:
        rows.pop()
    if not rows:
        given = ", ".join(map(str, paths))
        raise BadInput(f"{given}: {len(last)} tokens in all, less than one row of {length}; give more text")
    tokens = [ids + [tokenizer.pad_id] * (length - len(ids)) for ids, _ in rows]
    return Rows(np.array(tokens, np.int32), [images for _, images in rows])


def _usable(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    length: int,
    config: ModelConfig,
    pan_and_scan: bool,
    chat: ChatFormat,
) -> Iterator[Document]:
    for path in paths:
        for document in documents(path, tokenizer, config.vision, pan_and_scan=pan_and_scan, chat=chat):
            highest, size = max(document.ids), len(document.ids) + (document.ids[0] != tokenizer.bos_id)
            if highest >= config.vocab_size:
                raise BadInput(
                    f"{path}: token {highest} is outside the model's vocabulary of {config.vocab_size}; "
                    "the tokenizer.model is another checkpoint's"
                )
            if document.images and size > length:
                raise BadInput(f"{path}: a conversation with images has {size} tokens, a row {length}; use longer rows")
            yield document


def _rows(documents: Iterable[Document], length: int, bos_id: int) -> Iterator[tuple[list[int], list[Pixels]]]:
    """The ids and the images of each row. The last row may be short, as may a row before a document with images."""
    ids: list[int] = []
    images: list[Pixels] = []
    for document in documents:
        start, end = 0, len(document.ids)
        while start < end:
            if len(ids) == length or (document.images and len(ids) + end > length):
                yield ids, images
                ids, images = [], []
            if not ids and document.ids[start] != bos_id:
                ids.append(bos_id)
            part = document.ids[start : start + length - len(ids)]
            ids += part
            start += len(part)
        images += document.images
    yield ids, images


def documents(
    path: Path,
    tokenizer: Tokenizer,
    vision: VisionConfig | None = None,
    *,
    pan_and_scan: bool = False,
    chat: ChatFormat = GEMMA,
) -> Iterator[Document]:
    """The documents of a file: its rows, or a file of plain text as a whole (see ``gemma3.rows``).

    ``chat`` is the form of conversations. The content of a message is text, or a list of
    ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}``, where the image is a path relative to the
    file's folder. Other keys of a message are for a chat template that reads them. ``pan_and_scan`` adds crops of
    images that are far from square. Raises BadInput as ``read_data`` and ``content_of`` do, for a row whose messages or
    images cannot be used or that ``chat`` refuses, and for images without ``vision``.
    """
    data = read_data(path)
    if isinstance(data, str):
        yield Document(tokenizer.encode(data, bos=True), [])
        return
    for row in data:
        try:
            content = content_of(row.value)
            if isinstance(content, str):
                yield Document(tokenizer.encode(content, bos=True), [])
                continue
            messages, images = _conversation(content, path.parent, vision, pan_and_scan)
            tokens_per_image = None if vision is None else vision.tokens_per_image
            ids = chat.encode(tokenizer, messages, add_generation_prompt=False, tokens_per_image=tokens_per_image)
        except BadInput as error:
            raise BadInput(f"{path}: {row.place}: {error}") from None
        yield Document(ids, images)


def _conversation(
    messages: list[Any], folder: Path, vision: VisionConfig | None, pan_and_scan: bool
) -> tuple[list[Message], list[Pixels]]:
    images: list[Pixels] = []

    def part(given: Any) -> Part:
        match given:
            case {"type": "text", "text": str(text)}:
                return text
            case {"type": "image", "image": str(name)}:
                pixels = [] if vision is None else prepare(folder / name, vision.image_size, pan_and_scan)
                images.extend(pixels)
                return Image(crops=max(0, len(pixels) - 1))
        raise BadInput(f"a part of a message is {json.dumps(given)[:60]}, expected a text or an image with its path")

    def message(given: Any) -> Message:
        match given:
            case {"role": str(), "content": str()}:
                return cast(Message, given)
            case {"role": str(), "content": list(parts)}:
                return cast(Message, given | {"content": [part(one) for one in parts]})
        raise BadInput(f"a message is {json.dumps(given)[:60]}, expected text under 'role' and 'content'")

    return [message(one) for one in messages], images
