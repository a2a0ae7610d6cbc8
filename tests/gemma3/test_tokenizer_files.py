"""A checkpoint's tokenizer files against transformers, which reads the same directory by itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import gemma3
from gemma3.errors import BadInput
from gemma3.pieces import SPECIAL_PIECES
from gemma3.tokenizer import Tokenizer
from gemma3.tokenizer_files import PROBES, parse_model
from gemma3.write_tokenizer_json import as_tokenizer_json
from scripts.random_checkpoint import made_up_tokenizer

DEMO = Path(gemma3.__file__).parent / "demo"
WORDS = ["[SCRATCH]", "Xylo", "foo bar", "<CHARACTER_1>", "\nnewest", "漢x", "qzx", "qz"]
# Text about the added words, whole, in part and side by side.
TEXT = st.lists(
    st.sampled_from([*WORDS, "[SCR", "ylo", " ", "  ", "\n", "x", "é", "🦊", "<b>", "12"]) | st.text(max_size=3)
).map("".join)


def saved(directory: Path, change: Callable[[Any], object] = lambda _: None) -> Path:
    """A directory as transformers 5 saves the demo's tokenizer after ``change``: tokenizer.json, no tokenizer.model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    change(tokenizer)
    tokenizer.save_pretrained(directory)
    assert not (directory / "tokenizer.model").exists()
    return directory


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def listed(token: int, name: Any, special: bool = False, **flags: bool) -> dict[str, Any]:
    """A token as tokenizer.json lists it."""
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | flags
    return {"id": token, "content": name, "special": special, "normalized": not special} | rules


def same_as_transformers(tokenizer: Tokenizer, directory: Path, texts: tuple[str, ...] = PROBES) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts:
        ids = oracle.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer with ``WORDS`` added, from nothing but its one file, and transformers'."""
    directory = saved(tmp_path_factory.mktemp("words"), lambda tokenizer: tokenizer.add_tokens(WORDS))
    path = tmp_path_factory.mktemp("alone") / "tokenizer.model"
    path.write_bytes(Tokenizer(directory).model)
    return Tokenizer(path), transformers.AutoTokenizer.from_pretrained(directory)


@given(text=TEXT)
def test_added_words_are_encoded_and_printed_as_transformers_does(with_words: tuple[Tokenizer, Any], text: str) -> None:
    ours, oracle = with_words
    ids = oracle.encode(text, add_special_tokens=False)
    if "▁" not in text and not any(name in text for name in SPECIAL_PIECES):
        assert ours.encode(text, bos=False) == ids
    assert ours.decode(ids) == oracle.decode(ids)
    decoder = ours.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == ours.decode(ids)


def test_every_added_word_is_one_id(with_words: tuple[Tokenizer, Any]) -> None:
    ours, _ = with_words
    assert [ours.encode(word, bos=False) for word in WORDS] == [[4096 + index] for index in range(len(WORDS))]
    assert ours.vocab_size == 4096 + len(WORDS)
    assert ours.special.keys() == SPECIAL_PIECES


def test_tokenizer_json_alone_is_the_same_tokenizer(tmp_path: Path) -> None:
    ours = Tokenizer(saved(tmp_path))
    assert ours.path.name == "tokenizer.json"
    from_model = Tokenizer(DEMO / "tokenizer.model")
    assert ours.special == from_model.special
    same_as_transformers(ours, tmp_path)
    ids = range(ours.vocab_size)
    assert [ours.token_bytes(i) for i in ids] == [from_model.token_bytes(i) for i in ids]


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    assert Tokenizer(tmp_path).model == (DEMO / "tokenizer.model").read_bytes()
    same_as_transformers(Tokenizer(tmp_path), tmp_path)


def test_a_post_processor_without_bos(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda data: data.update(post_processor=None))
    with pytest.raises(BadInput, match=r"its post_processor makes .* Gemma's prompts begin with <bos> \(2\)"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("add_bos_token", False), ("add_eos_token", True)])
