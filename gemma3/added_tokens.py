"""Tokens that a checkpoint's JSON files list: added past the vocabulary, or pieces of it that became special.

tokenizer.json, tokenizer_config.json and added_tokens.json list them by id. Besides, tokenizer_config.json and
special_tokens_map.json name special tokens without ids. As in transformers, special_tokens_map.json counts only where
tokenizer_config.json lists no tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput
from gemma3.host.files import read_optional
from gemma3.pieces import SPACE, SPECIAL_PIECES
from gemma3.tokenizer_json import AGAIN, JSON, TokenizerJson, check_id, check_name

CONFIG, ADDED, NAMED = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
AGREE = "remove the file that is out of date, or save the tokenizer again with transformers' save_pretrained"
LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token with its id, as the file ``path`` lists it. ``special`` None means that the file does not say."""

    id: int
    name: str
    special: bool | None
    path: Path


def read_added_tokens(
    directory: Path, file: TokenizerJson | None, count: int
) -> tuple[dict[int, AddedToken], frozenset[str]]:
    """The tokens that the files of ``directory`` list, by id, and the names of all special ones.

    ``file`` is its tokenizer.json, if it has one, and ``count`` the size of the vocabulary without added tokens. Raises
    BadInput for a file that is unreadable, for two files that contradict each other, and for an ordinary token with
    rules that SentencePiece does not have.
    """
    config, added = _read(directory / CONFIG), _read(directory / ADDED)
    in_json = None if file is None else list(_of_json(file))
    if file is None:
        _check_ends(directory / CONFIG, config)
    entries = config.get("added_tokens_decoder")
    in_config = None if entries is None else list(_of_config(directory / CONFIG, entries))
    in_added = list(_of_added(directory / ADDED, added))
    tokens = _merged([*(in_json or ()), *(in_config or ()), *in_added])
    named = set(_named(directory / CONFIG, config))
    if in_config is None:
        named |= set(_named(directory / NAMED, _read(directory / NAMED)))
    special = SPECIAL_PIECES | named | {token.name for token in tokens.values() if token.special}
    # Of several lists, transformers 5 believes tokenizer_config.json and other programs tokenizer.json.
    for listed in (in_json, in_config, in_added):
        for name, other in ((JSON, in_json), (CONFIG, in_config)):
            known = None if other is None else {token.name for token in other}
            for token in listed or ():
                if known is not None and token.id >= count and token.name not in special | known:
                    raise BadInput(f"{token.path}: the added token {shown(token.name)} is not in {name}; {AGREE}")
    return tokens, frozenset(special)


def _check_ends(path: Path, config: Mapping[str, Any]) -> None:
    """Raises BadInput unless a prompt begins with BOS and does not end with EOS.

    transformers 5 reads these keys only where there is no tokenizer.json.
    """
    for key, needed in (("add_bos_token", True), ("add_eos_token", False)):
        if config.get(key, needed) is not needed:
            raise BadInput(
                f"{path}: {key} is {str(config[key])[:60]}; Gemma 3 was trained with {str(needed).lower()}, and "
                "nothing else is implemented"
            )


def contradiction(path: Path, here: str, there: str, where: Path) -> BadInput:
    """The error for two files that say different things about a token: ``here`` in ``path``, ``there`` in ``where``."""
    return BadInput(f"{path}: {here}, but {there} in {where.name}; {AGREE}")


def shown(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:59] + "…")


def _of_json(file: TokenizerJson) -> Iterator[AddedToken]:
    for entry in file.added:
        yield _token(file.path, entry, entry.get("id") if isinstance(entry, dict) else None)


def _of_config(path: Path, entries: Any) -> Iterator[AddedToken]:
    if not isinstance(entries, dict):
        raise BadInput(f"{path}: added_tokens_decoder is not an object; {AGAIN}")
    for key, entry in entries.items():
        yield _token(path, entry, int(key) if key.isdecimal() and key.isascii() and len(key) < 10 else key)


def _of_added(path: Path, entries: Mapping[str, Any]) -> Iterator[AddedToken]:
    for name, token in entries.items():
        yield AddedToken(check_id(path, check_name(path, name), token), name, None, path)


