"""What a checkpoint's directory says about its tokenizer, as one SentencePiece model.

    tokenizer.model          Gemma's SentencePiece model, and/or
    tokenizer.json           the same as Hugging Face's tokenizers library stores it; transformers 5 saves nothing else
    tokenizer_config.json, added_tokens.json, special_tokens_map.json     more tokens

Where two files describe the same thing they are compared, and a contradiction is an error that names it: the pieces by
id, the order of merges, the added and the special tokens, and finally the ids of a text made of odd strings, for which
the tokenizers library reads tokenizer.json by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.added_tokens import AGREE, AddedToken, contradiction, fold, read_added_tokens, shown
from gemma3.errors import BadInput
from gemma3.host.files import check_plain, reason
from gemma3.pieces import SPACE, SPECIAL_PIECES
from gemma3.tokenizer_json import AGAIN, BYTE, JSON, TokenizerJson, piece_scores, read_tokenizer_json

MODEL = "tokenizer.model"

# Strings that tokenizers are known to disagree about. None has the name of a special token.
PROBES = (
    *(" " * count for count in (1, 2, 3, 7, 31, 32, 40, 65)),
    *(f"a{' ' * count}b" for count in (1, 2, 3, 7, 31, 32, 40, 65)),
    *("\n" * count for count in (1, 2, 3, 30, 31, 32, 65)),
    *("\t" * count for count in (1, 2, 31, 32)),
    *(" a", "a ", " a ", "  \n \n\n  a", "\r\n\r\n", "\ta\t\tb \t c", "\u00a0\u2003\u3000\u200b\ufeff"),
    *("The quick brown fox's 1234567890 tests, 3.14159e-10 and 1,000,000.", "don't DON'T I'M x=y+z;"),
    *("def f(x):\n    if x > 0:\n\treturn [i ** 2 for i in range(x)]  # …\n", '{"a": [1, null, "\\u00e9"]}\r\n'),
    *(
        "<table><tr><td>x</td></tr></table>",
        "<b>bold</b> </ b> <B>",
        "<unused>",
        "[multimodal",
        "<0x41>",
        "<|im_start|>",
    ),
    *("<start_of_tur", "start_of_turn>", "<end_of", "<eos", "bos>", "< eos >", "<<pad", "▁", "▁▁", "a▁b ▁ c"),
    *(
        "漢字かな交じり文、カタカナ。",
        "한국어 문장",
        "Ünïcödé",
        "u\u0308n\u0303i",
        "Привет, мир",
        "שלום עולם",
        "مرحبا",
        "नमस्ते",
    ),
    *(
        "🦊👩‍👩‍👧🇨🇭👍🏽",
        "\U0010fffd\ue000",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ① Å ½ ＡＢＣ",
        "\x01\x02\x1b[0m\x7f\x85",
        "\u202eabc\u202c",
        "\ufffd",
    ),
    *("a" * 300, "ab" * 150, "https://example.org/a?b=c&d=%20#e", "C:\\Users\\x", "$\\int_0^1 x\\,dx$", "…—–“”‘’«»"),
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A SentencePiece model with all tokens of a checkpoint, and the file ``path`` that its vocabulary is from.

    ``added`` are the ordinary tokens that JSON files list. ``file`` is the tokenizer.json, if there is one.
    """

    path: Path
    model: bytes
    added: Sequence[str]
    file: TokenizerJson | None


def read_model(path: Path) -> bytes:
    """The content of a SentencePiece model's file. Raises BadInput when it cannot be read."""
    check_plain(path, AGAIN)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {reason(error)}") from None


def read_tokenizer_files(directory: Path, rows: int | None) -> TokenizerFiles:
    """Special tokens at ids from ``rows`` on are left out: text-only checkpoints list one past their embedding table.

    Raises BadInput when a file is missing, unreadable or not Gemma's, or when two files contradict each other.
    """
    has_model, has_json = (_exists(directory / name) for name in (MODEL, JSON))
    if not has_model and not has_json:
        raise BadInput(f"{directory}: has neither {MODEL} nor {JSON}; copy the tokenizer's files there from the model")
    file = read_tokenizer_json(directory / JSON) if has_json else None
    path = directory / (MODEL if has_model else JSON)
    content = read_model(path) if has_model else b""
    if has_model:
        model = parse_model(content, path)
        tokens, special = read_added_tokens(directory, file, len(model.pieces))
        if file is not None:
            _compare(model, path, file, tokens)
    else:
        assert file is not None
        tokens, special = read_added_tokens(directory, file, max(file.ids.values()) + 1)
        model = _from_json(file, {token.name for token in tokens.values()}, special)
    if fold(model, path, tokens, special, rows) or not has_model:
        content = model.SerializeToString(deterministic=True)
    return TokenizerFiles(path, content, [t.name for t in tokens.values() if t.name not in special], file)