def test_ends_of_a_prompt_that_are_not_implemented(tmp_path: Path, key: str, value: bool) -> None:
    """transformers reads these keys only where there is no tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda data: data.update({key: value}))
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("text").input_ids
    assert ids == Tokenizer(tmp_path).encode("text", bos=True)
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("text").input_ids
    with pytest.raises(BadInput, match=f"{key} is {value}; Gemma 3 was trained with"):
        Tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda data: data.pop(key))
    assert ids != Tokenizer(tmp_path).encode("text", bos=True)


def test_added_words_as_transformers_4_saved_them(tmp_path: Path) -> None:
    saved(tmp_path, lambda tokenizer: tokenizer.add_tokens(WORDS))
    alone = Tokenizer(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({word: 4096 + i for i, word in enumerate(WORDS)}))
    decoder = {str(4096 + i): listed(0, word) for i, word in enumerate(WORDS)}
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] |= {i: {k: v for k, v in one.items() if k != "id"} for i, one in decoder.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    both = Tokenizer(tmp_path)
    assert both.path.name == "tokenizer.model"
    for text in (*PROBES, " ".join(WORDS)):
        assert both.encode(text, bos=True) == alone.encode(text, bos=True)
    same_as_transformers(both, tmp_path, (*PROBES, " ".join(WORDS)))


def test_added_special_tokens_are_never_parsed_and_print_nothing(tmp_path: Path) -> None:
    names = ["<|im_start|>", "<|im_end|>"]
    saved(tmp_path, lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": names}))
    ours = Tokenizer(tmp_path)
    assert [ours.special[name] for name in names] == [ours.special_id(name) for name in names] == [4096, 4097]
    ids = ours.encode("<|im_start|>user<|im_end|>", bos=False)
    assert not ours.special_ids.intersection(ids)
    assert ours.decode([4096, *ids, 4097]) == "<|im_start|>user<|im_end|>"
    same_as_transformers(ours, tmp_path, tuple(text for text in PROBES if not any(name in text for name in names)))


def test_a_vocabulary_piece_that_became_a_token_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, lambda tokenizer: tokenizer.add_tokens(["the"]))
    same_as_transformers(Tokenizer(tmp_path), tmp_path, ("other the theatre", " the"))


def test_ids_between_added_tokens_give_no_text(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 4096, "wordy": 4100}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<tool>"]}))
    ours = Tokenizer(tmp_path)
    assert ours.vocab_size == 4101
    assert ours.decode([4096, 4097, 4099, 4100]) == "wordy"
    assert ours.encode("<no token 4097>wordy", bos=False)[-1] == 4100
    assert max(ours.encode("<no token 4097>", bos=False)) < 4096


def test_special_tokens_past_the_embedding_table_are_left_out(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"wordy": 4096, "<tool>": 4097}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"tool_token": "<tool>"}))
    assert Tokenizer(tmp_path, rows=4098).special["<tool>"] == 4097
    assert Tokenizer(tmp_path, rows=4097).vocab_size == 4097
    assert Tokenizer(tmp_path, rows=4096).vocab_size == 4097  # an ordinary one stays, and is refused with the model


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up tokenizer in both forms, with unused pieces as Gemma's has them."""
    directory = tmp_path_factory.mktemp("made-up")
    content = made_up_tokenizer(900)
    (directory / "tokenizer.model").write_bytes(content)
    model = parse_model(content, directory)
    (directory / "tokenizer.json").write_text(as_tokenizer_json(model), encoding="utf-8")
    return directory


def rename(data: Any, old: str, new: str) -> None:
    """Rename a piece everywhere in a tokenizer.json, as fine-tunes do with Gemma's unused ones."""
    data["model"]["vocab"] = {new if name == old else name: token for name, token in data["model"]["vocab"].items()}
    for entry in data["added_tokens"]:
        if entry["content"] == old:
            entry |= {"content": new, "special": True}


def test_a_renamed_piece(made_up: Path, tmp_path: Path) -> None:
    shutil.copy(made_up / "tokenizer.json", tmp_path)
    edit(tmp_path / "tokenizer.json", lambda data: rename(data, "<unused5>", "<|im_start|>"))
    renamed = Tokenizer(tmp_path)
    assert renamed.special["<|im_start|>"] == Tokenizer(made_up).encode("<unused5>", bos=False)[0]
    shutil.copy(made_up / "tokenizer.model", tmp_path)
    with pytest.raises(
        BadInput, match=r"tokenizer\.json: token 10 is '<\|im_start\|>', but '<unused5>' in tokenizer\.mo"
    ):
        Tokenizer(tmp_path)


def test_a_piece_that_became_special(made_up: Path, tmp_path: Path) -> None:
    shutil.copytree(made_up, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "tokenizer.json", lambda data: rename(data, "<unused5>", "<unused5>"))
    ours = Tokenizer(tmp_path)
    assert ours.special["<unused5>"] == 10
    assert 10 not in ours.encode("<unused5>", bos=False)
    (tmp_path / "alone.model").write_bytes(ours.model)
    assert Tokenizer(tmp_path / "alone.model").special == ours.special


def added(data: Any, *entries: Any) -> None:
    data["added_tokens"] += entries


