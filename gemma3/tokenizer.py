"""Gemma's SentencePiece tokenizer: text to token ids and back, and text as it streams out of a model.

Text never becomes a special token (turn and image markers, pad, eos, bos …): a user who types ``<end_of_turn>`` gets
the ordinary pieces that spell it. gemma3/chat.py inserts the real markers by id. Other user-defined pieces of Gemma's
vocabulary (runs of newlines, HTML tags) are ordinary text and stay whole.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sentencepiece

from gemma3.errors import BadInput

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
# These are special in every Gemma 3 checkpoint. tokenizer_config.json says so, but it may be missing.
SPECIAL_PIECES = frozenset(
    {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}
    | {START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN}
)


class Tokenizer:
    """The SentencePiece model in the file ``path``, or in ``tokenizer.model`` of the checkpoint directory ``path``.

    Tokens that a checkpoint adds to the SentencePiece vocabulary are read from ``added_tokens.json`` and
    ``tokenizer_config.json`` beside the model, if they exist and ``added_tokens`` is true. Raises BadInput when a file
    is missing, unreadable or not a Gemma tokenizer.
    """

    def __init__(self, path: Path | str, added_tokens: bool = True) -> None:
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be read ({error.strerror}); give a directory with a SentencePiece tokenizer.model"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._pieces = _load(model, self.path)
        self._piece_count: int = self._pieces.get_piece_size()
        self._special = _special_ids(self._pieces, self.path.parent if added_tokens else None)
        self.pad_id = self.special_id("<pad>")
        self.eos_id = self.special_id("<eos>")
        self.bos_id = self.special_id("<bos>")
        self.end_of_turn_id = self.special_id(END_OF_TURN)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id with a name. The model's embedding table may have more rows."""
        last_special = max(self._special.values())
        return max(self._piece_count, last_special + 1)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which stand for no text."""
        return frozenset(self._special.values())

    @property
    def special(self) -> Mapping[str, int]:
        """Name → id of every special token."""
        return MappingProxyType(self._special)

    def special_id(self, piece: str) -> int:
        """The id of a special token by its name. Raises BadInput when the tokenizer has none of that name."""
        if piece not in self._special:
            raise BadInput(f"{self.path}: has no piece {piece}; this is not the tokenizer of a Gemma 3 chat model")
        return self._special[piece]

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The ids of plain text, beginning with BOS if ``bos``. No part of the text becomes a special token.

        Raises BadInput when the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"text has a lone surrogate {text[error.start]!r} at {error.start}; give valid Unicode"
            ) from None
        ids = [self.bos_id] if bos else []
        start = 0
        # The text is cut after the first character of each special piece's name, so that no part holds the whole name.
        for match in self._special_names.finditer(text):
            ids += self._pieces.encode(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + list(self._pieces.encode(text[start:]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. Special tokens and ids past the vocabulary give no text; invalid UTF-8 gives U+FFFD."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one id stands for: none for a special token, part of a character for a byte piece."""
        if token_id in self.special_ids or not 0 <= token_id < self._piece_count:
            return b""
        piece: str = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # "<0xE2>"
        return piece.replace("▁", " ").encode()

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        # The lookahead finds all names, even those that overlap or begin inside one another.
        return re.compile("(?=" + "|".join(map(re.escape, sorted(self._special))) + ")")


class StreamDecoder:
    """Decodes ids as they arrive. Returned text is final: a character is returned once all its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is still missing bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for a character that is still incomplete, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def _load(model: bytes, path: Path) -> Any:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
        usable = pieces.get_piece_size() > 0
    except (RuntimeError, OSError):
        usable = False
    if not usable:
        raise BadInput(f"{path}: {len(model)} bytes, not a SentencePiece model; download it again")
    probe = " a  b\n"
    if pieces.decode(pieces.encode(probe)) != probe:
        raise BadInput(f"{path}: changes whitespace; Gemma's tokenizer keeps text as it is, use the checkpoint's own")
    return pieces


def _special_ids(pieces: Any, directory: Path | None) -> dict[str, int]:
    """Name → id of every special token: SentencePiece's control pieces, the known special ones, and the tokens that the
    files in ``directory`` add.
    """
    ids = {
        pieces.id_to_piece(i): i
        for i in range(pieces.get_piece_size())
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.id_to_piece(i) in SPECIAL_PIECES
    }
    if directory is None:
        return ids
    try:
        added = _read_json(directory / "added_tokens.json")
        ids |= {name: int(i) for name, i in added.items() if int(i) >= pieces.get_piece_size()}
        listed = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
        ids |= {token["content"]: int(i) for i, token in listed.items() if token["special"]}
        if not all(isinstance(name, str) and name for name in ids):
            raise ValueError("a token's content is not text")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{directory}: added tokens are unreadable ({error!r}); download the file again") from None
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``; empty if there is no such file."""
    if not path.exists():
        return {}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
