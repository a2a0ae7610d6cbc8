"""Snapshots: a restored session gives the bits that the one which made it gives, and other files are refused."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig, parse_config
from gemma3.errors import BadInput, DoesNotFit
from gemma3.images import Pixels
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.onnx import OnnxSession
from runtime_py.sessions.protocol import Resumable, Session
from runtime_py.snapshot import METADATA, Origin, open_snapshot, write_snapshot
from tests.bundles import SEEING_CONFIG
from tests.export.onnx.test_kv import int8_file
from tests.function_session import FunctionSession
from tests.onnx_models import tiny_onnx
from tests.pte_models import tiny_pte
from tests.shapes import random_model, random_tokens, tiny_config, with_images

# Three layers, one of them global; several key/value heads, so that the rows of a global layer are no single block.
HEADS: dict[str, Any] = {"num_hidden_layers": 3, "sliding_window_pattern": 3, "num_key_value_heads": 2}
SEEING = parse_config(SEEING_CONFIG)


class Made:
    """A tiny model in one format: its configuration, the layout of its caches, and sessions over it."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, session: Callable[[], Any]) -> None:
        self.config, self.layout, self.session = config, layout, session
        self.origin = Origin("tiny", {"model": "0" * 64}, layout, {"runtime": "1.0"})


def made(format: str, config: ModelConfig, folder: Path) -> Made:
    if format == "onnx":
        onnx = tiny_onnx(config, folder, "int4-block32", "int8")
        return Made(config, onnx.layout, onnx.session)
    if format == "onnx with int8 caches":
        path, int8, _ = int8_file(config, folder)
        return Made(config, int8, lambda: OnnxSession(path, int8, config, threads=1))
    if format == "pte":
        pte = tiny_pte(config, folder, "int4-block32", "int8")
        return Made(config, pte.layout, lambda: pte.session(1))
    model, layout = random_model(config), cache_layout(config, "ring", 128, 8)
    return Made(config, layout, lambda: EagerSession(model, layout))


