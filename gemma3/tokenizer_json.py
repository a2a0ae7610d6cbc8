"""Gemma's ``tokenizer.json``, the file of Hugging Face's tokenizers library, read and checked.

The file has merges of two pieces into one, the best first. A SentencePiece model has a score for each piece instead:
it merges any two neighbours that make up a piece, the best score first. Both give the same ids when the merges of a
piece are all the ways to make it, and follow one another. The released file is like that; another one is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput
from gemma3.host.files import object_in, read_text
from gemma3.pieces import SPACE

JSON = "tokenizer.json"
MAX_TOKENS = 1 << 20  # the released vocabulary has 262145
AGAIN = "copy it again from the model"
GEMMAS_OWN = "gemma-edge reads Gemma's own tokenizer, with tokens added or renamed"

REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# The second one finds no space: they are replaced before.
SPLIT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODER = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
# The settings of Gemma's BPE, each with the values that mean the same.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "unk_token": ("<unk>",),
    "byte_fallback": (True,),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (False, None),
}
BYTE = re.compile("<0x[0-9A-F]{2}>")
BYTES = [f"<0x{value:02X}>" for value in range(256)]


@dataclass(frozen=True)
class TokenizerJson:
    """A parsed ``tokenizer.json``. ``ids`` is its vocabulary without the tokens that only ``added`` lists.

    ``added`` is as in the file: objects with id, content, special, lstrip, rstrip, single_word and normalized.
    """

    path: Path
    text: str
    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[Any]


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Raises BadInput as ``read_object`` does, and for a tokenizer with other rules than Gemma's."""
    text = read_text(path, AGAIN)
    data = object_in(text, path, AGAIN)
    model = data.get("model")
    if not isinstance(model, dict):
        raise BadInput(f"{path}: has no model; {AGAIN}")
    for key, allowed in SETTINGS.items():
        if model.get(key, allowed[-1]) not in allowed:
            raise BadInput(
                f"{path}: {key} of its model is {_shown(model[key])}, Gemma's is {allowed[0]!r}; {GEMMAS_OWN}"
            )
    normalizer, decoder = _steps(data, "normalizer"), _steps(data, "decoder")
    if normalizer != [REPLACE_SPACES]:
        raise BadInput(f"{path}: its normalizer is {_shown(normalizer)}, Gemma's only writes spaces as ▁; {GEMMAS_OWN}")
    if _steps(data, "pre_tokenizer") not in ([], [SPLIT_AT_SPACES]):
        raise BadInput(f"{path}: its pre_tokenizer is {_shown(data['pre_tokenizer'])}, Gemma has none; {GEMMAS_OWN}")
    if decoder != DECODER:
        raise BadInput(f"{path}: its decoder is {_shown(decoder)}, not Gemma's; {GEMMAS_OWN}")
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        raise BadInput(f"{path}: added_tokens is {_shown(added)}, not a list; {AGAIN}")
    return TokenizerJson(path, text, _vocabulary(path, model.get("vocab")), _merges(path, model.get("merges")), added)


def check_name(path: Path, name: Any) -> str:
    """``name`` if a token can have it. Raises BadInput for anything but text that is valid Unicode without NUL."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadInput(f"{path}: {_shown(name)} is no name for a token; {AGAIN}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{path}: the token {name!r} has a lone surrogate, which is no valid Unicode; {AGAIN}") from None
    return name


def check_id(path: Path, name: str, token: Any) -> int:
    """``token`` if it can be a token's id. Raises BadInput for a negative, huge or other value."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < MAX_TOKENS:
        raise BadInput(f"{path}: the id of {name!r} is {_shown(token)}, not from 0 to {MAX_TOKENS - 1}; {AGAIN}")
    return token


def piece_scores(file: TokenizerJson, ordinary: set[str]) -> dict[str, float]:
    """The score of each of the pieces ``ordinary``, those that merging can make: minus the rank of its first merge.

    Raises BadInput when SentencePiece would merge otherwise than the file says.
    """
    scores: dict[str, float] = {}
    last = ""
    for rank, (left, right) in enumerate(file.merges):
        piece = left + right
        if piece in ordinary:
            if piece != last and piece in scores:
                raise BadInput(f"{file.path}: the merges of {piece!r} do not follow one another; {GEMMAS_OWN}")
            scores.setdefault(piece, -float(rank))
            last = piece
    merges = set(file.merges)
    for piece in ordinary:
        # SentencePiece begins with single characters, whether they are pieces or not.
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if cut > 1 and left not in ordinary:
                continue
            right = piece[cut:]
            if (left, right) not in merges and (len(right) == 1 or right in ordinary):
                raise BadInput(f"{file.path}: no merge makes {piece!r} of {left!r} and {right!r}; {GEMMAS_OWN}")
    return scores


def _vocabulary(path: Path, vocabulary: Any) -> dict[str, int]:
    if not isinstance(vocabulary, dict):
        raise BadInput(f"{path}: its model has no vocab; {AGAIN}")
    names: dict[int, str] = {}
    for name, token in vocabulary.items():
        check_id(path, name, token)
        if names.setdefault(token, name) != name:
            raise BadInput(f"{path}: {names[token]!r} and {name!r} both have the id {token}; {AGAIN}")
    try:
        joined = "".join(vocabulary).encode()
    except UnicodeEncodeError:
        joined = b"\0"
    if "" in vocabulary or b"\0" in joined:  # checking each name alone would take a second
        for name in vocabulary:
            check_name(path, name)
    missing = [name for name in BYTES if name not in vocabulary]
    if missing:
        raise BadInput(f"{path}: has no piece {missing[0]} for that byte; {GEMMAS_OWN}")
    return vocabulary


def _merges(path: Path, merges: Any) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise BadInput(f"{path}: its model has no merges; {AGAIN}")
    pairs = []
    for merge in merges:  # ["a", "b"], or "a b" in older files
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise BadInput(f"{path}: {_shown(merge)} is no merge of two pieces; {AGAIN}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _steps(data: dict[str, Any], key: str) -> list[Any]:
    """The steps of a normalizer, pre_tokenizer or decoder: those of a sequence, or the only one."""
    value = data.get(key)
    if isinstance(value, dict) and value.get("type") == "Sequence":
        value = next((steps for name, steps in value.items() if name != "type"), None)
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _shown(value: Any) -> str:
    """``value`` for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"
