"""Small files of users and of other tools: whatever they are, one line and no waiting."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.manifest import MANIFEST, read_manifest
from gemma3.checkpoint import open_checkpoint
from gemma3.config import read_config
from gemma3.errors import BadInput, UserError
from gemma3.host import files
from gemma3.host.files import parse_json, read_json, read_text
from quant.recipe import read_recipe
from runtime_py.proof.plan_file import load_plan
from tests.shapes import RELEASED


def test_a_link_to_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": [1, "ä"]}', encoding="utf-8")
    (tmp_path / "link").symlink_to("blob")
    assert read_json(tmp_path / "link", "give another") == {"a": [1, "ä"]}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file; give another"),
        (lambda path: path.symlink_to("nowhere"), "no such file; give another"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (Path.mkdir, "is a directory, not a plain file; give another"),
        (pipe, "is a pipe, a socket or a device, not a plain file"),
        (bound_socket, "is a pipe, a socket or a device, not a plain file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device, not a plain file"),
        (lambda path: path.write_bytes(b"\xff\xfea"), "not UTF-8 text (byte 0 is 0xff); save it as UTF-8"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
        (lambda path: path.write_bytes(b"{"), "not readable as JSON (Expecting property name"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("file")
    make(path)
    with pytest.raises(BadInput) as refused:
        read_json(path, "give another")
    assert str(refused.value).startswith("file: ")
    assert message in str(refused.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, which tests may run as."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        BadInput, match=f"not allowed to read it; .* chmod u\\+r, or run as its owner .user id {os.getuid()}"
    ):
        read_text(tmp_path / "file", "give another")


def test_a_file_that_is_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    with (tmp_path / "file").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(BadInput, match="is 1 MiB, too much"):
        read_text(tmp_path / "file", "give another")


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        '{"a": [Infinity]}',
        "-Infinity",
        '{"a": 1, "b": {"c": 1, "c": 1}}',
        "1" + "0" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
        "\ufeff{}",
        "{} {}",
    ],
)
def test_what_json_does_not_have_or_leaves_open(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_json(text)
    assert len(str(refused.value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(JSON)
def test_any_other_json_is_what_the_standard_library_reads(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("make", [pipe, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda folder: read_config(folder / "config.json")),
        ("model.safetensors", open_checkpoint),
        ("model.safetensors.index.json", open_checkpoint),
        (MANIFEST, read_manifest),
        ("plan.json", lambda folder: load_plan(folder / "plan.json")),
        ("recipe.toml", lambda folder: read_recipe(folder / "recipe.toml")),
    ],
)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(tmp_path: Path, name: str, read: Any, make: Any) -> None:
    if name.startswith("model"):
        (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    make(tmp_path / name)
    with pytest.raises(UserError, match="a pipe, a socket or a device"):
        read(tmp_path)