FORMATS = ["eager", "onnx", pytest.param("pte", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=[*FORMATS, "onnx with int8 caches"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, tiny_config(**HEADS), tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=FORMATS)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, SEEING, tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("eager", tiny_config(**HEADS), tmp_path_factory.mktemp("eager"))


def go_on(session: Session, ids: list[int]) -> list[np.ndarray]:
    """Logits after a chunk and a half, and after each further id."""
    return [session.prefill(ids[:12]).copy(), *(session.step(token).copy() for token in ids[12:])]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


# The window is 8 and a chunk 8, so the caches of sliding layers are full, and begin again, many times before 100.
@pytest.mark.parametrize("position", [1, 7, 16, 23, 24, 25, 60, 100])
def test_a_restored_session_gives_the_same_bits(text: Made, tmp_path: Path, position: int) -> None:
    ids = random_tokens(text.config, 128)
    maker, again = text.session(), text.session()
    for session in (maker, again):
        session.prefill(ids[:position])
    write_snapshot(tmp_path / "file", maker, text.origin, ids[:position])
    snapshot = open_snapshot(tmp_path / "file", text.origin, text.config)
    assert snapshot.ids == tuple(ids[:position])
    fresh, used = text.session(), text.session()
    used.prefill(random_tokens(text.config, 117, seed=3))
    for session in (fresh, used):
        snapshot.restore(session)
        assert session.position == position
        assert np.array_equal(session.logits, maker.logits)
    wanted = go_on(again, ids[position:])
    for session in (fresh, used, maker):
        assert_same(go_on(session, ids[position:]), wanted)
    snapshot.restore(used)
    assert_same(go_on(used, ids[position:]), wanted)


def random_images(count: int) -> list[Pixels]:
    return list(np.random.default_rng(1).integers(256, size=(count, 28, 28, 3)).astype(np.uint8))


@pytest.mark.parametrize("text_before", [3, 40])
def test_a_restored_session_has_seen_the_images(seeing: Made, tmp_path: Path, text_before: int) -> None:
    ids, images = with_images(seeing.config, [text_before, None, 5]), random_images(2)
    rest = with_images(seeing.config, [9, None, 20])
    maker = seeing.session()
    maker.prefill(ids, images[:1])
    write_snapshot(tmp_path / "file", maker, seeing.origin, ids, images[:1], crops=[0])
    snapshot = open_snapshot(tmp_path / "file", seeing.origin, seeing.config)
    assert np.array_equal(snapshot.images, images[:1])
    session, again = seeing.session(), seeing.session()
    snapshot.restore(session)
    again.prefill(ids, images[:1])
    wanted = again.prefill(rest, images[1:])
    assert np.array_equal(session.prefill(rest, images[1:]), wanted)
    assert np.array_equal(maker.prefill(rest, images[1:]), wanted)


def test_a_session_of_float64_keeps_its_dtype(tmp_path: Path) -> None:
    config = tiny_config(**HEADS)
    model, layout = random_model(config).double(), cache_layout(config, "ring", 64, 8)
    origin = Origin("tiny", {}, layout, {})
    maker, session = EagerSession(model, layout), EagerSession(model, layout)
    ids = random_tokens(config, 40)
    maker.prefill(ids[:30])
    write_snapshot(tmp_path / "file", maker, origin, ids[:30])
    open_snapshot(tmp_path / "file", origin, config).restore(session)
    assert np.array_equal(session.prefill(ids[30:]), maker.prefill(ids[30:]))


def test_a_file_holds_no_more_of_the_global_layers_than_was_fed(eager: Made, tmp_path: Path) -> None:
    sizes = []
    for position in (20, 40):
        session = eager.session()
        session.prefill(random_tokens(eager.config, position))
        write_snapshot(tmp_path / str(position), session, eager.origin, random_tokens(eager.config, position))
        tensors = load_file(tmp_path / str(position))
        assert tensors["cache.layers.2.keys"].shape == (1, 2, position, 32)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert sizes[1] - sizes[0] == 20 * (2 * 2 * 32 * 4 + 8)  # keys and values of two heads, and an id, each position


class WithoutCaches(FunctionSession):
    live = None  # type: ignore[assignment]


def test_sessions_without_caches_to_give_are_refused(eager: Made, tmp_path: Path) -> None:
    session = WithoutCaches(lambda _: [0.0] * 8, 8)
    session.prefill([1, 2])
    assert not isinstance(session, Resumable)
    with pytest.raises(BadInput, match="cannot give their caches"):
        write_snapshot(tmp_path / "file", session, eager.origin, [1, 2])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_disk_is_full(eager: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr("runtime_py.snapshot.save_file", full)
    session = eager.session()
    session.prefill([1, 2])
    with pytest.raises(DoesNotFit, match=r"0\.\d MB could not be written .*no space left"):
        write_snapshot(tmp_path / "file", session, eager.origin, [1, 2])
    assert list(tmp_path.iterdir()) == []


# Files that are refused


@pytest.fixture(scope="module")
def whole(eager: Made, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of a right file."""
    path = tmp_path_factory.mktemp("whole") / "file"
    session = eager.session()
    session.prefill(IDS)
    write_snapshot(path, session, eager.origin, IDS, system="Be kind.")
    return path.read_bytes()


IDS = random_tokens(tiny_config(**HEADS), 30)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The table of a safetensors file, and the bytes of its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(table: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with its header changed in place, or replaced by what ``change`` returns."""
    table, data = parts(content)
    header = json.loads(table["__metadata__"][METADATA])
    changed = change(header)
    table["__metadata__"][METADATA] = json.dumps(header if changed is None else changed)
    return joined(table, data)


def with_tensors(content: bytes, folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> bytes:
    (folder / "before").write_bytes(content)
    with safe_open(folder / "before", framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "before")
    change(tensors)
    save_file(tensors, folder / "after", metadata)
    return (folder / "after").read_bytes()


def load(eager: Made, content: bytes, path: Path) -> EagerSession:
    """A session restored from a file with this content. When that is refused, its caches must be untouched."""
    path.write_bytes(content)
    session: EagerSession = eager.session()
    refused = None
    try:
        open_snapshot(path, eager.origin, eager.config).restore(session)
    except BadInput as error:
        refused = error
    if refused is not None:
        assert str(refused).isprintable()
        assert session.position == 0
        assert not any(live.any() for live in session.live(128).values())
        raise refused
    return session


def put(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: Any) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("snapshot", value=2), "is a snapshot of version 2, this program reads 1; make it again"),
        (put("snapshot", value="1"), "version '1'"),
        (put("snapshot", value=True), "header.snapshot is 'True'"),
        (lambda _: [], "version None"),
        (lambda _: "x", "version None"),
        (put("origin", "format", value="other"), r"made with a \.other, this session is of the \.tiny"),
        (put("origin", "format", value="\x1b[2J"), r"made with a \.\?\[2J"),
        (
            put("origin", "files", "model", value="f" * 64),
            "sha256 of model is ffffffffffff…, that of this",
        ),
        (put("origin", "files", value={}), "sha256 of model is None"),
        (put("origin", "versions", "runtime", value="0.9"), "version of runtime is 0.9, that of this machine is 1.0"),
        (put("origin", "cache", "context", value=256), "caches have context 256, those of this bundle 128"),
        (put("origin", "cache", "layers", 0, "slots", value=2**70), "caches have layers"),
        (put("origin", "cache", "layers", value=[]), "caches have layers"),
        (put("origin", "cache", value=None), "header.origin.cache"),
        (put("surprise", value=1), "unknown key header.surprise"),
        (put("crops", value=[0]), "0 image tokens for 1 images"),
        (put("crops", value=[-1]), "0 image tokens for 0 images"),
        (put("crops", value=[10**30]), "0 image tokens for 100000000000…"),
        (put("system", value="Be rude."), "the file is damaged"),
        (put("system", value=None), "the file is damaged"),
        (put("sha256", value="0" * 64), "header says 000000000000…; the file is damaged"),
    ],
)
def test_headers_that_are_refused(
    eager: Made, whole: bytes, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        load(eager, with_header(whole, change), tmp_path / "file")


def drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def to(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("ids"), "holds no ids"),
        (drop("logits"), "holds no logits"),
        (drop("cache.layers.1.values"), r"holds no cache\.layers\.1\.values"),
        (to("ids", lambda ids: ids.astype(np.int32)), r"ids is I32 \[30\], expected int64"),
        (to("ids", lambda ids: ids[None]), r"ids is int64 \[1, 30\], expected int64"),
        (to("ids", lambda ids: ids[:0]), r"ids is int64 \[0\], expected int64"),
        (to("ids", lambda ids: np.tile(ids, 5)), r"ids is int64 \[150\], expected int64 \[N\] with N from 1 to 128"),
        (to("ids", lambda ids: ids - 1000), "ids outside the vocabulary of 160"),
        (to("ids", lambda ids: ids + 2**60), "ids outside the vocabulary of 160"),
        (
            to("ids", lambda ids: ids[:29]),
            r"cache\.layers\.2\.keys is float32 \[1, 2, 30, 32\], expected float32 \[1, 2, 29",
        ),
        (to("logits", lambda logits: logits[1:]), r"logits is float32 \[159\], expected float32 \[160\]"),
        (
            to("cache.layers.0.keys", lambda keys: keys.astype(np.float16)),
            r"is float16 \[1, 2, 16, 32\], expected float32",
        ),
        (to("cache.layers.0.keys", lambda keys: keys.swapaxes(1, 2)), r"is float32 \[1, 16, 2, 32\], expected"),
        (to("cache.layers.0.keys", lambda keys: keys + 1), "the file is damaged"),
        (lambda tensors: tensors.update(more=np.zeros(3)), "holds more, which no session"),
        (lambda tensors: tensors.update({"image.0": np.zeros((28, 28, 3), np.uint8)}), r"holds image\.0, which no"),
    ],
)
def test_tensors_that_are_refused(
    eager: Made, whole: bytes, tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        load(eager, with_tensors(whole, tmp_path, change), tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut short, damaged or no snapshot"),
        (b"not one", "cut short, damaged or no snapshot"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short, damaged or no snapshot"),
        (joined({}, b""), "no metadata gemma-edge"),
        (joined({"ids": {"dtype": "I64", "shape": [2**60], "data_offsets": [0, 8]}}, b"12345678"), "cut short"),
        (joined({"ids": {"dtype": "I64", "shape": [2**61], "data_offsets": [0, 2**64 - 1]}}, b""), "cut short"),
        (joined({"__metadata__": {METADATA: "{"}}, b""), "not readable as JSON"),
        (joined({"__metadata__": {METADATA: "[" * 100_000}}, b""), "nested too deeply"),
        (joined({"__metadata__": {METADATA: '{"snapshot": 1, "snapshot": 1}'}}, b""), "twice"),
        (joined({"__metadata__": {METADATA: '{"snapshot": 1}'}}, b""), "missing key header"),
    ],
)
def test_files_that_are_no_snapshots(eager: Made, tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        load(eager, content, tmp_path / "file")


def test_paths_that_are_no_files(eager: Made, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file; give a file that gemma-edge prefill wrote"):
        open_snapshot(tmp_path / "file", eager.origin, eager.config)
    with pytest.raises(BadInput, match="is a directory"):
        open_snapshot(tmp_path, eager.origin, eager.config)


def test_a_file_that_changes_after_it_was_opened_is_refused(eager: Made, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(whole)
    snapshot = open_snapshot(tmp_path / "file", eager.origin, eager.config)
    (tmp_path / "file").write_bytes(with_tensors(whole, tmp_path, to("cache.layers.0.keys", np.negative)))
    session = eager.session()
    with pytest.raises(BadInput, match="the file is damaged"):
        snapshot.restore(session)
    assert session.position == 0


# Any file at all: it is refused in one line, or it is as good as the right one.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file"


def check_any(eager: Made, content: bytes, path: Path) -> None:
    try:
        session = load(eager, content, path)
    except BadInput:
        return
    right = eager.session()
    right.prefill(IDS)
    assert np.array_equal(session.logits, right.logits)
    assert np.array_equal(session.step(3), right.step(3))


def edits(length: int) -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Changes of a file of so many bytes, most of them in its table."""
    places = st.one_of(st.integers(0, 4000), st.integers(0, length - 1))

    def cut(at: int) -> Callable[[bytes], bytes]:
        return lambda content: content[:at]

    def insert(at: int, new: bytes) -> Callable[[bytes], bytes]:
        return lambda content: content[:at] + new + content[at:]

    def overwrite(at: int, new: bytes) -> Callable[[bytes], bytes]:
        return lambda content: content[:at] + new + content[at + len(new) :]

    new = st.binary(min_size=1, max_size=9)
    digits = st.integers(0, 2**70).map(lambda number: str(number).encode())
    return st.one_of(
        st.builds(cut, places), st.builds(insert, places, new), st.builds(overwrite, places, st.one_of(new, digits))
    )


@given(data=st.data())
@settings(max_examples=400)
def test_any_change_of_the_bytes(eager: Made, whole: bytes, scratch: Path, data: st.DataObject) -> None:
    content = whole
    for edit in data.draw(st.lists(edits(len(whole)), min_size=1, max_size=3)):
        content = edit(content)
    check_any(eager, content, scratch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=300)
def test_any_value_anywhere_in_the_header(
    eager: Made, whole: bytes, scratch: Path, data: st.DataObject, value: Any
) -> None:
    def change(header: Any) -> None:
        while True:
            keys = list(range(len(header))) if isinstance(header, list) else sorted(header)
            key = data.draw(st.sampled_from(keys))
            inner = header[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                header[key] = value
                return
            header = inner

    check_any(eager, with_header(whole, change), scratch)


@given(data=st.data(), value=JSON)
@settings(max_examples=300)
def test_any_value_anywhere_in_the_table(
    eager: Made, whole: bytes, scratch: Path, data: st.DataObject, value: Any
) -> None:
    table, content = parts(whole)
    name = data.draw(st.sampled_from(sorted(table)))
    if name != "__metadata__" and data.draw(st.booleans()):
        table[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value
    else:
        table[name] = value
    check_any(eager, joined(table, content), scratch)


def test_the_origin_is_what_is_compared(eager: Made, whole: bytes, tmp_path: Path) -> None:
    """The same file, for a bundle with another graph beside the same one."""
    (tmp_path / "file").write_bytes(whole)
    wider = replace(eager.origin, files={**eager.origin.files, "vision": "1" * 64})
    with pytest.raises(BadInput, match="sha256 of vision is None, that of this bundle is 111111111111…"):
        open_snapshot(tmp_path / "file", wider, eager.config)