def _token(path: Path, entry: Any, token: Any) -> AddedToken:
    if not isinstance(entry, dict):
        raise BadInput(f"{path}: an added token is {entry!r:.60}, not an object; {AGAIN}")
    name = check_name(path, entry.get("content"))
    flags = {key: entry.get(key, False) for key in ("special", "lstrip", "rstrip", "single_word")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise BadInput(f"{path}: the token {shown(name)} has flags that are not true or false; {AGAIN}")
    special = flags.pop("special")
    if not special and any(flags.values()):
        raise BadInput(
            f"{path}: the added token {shown(name)} has {', '.join(key for key, flag in flags.items() if flag)}, which "
            "SentencePiece does not have; add it without, or as a special token"
        )
    return AddedToken(check_id(path, name, token), name, special, path)


def _named(path: Path, data: Mapping[str, Any]) -> Iterator[str]:
    """The names of special tokens: values of keys like bos_token, and those in lists."""
    values = [value for key, value in data.items() if key.endswith("_token") and not isinstance(value, bool)]
    for key in LISTS:
        several = data.get(key) or []
        values += several.values() if isinstance(several, dict) else several if isinstance(several, list) else [several]
    for value in values:
        name = value.get("content") if isinstance(value, dict) else value
        if name is not None:
            yield check_name(path, name)


def _merged(listed: Iterable[AddedToken]) -> dict[int, AddedToken]:
    by_id: dict[int, AddedToken] = {}
    by_name: dict[str, AddedToken] = {}
    for token in listed:
        other = by_id.setdefault(token.id, token)
        if other.name != token.name:
            here = f"token {token.id} is {shown(token.name)}"
            raise contradiction(token.path, here, shown(other.name), other.path)
        other = by_name.setdefault(token.name, token)
        if other.id != token.id:
            raise contradiction(token.path, f"{shown(token.name)} is token {token.id}", str(other.id), other.path)
        if None not in (token.special, other.special) and token.special != other.special:
            if token.name not in SPECIAL_PIECES:
                here, there = ("special", "ordinary") if token.special else ("ordinary", "special")
                raise contradiction(token.path, f"{shown(token.name)} is {here}", there, other.path)
        elif other.special is None:
            by_id[token.id] = by_name[token.name] = token
    return by_id


def _read(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``; empty if there is no such file."""
    return read_optional(path, AGAIN)


def fold(model: Any, path: Path, tokens: Mapping[int, AddedToken], special: frozenset[str], rows: int | None) -> bool:
    """Put ``tokens`` into the SentencePiece model ``model``, which was read from ``path``. Returns whether it changed.

    Ordinary tokens become user-defined pieces, special ones control pieces, and ids between them that have no name
    become unused pieces. Special tokens at ids from ``rows`` on are left out. Raises BadInput when a token has another
    name in the model, when two tokens are the same text, and for a special token without an id or in ordinary text.
    """
    kind = model.SentencePiece
    names = {piece.piece: i for i, piece in enumerate(model.pieces)}
    count = len(model.pieces)
    changed = False
    for token in tokens.values():
        name = token.name.replace(" ", SPACE)
        if token.id < count:
            piece = model.pieces[token.id]
            if piece.piece.replace(" ", SPACE) != name:
                raise contradiction(token.path, f"token {token.id} is {shown(token.name)}", shown(piece.piece), path)
        elif token.name in names:
            here, there = f"{shown(token.name)} is token {token.id}", str(names[token.name])
            raise contradiction(token.path, here, there, path)
    for name, i in names.items():
        piece, listed = model.pieces[i], tokens.get(i)
        if name in SPECIAL_PIECES or piece.type in (kind.BYTE, kind.UNKNOWN):
            continue
        if name in special:
            if piece.type == kind.NORMAL:
                raise BadInput(
                    f"{path}: {shown(name)} is a special token and a piece of ordinary text; give the special token a "
                    "name of its own"
                )
            wanted = kind.CONTROL
        elif listed is None:
            continue
        elif piece.type == kind.CONTROL:
            raise contradiction(listed.path, f"{shown(name)} is ordinary", "a control piece", path)
        else:
            wanted = kind.USER_DEFINED
        if piece.type != wanted:
            piece.type, changed = wanted, True
    past = [token for i, token in sorted(tokens.items()) if i >= count]
    if rows is not None:
        past = [token for token in past if token.id < rows or token.name not in special]
    for token in past:
        while len(model.pieces) < token.id:
            _append(model, names, f"<no token {len(model.pieces)}>", kind.UNUSED)
        name = token.name.replace(" ", SPACE)
        if name in names:
            raise BadInput(
                f"{token.path}: the added token {shown(token.name)} is the same text as token {names[name]}, which "
                "SentencePiece does not have; give it another name"
            )
        _append(model, names, name, kind.CONTROL if token.name in special else kind.USER_DEFINED)
    known = names.keys() | {token.name.replace(" ", SPACE) for token in tokens.values()}
    for name in sorted(special - SPECIAL_PIECES):
        if name.replace(" ", SPACE) not in known:
            raise BadInput(f"{path.parent}: the special token {shown(name)} has no id in any file; {AGREE}")
    if changed or past:
        model.trainer_spec.vocab_size = len(model.pieces)
    return changed or bool(past)


def _append(model: Any, names: dict[str, int], name: str, piece_type: int) -> None:
    names[name] = len(model.pieces)
    model.pieces.add(piece=name, score=0.0, type=piece_type)