def parse_model(content: bytes, path: Path) -> Any:
    """The SentencePiece model in ``content`` as a message. Raises BadInput when it is not one."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2
    try:
        model = protobuf.ModelProto.FromString(content)
        usable = all(piece.piece for piece in model.pieces) and len(model.pieces) > 0
    except (DecodeError, UnicodeDecodeError):
        usable = False
    if not usable:
        raise BadInput(f"{path}: {len(content)} bytes, not a SentencePiece model; {AGAIN}")
    return model


def prove(
    files: TokenizerFiles,
    special: Iterable[str],
    bos_id: int,
    encode: Callable[[str], list[int]],
    decode: Callable[[Iterable[int]], str],
) -> None:
    """Raises BadInput when the tokenizers library, reading tokenizer.json, has other tokens or ids, or another text.

    Text with the name of one of the ``special`` tokens is not compared: ``encode`` cuts such a name in two.
    """
    if files.file is None:
        return
    import tokenizers

    path = files.file.path
    try:
        other = tokenizers.Tokenizer.from_str(files.file.text)
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(f"{path}: the tokenizers library cannot read it ({str(error)[:200]}); {AGAIN}") from None
    other.no_truncation()
    other.no_padding()
    other.encode_special_tokens = True  # text never becomes a special token
    for entry in files.file.added:
        if other.token_to_id(entry["content"]) != entry["id"]:
            raise BadInput(
                f"{path}: lists {shown(entry['content'])} as token {entry['id']}, but the tokenizers library makes it "
                f"{other.token_to_id(entry['content'])}; save the tokenizer again with transformers' save_pretrained"
            )
    with_ends = other.encode("text").ids
    if with_ends != [bos_id, *encode("text")]:
        raise BadInput(
            f"{path}: its post_processor makes {with_ends} of the prompt 'text', but Gemma's prompts begin with <bos> "
            f"({bos_id}) and end without <eos>; nothing else is implemented"
        )
    for text in _probes(files.added):
        if any(name in text for name in special):
            continue
        theirs, ours = other.encode(text, add_special_tokens=False).ids, encode(text)
        if theirs != ours:
            raise contradiction(path, f"{text!r} gives the ids {theirs}", str(ours), files.path)
        if other.decode(theirs) != decode(ours):
            here = f"{ours} is the text {other.decode(theirs)!r}"
            raise contradiction(path, here, repr(decode(ours)), files.path)


def _probes(added: Iterable[str]) -> Iterator[str]:
    yield from PROBES
    for name in (name.replace(SPACE, " ") for name in added):
        yield from (name, f"a{name}b {name}  {name}\n{name}{name} é{name}{name[:-1]}", f" {name[1:]}")


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is an error, not a file that is missing


def _from_json(file: TokenizerJson, added: Set[str], special: Set[str]) -> Any:
    """The SentencePiece model of a vocabulary and its merges, as Gemma's own is: bytes for what is not in the
    vocabulary, text kept as it is. Its pieces that are in ``added`` become user-defined, unless they are special and
    merges make them.
    """
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2
    kind = protobuf.ModelProto.SentencePiece
    made = {left + right for left, right in file.merges}
    added = {name for name in added | special if name not in special or name in SPECIAL_PIECES or name not in made}
    scores = piece_scores(file, {name for name in file.ids if name not in added and not BYTE.fullmatch(name)})
    types = dict.fromkeys(("<pad>", "<eos>", "<bos>"), kind.CONTROL) | {"<unk>": kind.UNKNOWN}
    model = protobuf.ModelProto()
    for token, name in sorted((token, name) for name, token in file.ids.items()):
        while len(model.pieces) < token:
            model.pieces.add(piece=f"<no token {len(model.pieces)}>", score=0.0, type=kind.UNUSED)
        default = kind.BYTE if BYTE.fullmatch(name) else kind.USER_DEFINED if name in added else kind.NORMAL
        name = name.replace(" ", SPACE) if default == kind.USER_DEFINED else name
        # Characters are not merged, so their score does not matter.
        model.pieces.add(piece=name, score=scores.get(name, 0.0), type=types.get(name, default))
    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = True
    for name in ("pad", "eos", "bos", "unk"):
        setattr(model.trainer_spec, f"{name}_id", file.ids.get(f"<{name}>", -1))
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def _compare(model: Any, path: Path, file: TokenizerJson, tokens: dict[int, AddedToken]) -> None:
    """Raises BadInput when tokenizer.json has other pieces than ``model``, or merges in another order."""
    names = {token: name for name, token in file.ids.items()}
    for token in tokens.values():
        if token.path == file.path and names.setdefault(token.id, token.name) != token.name:
            here = f"token {token.id} is {shown(token.name)} among its added tokens"
            raise contradiction(file.path, here, f"{shown(names[token.id])} in the vocabulary", file.path)
    for i, piece in enumerate(model.pieces):
        found = names.get(i)
        if found is None and piece.type == model.SentencePiece.UNUSED:
            continue
        if found is None or found.replace(" ", SPACE) != piece.piece.replace(" ", SPACE):
            here = f"token {i} is {'missing' if found is None else shown(found)}"
            raise contradiction(file.path, here, shown(piece.piece), path)
    for name, i in file.ids.items():
        if i >= len(model.pieces) and i not in tokens:
            raise BadInput(f"{file.path}: token {i}, {shown(name)}, is not in {path.name}; {AGREE}")
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == model.SentencePiece.NORMAL}
    last, last_score = "", float("inf")
    for name in piece_scores(file, set(normal)):  # from the first merge to the last
        if normal[name] > last_score:
            raise contradiction(file.path, f"merges {shown(last)} before {shown(name)}", "after it", path)
        last, last_score = name, normal[name]
