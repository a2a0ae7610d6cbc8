import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import gemma3
from gemma3.chat import Message, encode_chat
from gemma3.chat_template import TemplateFormat
from gemma3.config import read_config
from gemma3.data import documents, pack
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from tests.bundles import SEEING_CONFIG, VOCABULARY, write_checkpoint
from tests.shapes import tiny_config

CONFIG = tiny_config(vocab_size=VOCABULARY)


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_in_rows_that_begin_with_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "some text <end_of_turn>\n\nand more"
    ids = tokenizer.encode(text, bos=False)
    rows = pack([written(tmp_path / "a.txt", text)], tokenizer, 7, CONFIG).tokens
    assert rows.dtype == np.int32
    assert rows.shape == (len(ids) // 6, 7)
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert rows[:, 1:].ravel().tolist() == ids[: 6 * len(rows)]


def test_documents_follow_one_another_each_with_its_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats: list[list[Message]] = [
        [{"role": "user", "content": "line\u2028separator"}, {"role": "assistant", "content": "<bos>"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    ]
    lines = "\n".join(json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats)
    files = [written(tmp_path / "a.txt", "one"), written(tmp_path / "b.jsonl", lines + "\n\n"), tmp_path / "a.txt"]
    stream = tokenizer.encode("one", bos=True)
    for chat in chats:
        stream += encode_chat(tokenizer, chat, add_generation_prompt=False)
    stream += tokenizer.encode("one", bos=True)
    (row,) = pack(files, tokenizer, len(stream), CONFIG).tokens
    assert row.tolist() == stream
    assert stream.count(tokenizer.bos_id) == 4


def test_a_document_that_begins_with_a_row_gets_no_second_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "abcd")
    length = len(tokenizer.encode("abcd", bos=True))
    rows = pack([path, path], tokenizer, length, CONFIG).tokens
    assert rows[0].tolist() == rows[1].tolist() == tokenizer.encode("abcd", bos=True)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text (byte 0 is 0xff)"),
        ("a.txt", b"text\0more", "NUL character at 4"),
        ("a.txt", "a", "less than one row of 8; give more text"),
        ("a.jsonl", "text", "line 1: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", "[1]", 'line 1: no list under "messages"'),
        ("a.jsonl", '{"messages": "a"}', 'line 1: no list under "messages"'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 1}]}', "line 1: a message is"),
        ("a.jsonl", '{"messages": [3]}', "line 1: a message is 3"),
        ("a.jsonl", '{"messages": []}', "line 1: the conversation has no user message"),
        ("a.jsonl", '\n{"messages": [{"role": "assistant", "content": ""}]}', "line 2: message 1"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 1: text has a lone surrogate"),
    ],
)
def test_data_that_cannot_be_used(
    tokenizer: Tokenizer, tmp_path: Path, name: str, data: str | bytes, words: str
) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(BadInput) as caught:
        pack([path], tokenizer, 8, CONFIG)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "vocabulary", "words"), [(1, VOCABULARY, "rows of 1"), (8, 300, "vocabulary of 300")]
)
def test_settings_that_do_not_fit(
    tokenizer: Tokenizer, tmp_path: Path, length: int, vocabulary: int, words: str
) -> None:
    path: Any = written(tmp_path / "a.txt", "words of ordinary text")
    with pytest.raises(BadInput, match=words):
        pack([path], tokenizer, length, replace(CONFIG, vocab_size=vocabulary))


def test_a_file_that_is_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        pack([tmp_path / "none.txt"], tokenizer, 8, CONFIG)


def test_the_demos_training_sample_is_usable_and_shares_no_paragraph_with_its_held_out_text() -> None:
    demo = Path(gemma3.__file__).parent / "demo"
    sample = (demo / "qat.txt").read_text(encoding="utf-8")
    paragraphs = (demo / "heldout.txt").read_text(encoding="utf-8").split("\n\n")
    assert not [paragraph for paragraph in paragraphs if len(paragraph) > 40 and paragraph in sample]
    asked = {json.loads(line)["prompt"] for line in (demo / "questions.jsonl").read_text().splitlines()}
    taught = (demo / "qat.jsonl").read_text(encoding="utf-8")
    contents = {message["content"] for line in taught.splitlines() for message in json.loads(line)["messages"]}
    assert not asked & contents
    rows = pack([demo / "qat.txt", demo / "qat.jsonl"], Tokenizer(demo), 256, tiny_config(vocab_size=4096)).tokens
    assert rows.size > 250_000


# Images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "seeing", SEEING_CONFIG)


def picture(path: Path, colour: str, size: tuple[int, int] = (20, 30)) -> Path:
    PIL.Image.new("RGB", size, colour).save(path)
    return path


