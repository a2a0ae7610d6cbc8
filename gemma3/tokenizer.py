"""Gemma's SentencePiece tokenizer: text to ids and back, and text as it streams out of a model.

Special tokens (turn and image markers, pad, eos, bos …) are never parsed out of text: a user who types
``<end_of_turn>`` gets the ordinary pieces that spell it. The chat puts the real ones in by id. Other
user-defined pieces of Gemma's vocabulary (runs of newlines, HTML tags) are ordinary text and stay whole.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from gemma3.errors import BadInput

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
# Special in every Gemma 3 checkpoint, also where tokenizer_config.json, which says so, is not beside the model.
SPECIAL_PIECES = frozenset(
    {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}
    | {START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN}
)


class Tokenizer:
    """``tokenizer.model`` at ``path``, or in the checkpoint directory ``path``.

    Tokens that a checkpoint adds beyond the SentencePiece vocabulary are read from ``added_tokens.json`` and
    ``tokenizer_config.json`` beside the model where they exist. Raises BadInput when a file is missing,
    unreadable or not a Gemma tokenizer.
    """

    def __init__(self, path: Path | str) -> None:
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
        self._special = _special_ids(self._pieces, self.path.parent)
        self.pad_id = self.special_id("<pad>")
        self.eos_id = self.special_id("<eos>")
        self.bos_id = self.special_id("<bos>")
        self.end_of_turn_id = self.special_id(END_OF_TURN)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a name. The model's table may have more rows."""
        last_special = max(self._special.values())
        return max(self._piece_count, last_special + 1)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return frozenset(self._special.values())

    def special_id(self, piece: str) -> int:
        """The id of a special token by name. Raises BadInput when this tokenizer has none."""
        if piece not in self._special:
            raise BadInput(f"{self.path}: has no piece {piece}; this is not the tokenizer of a Gemma 3 chat model")
        return self._special[piece]

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of plain text, with BOS in front if ``bos``. Never a special token, whatever the text spells.

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
        # A special piece's name cut after its first character no longer matches the piece.
        for match in self._special_names.finditer(text):
            ids += self._pieces.encode(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + list(self._pieces.encode(text[start:]))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``. Special tokens and rows past the vocabulary give none; invalid UTF-8 gives U+FFFD."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes one id stands for; a byte piece may hold part of a character."""
        if token_id in self.special_ids or not 0 <= token_id < self._piece_count:
            return b""
        piece: str = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # "<0xE2>"
        return piece.replace("▁", " ").encode()

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        # Lookahead: names that overlap or begin inside one another are all found.
        return re.compile("(?=" + "|".join(map(re.escape, sorted(self._special))) + ")")


class StreamDecoder:
    """Text of ids as they arrive. What has been returned is final: a character comes once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is still missing bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character never became complete."""
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


def _special_ids(pieces: Any, directory: Path) -> dict[str, int]:
    """Name → id of every special token: SentencePiece's control and known special pieces, and added tokens."""
    ids = {
        pieces.id_to_piece(i): i
        for i in range(pieces.get_piece_size())
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.id_to_piece(i) in SPECIAL_PIECES
    }
    try:
        added = _read_json(directory / "added_tokens.json")
        ids |= {name: int(i) for name, i in added.items() if int(i) >= pieces.get_piece_size()}
        listed = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
        ids |= {token["content"]: int(i) for i, token in listed.items() if token["special"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{directory}: added tokens are unreadable ({error!r}); download the file again") from None
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``, empty where there is no such file."""
    if not path.exists():
        return {}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
