"""Gemma's SentencePiece tokenizer: text to token ids and back, and text as it streams out of a model.

Text never becomes a special token (turn and image markers, pad, eos, bos …): a user who types ``<end_of_turn>`` gets
the ordinary pieces that spell it. gemma3/chat.py inserts the real markers by id. Other user-defined pieces of Gemma's
vocabulary (runs of newlines, HTML tags) are ordinary text and stay whole.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from gemma3.errors import BadInput
from gemma3.pieces import END_OF_IMAGE as END_OF_IMAGE
from gemma3.pieces import END_OF_TURN as END_OF_TURN
from gemma3.pieces import IMAGE_SOFT_TOKEN as IMAGE_SOFT_TOKEN
from gemma3.pieces import SPACE
from gemma3.pieces import SPECIAL_PIECES as SPECIAL_PIECES
from gemma3.pieces import START_OF_IMAGE as START_OF_IMAGE
from gemma3.pieces import START_OF_TURN as START_OF_TURN
from gemma3.tokenizer_files import prove, read_model, read_tokenizer_files
from gemma3.tokenizer_json import AGAIN


class Tokenizer:
    """The tokenizer of the checkpoint directory ``path``, or the SentencePiece model in the file ``path`` alone.

    A directory has tokenizer.model or tokenizer.json, and may list more tokens in other files. They become one
    SentencePiece model, ``model``, which as a file is the same tokenizer: gemma3/tokenizer_files.py says how. Special
    tokens at ids from ``rows`` on, the rows of the embedding table, are left out. ``special`` has the special tokens,
    by name. Raises BadInput when a file is missing, unreadable or not a Gemma tokenizer, or contradicts another one.
    """

    def __init__(self, path: Path | str, rows: int | None = None) -> None:
        path = Path(path)
        files = read_tokenizer_files(path, rows) if path.is_dir() else None
        self.path = path if files is None else files.path
        self.model = read_model(path) if files is None else files.model
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._pieces = _load(self.model, self.path)
        self._piece_count: int = self._pieces.get_piece_size()
        self.special: Mapping[str, int] = _special_ids(self._pieces)
        self.pad_id = self.special_id("<pad>")
        self.eos_id = self.special_id("<eos>")
        self.bos_id = self.special_id("<bos>")
        self.end_of_turn_id = self.special_id(END_OF_TURN)
        if files is not None:
            prove(files, self.special, self.bos_id, lambda text: self.encode(text, bos=False), self.decode)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id with a name. The model's embedding table may have more rows."""
        return self._piece_count

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which stand for no text."""
        return frozenset(self.special.values())

    def special_id(self, piece: str) -> int:
        """The id of a special token by its name. Raises BadInput when the tokenizer has none of that name."""
        if piece not in self.special:
            raise BadInput(f"{self.path}: has no piece {piece}; this is not the tokenizer of a Gemma 3 chat model")
        return self.special[piece]

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
        """The UTF-8 bytes that one id stands for: part of a character for a byte piece.

        Empty for a special token and for an id without a token.
        """
        if token_id in self.special_ids or not 0 <= token_id < self._piece_count or self._pieces.is_unused(token_id):
            return b""
        piece: str = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # "<0xE2>"
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        # The lookahead finds all names, even those that overlap or begin inside one another.
        return re.compile("(?=" + "|".join(map(re.escape, sorted(self.special))) + ")")


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
        usable = pieces.get_piece_size() > 0 and all(map(pieces.id_to_piece, range(pieces.get_piece_size())))
    except (RuntimeError, OSError, UnicodeDecodeError):
        usable = False
    if not usable:
        raise BadInput(f"{path}: {len(model)} bytes, not a SentencePiece model; {AGAIN}")
    probe = " a  b\n①ﬁ\t"
    if pieces.decode(pieces.encode(probe)) != probe:
        raise BadInput(f"{path}: changes whitespace or characters; Gemma's tokenizer keeps text as it is, use Gemma's")
    return pieces


def _special_ids(pieces: Any) -> dict[str, int]:
    """Name → id of every special token: SentencePiece's control pieces, and those that are special in every Gemma 3."""
    return {
        pieces.id_to_piece(i).replace(SPACE, " "): i
        for i in range(pieces.get_piece_size())
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.id_to_piece(i) in SPECIAL_PIECES
    }
