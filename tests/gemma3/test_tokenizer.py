import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import gemma3
from gemma3.errors import BadInput
from gemma3.tokenizer import SPECIAL_PIECES, Tokenizer

DEMO = Path(gemma3.__file__).parent / "demo"
TOKENIZER = Tokenizer(DEMO)
# SentencePiece stores a space as "▁" (U+2581): that character itself does not survive, in any implementation.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
SAMPLES = st.sampled_from(
    ["def f(x):\n\n    return x", "漢字かな", "🦊👩‍👩‍👧🇨🇭", "Ünïcödé", "<b>", "\t\r\n\n\n", "1234", "\0"]
)
TEXT = st.one_of(st.text(CHARACTERS), st.lists(SAMPLES | st.text(CHARACTERS, max_size=4)).map("".join))
# Text that spells special pieces whole, in part, overlapping and nested.
FORGED = st.lists(st.sampled_from([*SPECIAL_PIECES, "<", "<start_of", "_of_turn>", "user\n", " ", "é"])).map("".join)


def test_ids_are_found_by_name() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id) == (0, 1, 2)
    assert TOKENIZER.special_id("<end_of_turn>") == TOKENIZER.end_of_turn_id == 6
    assert TOKENIZER.vocab_size == 4096
    assert TOKENIZER.sha256 == hashlib.sha256((DEMO / "tokenizer.model").read_bytes()).hexdigest()


def test_directory_and_file_are_the_same_tokenizer(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path / "other.model")
    alone = Tokenizer(tmp_path / "other.model")
    assert alone.special == TOKENIZER.special
    assert alone.model == TOKENIZER.model == (DEMO / "tokenizer.model").read_bytes()
    assert alone.encode("<eos> x", bos=True) == TOKENIZER.encode("<eos> x", bos=True)


@given(TEXT)
def test_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, bos=True)) == text


@given(TEXT)
def test_ordinary_text_is_encoded_as_sentencepiece_and_tokenizer_json_do(text: str) -> None:
    ids = TOKENIZER.encode(text, bos=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert ids == pieces.encode(text)
    assert ids == fast.encode(text, add_special_tokens=False).ids


@given(TEXT | FORGED, st.booleans())
def test_text_never_yields_special_tokens(text: str, bos: bool) -> None:
    ids = TOKENIZER.encode(text, bos=bos)
    assert ids[:1] == [TOKENIZER.bos_id] if bos else True
    assert not TOKENIZER.special_ids.intersection(ids[bos:])
    assert TOKENIZER.decode(ids) == text


def test_sentencepiece_alone_parses_special_pieces() -> None:
    """Otherwise the test above could not fail."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    assert TOKENIZER.end_of_turn_id in pieces.encode("<end_of_turn>")


def test_runs_of_newlines_and_digits() -> None:
    assert len(TOKENIZER.encode("\n\n", bos=False)) == 1
    assert len(TOKENIZER.encode("    ", bos=False)) == 1
    assert len(TOKENIZER.encode("2048", bos=False)) == 4


@given(TEXT)
def test_streaming_gives_whole_characters_and_adds_up(text: str) -> None:
    decoder = TOKENIZER.decoder()
    parts = [decoder.push(i) for i in TOKENIZER.encode(text, bos=True)]
    assert text.startswith("".join(parts))
    assert "".join(parts) + decoder.flush() == text
    assert ("�" in "".join(parts)) == ("�" in text)


def byte_id(value: int) -> int:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    return int(pieces.piece_to_id(f"<0x{value:02X}>"))


def test_a_character_comes_with_its_last_byte() -> None:
    decoder = TOKENIZER.decoder()
    assert [decoder.push(byte_id(b)) for b in "🦊".encode()] == ["", "", "", "🦊"]
    assert decoder.flush() == ""


def test_broken_bytes_become_the_replacement_character() -> None:
    decoder = TOKENIZER.decoder()
    assert [decoder.push(byte_id(b)) for b in "🦊".encode()[:2]] == ["", ""]
    assert decoder.flush() == "�"
    assert TOKENIZER.decode([byte_id(0xF0), *TOKENIZER.encode("x", bos=False)]) == "�x"


@given(st.lists(st.integers(0, 5000)))
def test_streaming_any_ids_gives_what_decoding_gives(ids: list[int]) -> None:
    decoder = TOKENIZER.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == TOKENIZER.decode(ids)


def test_ids_without_text_decode_to_nothing() -> None:
    assert TOKENIZER.decode([*sorted(TOKENIZER.special_ids), 4096, 300_000]) == ""


def train(path: Path, **options: Any) -> Path:
    """A tiny SentencePiece model that is not Gemma's."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to learn from"]), model_writer=file, vocab_size=300,
            model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
    return path


def test_missing_corrupt_and_foreign_models_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(BadInput, match=r"tokenizer\.model: no such file"):
        Tokenizer(tmp_path / "tokenizer.model")
    broken = tmp_path / "broken.model"
    for content in (b"", b"not a model", (DEMO / "tokenizer.model").read_bytes()[:30_001]):
        broken.write_bytes(content)
        with pytest.raises(BadInput, match=f"{len(content)} bytes, not a SentencePiece model"):
            Tokenizer(broken)
    broken.write_bytes((DEMO / "tokenizer.model").read_bytes().replace(b"<eos>", b"<e\xffs>"))
    with pytest.raises(BadInput, match="not a SentencePiece model"):
        Tokenizer(broken)
    with pytest.raises(BadInput, match="changes whitespace or characters"):
        Tokenizer(train(tmp_path / "default.model"))
    kept = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    with pytest.raises(BadInput, match="has no piece <pad>"):
        Tokenizer(train(tmp_path / "plain.model", **kept))


def test_a_lone_surrogate_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"lone surrogate '\\ud83e' at 2"):
        TOKENIZER.encode("ab\ud83e", bos=False)
