"""Files of text and of conversations, as people and tools write them. What a file holds decides, not its suffix.

    plain text              any file that is not JSON
    JSON lines              one row a line
    a JSON array            of rows

A row is a JSON object in one of these forms; other keys beside them are passed over:

    {"messages": [{"role": …, "content": …}, …]}        a conversation
    {"conversations": [{"from": …, "value": …}, …]}     the same, as ShareGPT has it
    {"prompt": …, "completion": …}                      a conversation in two lists of messages, or a text in two parts
    {"text": …}                                         a text
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput
from gemma3.host.files import reason

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
OTHER_FORMS = 'a row may also have "conversations", "prompt" with "completion", or "text"'
FORMS = {"messages", "conversations", "text", "prompt"}
# The speakers of ShareGPT, and of the tools that write its files, as roles.
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPEAKERS["model"] = "assistant"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Row:
    """A row of a file, which should be a JSON object, and its place there: "line 3", "item 3"."""

    place: str
    value: Any


def read_utf8(path: Path) -> str:
    """The file's text, with unchanged line endings, without a byte order mark.

    Raises BadInput when it cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {reason(error)}") from None
    if content.startswith(UTF_16):
        raise BadInput(f"{path}: not UTF-8 text (byte 0 is {content[0]:#04x}) but UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from None


def read_data(path: Path) -> str | list[Row]:
    """The file's plain text, or its rows.

    Raises BadInput for a file that is missing, empty or not text, and for a line that is not JSON in a file of rows.
    """
    text = read_utf8(path)
    if not text.strip():
        raise BadInput(f"{path}: holds no text; give a file that does")
    if "\0" in text:
        raise BadInput(f"{path}: has a NUL character at {text.index(chr(0))}: binary data, give text")
    named_json = path.suffix.lower() in JSON_SUFFIXES
    if not named_json and text.lstrip()[0] not in "{[":
        return text
    rows, broken = _lines(text)
    array = _array(text) if broken or (len(rows) == 1 and isinstance(rows[0].value, list)) else None
    if array is not None:
        return array
    begins_with_a_row = bool(rows) and isinstance(rows[0].value, dict) and not FORMS.isdisjoint(rows[0].value)
    if broken and (named_json or begins_with_a_row):
        raise BadInput(f"{path}: {broken}")
    if not named_json and (broken or not all(isinstance(row.value, dict) for row in rows)):
        return text
    return rows


def _array(text: str) -> list[Row] | None:
    """The objects of a file that is one JSON array, or one object over several lines. None for any other file."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    items = data if isinstance(data, list) else [data]
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    return [Row(f"item {number}", item) for number, item in enumerate(items, 1)]


def _lines(text: str) -> tuple[list[Row], str | None]:
    """The rows of JSON lines up to the first line that is not JSON, and what is wrong with that line."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(Row(f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                return rows, f"line {number}: not JSON ({error})"
    return rows, None


def form_of(row: dict[str, Any]) -> str | None:
    """The key that says what a row is. None for a row that is nothing known. Raises BadInput when two keys say it."""
    forms = sorted(key for key in FORMS & row.keys() if key != "prompt" or "completion" in row)
    if len(forms) > 1:
        raise BadInput(f"has both {forms[0]!r} and {forms[1]!r}; keep the one to read")
    return forms[0] if forms else None


def content_of(row: Any) -> str | list[Any]:
    """The text of a row, or its messages, each of which should be ``{"role", "content"}``.

    Raises BadInput for a row in no known form.
    """
    if not isinstance(row, dict):
        raise BadInput(f'no list under "messages": the row is {ascii(row)[:60]}, not an object')
    if row.get("tools"):
        raise BadInput("has tools, which are not given to the chat template; write them into the messages")
    match form_of(row), row:
        case "text", {"text": str(text)}:
            return text
        case "messages", {"messages": list(messages)}:
            return _system(row) + messages
        case "conversations", {"conversations": list(turns)}:
            return _system(row) + [_message(turn) for turn in turns]
        case "prompt", {"prompt": str(prompt), "completion": str(completion)}:
            return prompt + completion
        case "prompt", {"prompt": list(prompt), "completion": list(completion)}:
            return prompt + completion
        case None, _:
            keys = ", ".join(sorted(row)) or "none"
            raise BadInput(f'no list under "messages" (the keys are {ascii(keys)[1:-1][:60]}); {OTHER_FORMS}')
        case key, _:
            wanted = {"text": "text", "prompt": "text, or lists of messages,"}.get(str(key), "list")
            raise BadInput(f'no {wanted} under "{key}"')


def _system(row: dict[str, Any]) -> list[Any]:
    """The system message that some tools write beside the turns. Raises BadInput for one that is not text."""
    match row.get("system"):
        case None | "":
            return []
        case str(text):
            return [{"role": "system", "content": text}]
        case other:
            raise BadInput(f'"system" is {ascii(other)[:60]}, not text')


def _message(turn: Any) -> Any:
    """A turn of ShareGPT as a message. Some tools write messages there; these stay as they are."""
    match turn:
        case {"from": str(speaker), "value": value}:
            if speaker not in SPEAKERS:
                raise BadInput(f"a turn is from {ascii(speaker)[:60]}, expected one of {', '.join(SPEAKERS)}")
            return {"role": SPEAKERS[speaker], "content": value}
    return turn
