"""What a file of data holds decides how it is read: as plain text, or as rows in one of the forms that tools write."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3.errors import BadInput
from gemma3.rows import content_of, read_data, read_utf8

MESSAGES = [{"role": "user", "content": "What? 😀"}, {"role": "assistant", "content": "That.\r\n{}"}]
ROWS = [{"messages": MESSAGES}, {"messages": MESSAGES[:1], "id": 3, "score": None}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def read(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    found = read_data(path)
    return found if isinstance(found, str) else [content_of(row.value) for row in found]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + b"\n",
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"}\n{", b"}\r\n{") + b"\r\n",
        b"\n \n" + LINES.replace(b"}\n{", b"}\n\n\n{") + b"\n\n",
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b"\xef\xbb\xbf " + json.dumps(ROWS).encode() + b"\r\n",
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "a.ndjson", "a.txt", "a"])
def test_rows_are_rows_in_every_file_and_under_every_name(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path / name, content) == [MESSAGES, MESSAGES[:1]]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": MESSAGES}, MESSAGES),
        (
            {"conversations": [{"from": "human", "value": "What? 😀"}, {"from": "gpt", "value": "That.\r\n{}"}]},
            MESSAGES,
        ),
        ({"conversations": MESSAGES, "source": "x"}, MESSAGES),
        ({"conversations": [{"from": "system", "value": "a"}]}, [{"role": "system", "content": "a"}]),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": "kept beside", "prompt_id": 1, "messages": MESSAGES}, MESSAGES),
        ({"text": "some text", "meta": {"a": 1}}, "some text"),
    ],
)
def test_the_forms_of_a_row(tmp_path: Path, row: dict[str, Any], content: Any) -> None:
    assert read(tmp_path / "lines.jsonl", json.dumps(row).encode()) == [content]
    assert read(tmp_path / "indented.json", json.dumps(row, indent=1).encode()) == [content]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a", "input": "", "output": "b"},
            r'no list under "messages" \(the keys are input, instruction',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'a row may also have "conversations"'),
        ({}, "the keys are none"),
        ({"messages": MESSAGES, "text": "rendered"}, "has both 'messages' and 'text'"),
        ({"messages": "a"}, 'no list under "messages"'),
        ({"conversations": {}}, 'no list under "conversations"'),
        ({"text": 3}, 'no text under "text"'),
        ({"prompt": "a", "completion": MESSAGES}, 'no text, or lists of messages, under "prompt"'),
        (
            {"conversations": [{"from": "function_call", "value": "a"}]},
            "a turn is from 'function_call', expected one of",
        ),
        ({"\n" * 10_000: 1}, "the keys are"),
        ([1], "the row is"),
        ("text", "the row is 'text', not an object"),
    ],
)
def test_rows_in_no_known_form(row: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        content_of(row)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "text",
    [
        "{curly} beginnings are text",
        "[1] A footnote.\nAnd its text.",
        "[1, 2]\n[3]",
        "{}\nand more",
        "[",
        "[]",
        '{"a": 1} is how an object is written.\n',
        "{% raw %}",
        '"quoted"\n"lines"',
        "1\n2\n3",
        "Some text.\r\nWith its line endings.\r\n",
        "\n\n[INST] x [/INST]",
    ],
)
def test_text_that_only_begins_like_json_is_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.txt", text.encode()) == text
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode()) == text


@given(st.text().filter(lambda text: text.strip() and "\0" not in text and text.lstrip()[0] not in "{[\ufeff"))
def test_any_other_text_is_itself(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    assert read(path, text.encode()) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b"\n{", "line 3: not JSON"),
        ("a.txt", LINES + b"\n{", "line 3: not JSON"),
        ("a.txt", LINES + b"\nand text", "line 3: not JSON"),
        ("a.json", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b"some text", "line 1: not JSON"),
        ("a.jsonl", b" \n", "holds no text"),
        ("a.txt", "text".encode("utf-16"), "but UTF-16; save it as UTF-8"),
        ("a.jsonl", "{}".encode("utf-16-be"), "binary data"),
        ("a.txt", b"\x1f\x8b\x08", "not UTF-8 text"),
        ("a.parquet", b"PAR1\0", "binary data"),
    ],
)
def test_files_that_hold_neither(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(refused.value)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_utf8(tmp_path / "none")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        read_utf8(tmp_path)


@pytest.mark.parametrize("turns", ["messages", "conversations"])
def test_a_system_text_beside_the_turns_is_the_first_message(turns: str) -> None:
    message = {"role": "user", "content": "Hello"}
    assert content_of({turns: [message], "system": "Be brief."}) == [
        {"role": "system", "content": "Be brief."},
        message,
    ]
    assert content_of({turns: [message], "system": ""}) == content_of({turns: [message], "system": None}) == [message]
    with pytest.raises(BadInput, match='"system" is 3, not text'):
        content_of({turns: [message], "system": 3})


def test_tools_are_not_dropped_in_silence() -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}], "tools": []}
    assert content_of(row) == row["messages"]
    with pytest.raises(BadInput, match="has tools, which are not given to the chat template"):
        content_of({**row, "tools": [{"type": "function"}]})