def asking(*parts: str | Path) -> str:
    """A line of a .jsonl file in the folder of the images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.name}
        for part in parts
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return json.dumps({"messages": turns}) + "\n"


def test_a_conversation_with_images_lies_whole_in_a_row(seeing: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer(seeing), read_config(seeing / "config.json")
    assert config.vision is not None
    red, blue = picture(tmp_path / "red.png", "red"), picture(tmp_path / "blue.png", "blue")
    chats = written(tmp_path / "a.jsonl", asking(red, "what?") + asking("and", blue, "or", red))
    text = written(tmp_path / "a.txt", "a few words")
    first, second = documents(chats, tokenizer, config.vision)
    assert [len(first.images), len(second.images)] == [1, 2]
    assert first.images[0].shape == (28, 28, 3)
    assert (second.images[1] == first.images[0]).all()
    assert (first.images[0] == (255, 0, 0)).all()
    assert first.ids.count(config.vision.image_token_id) == config.vision.tokens_per_image

    length = len(first.ids) + len(second.ids) - 1
    plain, pad = tokenizer.encode("a few words", bos=True), tokenizer.pad_id
    rows = pack([text, chats, text], tokenizer, length, config)
    before = plain + first.ids
    assert rows.tokens.tolist() == [
        before + [pad] * (length - len(before)),
        (second.ids + plain + [pad] * length)[:length],
    ]
    assert [len(images) for images in rows.images] == [1, 2]
    assert (rows.images[1][0] == second.images[0]).all()


def test_the_last_row_is_kept_for_its_images(seeing: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer(seeing), read_config(seeing / "config.json")
    chat = written(tmp_path / "a.jsonl", asking(picture(tmp_path / "a.png", "red"), "what?"))
    rows = pack([chat], tokenizer, 90, config)
    (document,) = documents(chat, tokenizer, config.vision)
    assert rows.tokens.tolist() == [document.ids + [tokenizer.pad_id] * (90 - len(document.ids))]
    assert [len(row) for row in rows.images] == [1]


def test_pan_and_scan_adds_crops(seeing: Path, tmp_path: Path) -> None:
    tokenizer, vision = Tokenizer(seeing), read_config(seeing / "config.json").vision
    chat = written(tmp_path / "a.jsonl", asking(picture(tmp_path / "a.png", "red", (600, 256)), "what?"))
    (plain,) = documents(chat, tokenizer, vision)
    (scanned,) = documents(chat, tokenizer, vision, pan_and_scan=True)
    assert (len(plain.images), len(scanned.images)) == (1, 3)
    assert vision is not None
    assert scanned.ids.count(vision.image_token_id) == 3 * vision.tokens_per_image


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": "none.png"}, "none.png: no such file"),
        ({"type": "image", "image": "text.png"}, "text.png: begins with"),
        ({"type": "image"}, "a part of a message is"),
        ({"type": "video", "path": "a.png"}, "a part of a message is"),
        ("text", "a part of a message is"),
        ({"type": "image", "image": "a.png"}, "with images has"),
    ],
)
def test_images_that_cannot_be_used(seeing: Path, tmp_path: Path, part: Any, words: str) -> None:
    picture(tmp_path / "a.png", "red")
    written(tmp_path / "text.png", "text")
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": [{"role": "user", "content": [part]}]}))
    with pytest.raises(BadInput, match=words) as caught:
        pack([path], Tokenizer(seeing), 8, read_config(seeing / "config.json"))
    assert str(path) in str(caught.value)


def test_images_to_a_text_only_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", asking(picture(tmp_path / "a.png", "red"), "what?"))
    with pytest.raises(BadInput, match=r"line 1: 1 image for a text-only model"):
        pack([path], tokenizer, 90, CONFIG)


def test_conversations_have_the_form_of_the_chat_template(seeing: Path, tmp_path: Path) -> None:
    """It writes no BOS: a conversation's ids are the template's, and a row of them begins with BOS all the same."""
    tokenizer, config = Tokenizer(seeing), read_config(seeing / "config.json")
    content = "{% for p in m.content %}{{ p.text if p.type == 'text' else '<start_of_image>' }}{% endfor %}"
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + content + "{% endif %}"
    template = "{% for m in messages %}<start_of_turn>" + content + "<end_of_turn>{% endfor %}"
    form = TemplateFormat(template, {})
    lines = [
        asking(picture(tmp_path / "a.png", "red"), "what?"),
        json.dumps({"messages": [{"role": "x", "content": "a"}]}),
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    first, second = documents(path, tokenizer, config.vision, chat=form)
    start, end = tokenizer.special["<start_of_turn>"], tokenizer.end_of_turn_id
    assert first.ids[0] == start
    assert first.ids.count(end) == 2
    assert second.ids == [start, *tokenizer.encode("a", bos=False), end]
    rows = pack([path], tokenizer, len(first.ids) + 1, config, chat=form)
    assert rows.tokens[0].tolist() == [tokenizer.bos_id, *first.ids]
    with pytest.raises(BadInput, match="with images has"):
        pack([path], tokenizer, len(first.ids), config, chat=form)


def test_a_conversation_that_the_template_refuses(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    form = TemplateFormat("{{ raise_exception('no ' + messages[0].role) }}", {})
    with pytest.raises(BadInput, match=r"a\.jsonl: line 1: .*no user"):
        pack([path], tokenizer, 90, CONFIG, chat=form)