CONTRADICTIONS: list[tuple[str, Callable[[Any], object], str]] = [
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"the": 344, "in": 356}), "both have the id"),
    ("tokenizer.json", lambda d: d["model"]["merges"].reverse(), "merges .* before|follow one another"),
    ("tokenizer.json", lambda d: d["model"]["merges"].pop(7), "no merge makes '▁is' of '▁i' and 's'"),
    ("tokenizer.json", lambda d: d.update(normalizer={"type": "NFKC"}), "its normalizer is .*NFKC"),
    ("tokenizer.json", lambda d: d.update(normalizer=None), "its normalizer is"),
    ("tokenizer.json", lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "its pre_tokenizer is"),
    ("tokenizer.json", lambda d: d.update(decoder=None), "its decoder is"),
    ("tokenizer.json", lambda d: d["model"].update(byte_fallback=False), "byte_fallback of its model is False"),
    ("tokenizer.json", lambda d: d["model"].update(type="Unigram"), "type of its model is 'Unigram'"),
    ("tokenizer.json", lambda d: d.update(model=[]), "has no model"),
    ("tokenizer.json", lambda d: d["model"].update(vocab=[]), "has no vocab"),
    ("tokenizer.json", lambda d: d["model"].update(merges=[["a"]]), "is no merge of two pieces"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].pop("<0x41>"), "has no piece <0x41>"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"newest": 4096}), "'newest', is not in tokenizer.model"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"newest": -1}), "the id of 'newest' is -1"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"newest": 10**9}), "the id of 'newest' is 1000000000"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"": 4096}), "'' is no name"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"\ud800": 4096}), "lone surrogate"),
    ("tokenizer.json", lambda d: added(d, listed(4096, "word", single_word=True)), "'word' has single_word"),
    ("tokenizer.json", lambda d: added(d, listed(4096, "word", lstrip=True)), "'word' has lstrip"),
    ("tokenizer.json", lambda d: added(d, listed(4096, "word")), "'word' is not in tokenizer_config.json"),
    (
        "tokenizer.json",
        lambda d: added(d, listed(4096, "<x>", True), listed(4097, "<x>", True)),
        "'<x>' is token 4097, but 4096",
    ),
    ("tokenizer.json", lambda d: added(d, listed(4099, "<x>", True)), "'<x>' as token 4099, but the tokenizers"),
    ("tokenizer.json", lambda d: added(d, listed(4096, "<pad>", True)), "'<pad>' is token 4096, but 0"),
    ("tokenizer.json", lambda d: added(d, listed(5, "word")), "token 5 is 'word', but '<start_of_turn>'"),
    ("tokenizer.json", lambda d: added(d, "word"), "is 'word', not an object"),
    ("tokenizer.json", lambda d: added(d, listed(4096, [], True)), r"\[\] is no name"),
    ("tokenizer.json", lambda d: d.update(added_tokens={}), "the tokenizers library cannot read it"),
    ("tokenizer_config.json", lambda d: d.update(eos_token="<nowhere>"), "special token '<nowhere>' has no id"),
    ("tokenizer_config.json", lambda d: d["added_tokens_decoder"].update({"x": {"content": "y"}}), "id of 'y' is 'x'"),
    (
        "tokenizer_config.json",
        lambda d: d["added_tokens_decoder"]["40"].update(special=True),
        "is special, but ordinary",
    ),
    (
        "tokenizer_config.json",
        lambda d: d["added_tokens_decoder"]["40"].update(content="x"),
        "token 40 is 'x', but '▁▁",
    ),
    ("tokenizer_config.json", lambda d: d.update(added_tokens_decoder=[]), "added_tokens_decoder is not an object"),
]


@pytest.mark.parametrize(("file", "change", "words"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(
    tmp_path: Path, file: str, change: Callable[[Any], object], words: str
) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO / name, tmp_path)
    Tokenizer(tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(BadInput, match=words) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.add_tokens(AddedToken(" leading", normalized=False)), "gives the ids"),
        (lambda t: t.add_tokens([" the"]), "' the' is the same text as token"),
        (lambda t: t.add_tokens(AddedToken("word", rstrip=True)), "'word' has rstrip"),
        (
            lambda t: t.add_special_tokens({"additional_special_tokens": ["ing"]}),
            "'ing' is a special token and a piece of",
        ),
    ],
)
def test_added_tokens_that_sentencepiece_does_not_have(
    tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        Tokenizer(saved(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not readable as JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 200_000, "not readable as JSON"),
        (b'{"<x>": "many"}', "the id of '<x>' is 'many'"),
        (b'{"<x>": true}', "the id of '<x>' is True"),
        (b'{"<x>": 4096, "<x>": 4097}', "holds the key '<x>' twice"),
        (b'{"<x>": 4096, "<y>": 4096}', "token 4096 is '<y>', but '<x>' in added_tokens.json"),
        (b'{"": 4096}', "'' is no name for a token"),
        (b'{"a\\u0000": 4096}', "is no name for a token"),
        (b'{"\\ud83e": 4096}', "lone surrogate"),
        (b'{"<eos>": 4096}', "'<eos>' is token 4096, but 1 in tokenizer.model"),
    ],
)
def test_unreadable_added_tokens(tmp_path: Path, content: bytes, words: str) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        Tokenizer(tmp_path)


def test_the_advice_fits_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file; copy it again"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BadInput, match="not allowed to read it; make it readable: chmod"):
        Tokenizer(tmp_path)
