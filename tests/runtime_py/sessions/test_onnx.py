"""The .onnx session: its protocol, its independence from torch, and what it does with damaged or hostile files."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.onnx.file import LAST_LOGITS, LOGITS_TO_KEEP
from gemma3.errors import BadInput, DoesNotFit
from runtime_py.sessions.onnx import OnnxSession, open_encoder
from tests.onnx_models import TinyOnnx, tiny_onnx
from tests.rewinding import (
    assert_a_rewound_session_equals_one_that_never_went_on,
    assert_rows_are_those_of_single_steps,
)
from tests.shapes import random_tokens, tiny_config, tiny_vision_config, with_images


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyOnnx:
    return tiny_onnx(tiny_config(), tmp_path_factory.mktemp("tiny"), "int4-block32", "int8")


@pytest.fixture
def copy(tiny: TinyOnnx, tmp_path: Path) -> TinyOnnx:
    """A copy that a test may damage."""
    for file in tiny.path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return replace(tiny, path=tmp_path / tiny.path.name)


def test_does_not_load_torch() -> None:
    code = "import sys, runtime_py.sessions.onnx; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


@pytest.mark.parametrize("before", ["import runtime_py.api, onnxruntime", "import runtime_py.sessions.onnx"])
def test_nothing_is_written_below_the_home_directory(tiny: TinyOnnx, tmp_path: Path, before: str) -> None:
    """No device id and no queue of events for the maker of ONNX Runtime, whatever the environment says."""
    code = (
        f"{before}; from onnxruntime import *; InferenceSession({str(tiny.path)!r}, providers=['CPUExecutionProvider'])"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "GITHUB_ACTIONS")}
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "ORT_DISABLE_TELEMETRY": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=kept | home, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_position_and_logits_follow_what_is_fed(tiny: TinyOnnx) -> None:
    session = tiny.session()
    assert (session.context, session.chunk, session.vocab_size) == (128, 8, tiny.config.vocab_size)
    first = session.prefill(random_tokens(tiny.config, 20))
    assert first.dtype == np.float32
    assert first.shape == (tiny.config.vocab_size,)
    assert session.position == 20
    kept = first.copy()
    second = session.step(5)
    assert session.position == 21
    assert session.logits is second
    assert np.array_equal(first, kept), "earlier logits must not change when more is fed"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 128))
@settings(max_examples=25, deadline=None)
def test_the_lengths_of_prompts_do_not_matter(tiny: TinyOnnx, pieces: list[int], chunk: int) -> None:
    ids = random_tokens(tiny.config, min(sum(pieces), 128))
    whole = tiny.session().prefill(ids)
    session = OnnxSession(tiny.path, replace(tiny.layout, chunk=chunk), tiny.config, threads=1)
    while session.position < len(ids):
        session.prefill(ids[session.position :][: pieces.pop()])
    assert np.abs(session.logits - whole).max() <= 1e-5


@pytest.mark.parametrize("before", [3, 100])
def test_reset_equals_a_new_session_bit_for_bit(tiny: TinyOnnx, before: int) -> None:
    ids = random_tokens(tiny.config, 90, seed=2)
    used, fresh = tiny.session(), tiny.session()
    used.prefill(random_tokens(tiny.config, before))
    used.reset()
    assert used.position == 0
    assert np.array_equal(used.prefill(ids[:30]), fresh.prefill(ids[:30]))
    for token in ids[30:]:
        assert np.array_equal(used.step(token), fresh.step(token))


def test_a_call_gives_the_logits_of_its_last_positions(tmp_path: Path) -> None:
    exact = tiny_onnx(tiny_config(), tmp_path)  # no rounding, so the lengths of calls do not matter
    assert_rows_are_those_of_single_steps(exact.session, random_tokens(exact.config, 100), 1e-5)


def test_a_rewound_session_equals_one_that_never_went_on(tiny: TinyOnnx) -> None:
    assert_a_rewound_session_equals_one_that_never_went_on(tiny.session, random_tokens(tiny.config, 120), 8)


def test_a_file_of_an_older_version_gives_one_row_of_logits(copy: TinyOnnx) -> None:
    """Its graph has neither the input nor the output."""
    model = onnx.load(copy.path, load_external_data=False)
    graph = model.graph
    for values in (graph.input, graph.output, graph.initializer):
        for value in [one for one in values if one.name in (LOGITS_TO_KEEP, LAST_LOGITS)]:
            values.remove(value)
    negated = next(node for node in graph.node if LOGITS_TO_KEEP in node.input)
    negated.input[0] = "one"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "one"))
    copy.path.write_bytes(model.SerializeToString())
    session = copy.session()
    assert session.most_logits == 1
    ids = random_tokens(copy.config, 30)
    assert session.prefill(ids).shape == session.verify([3])[0].shape == (copy.config.vocab_size,)


def test_refuses_ids_before_any_is_fed(tiny: TinyOnnx) -> None:
    session = tiny.session()
    session.prefill([1, 2, 3])
    kept = session.logits
    with pytest.raises(BadInput, match="the prompt is empty"):
        session.prefill([])
    with pytest.raises(BadInput, match="token id 160 at index 9 is outside the vocabulary of 160"):
        session.prefill([0] * 9 + [160])
    with pytest.raises(DoesNotFit, match="126 tokens after position 3 are over the context of 128"):
        session.prefill([0] * 126)
    assert session.position == 3
    assert session.logits is kept
    session.prefill([0] * 125)
    with pytest.raises(DoesNotFit, match="over the context"):
        session.step(0)


def test_the_vision_model_is_opened_only_for_a_prompt_with_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_counted(path: Path, threads: int | None) -> Any:
        opened.append(weakref.ref(encoder := open_encoder(path, threads)))
        return encoder

    monkeypatch.setattr("runtime_py.sessions.onnx.open_encoder", open_counted)
    session = tiny_onnx(tiny_vision_config(), tmp_path).session()
    images = [np.full((28, 28, 3), shade, np.uint8) for shade in (0, 200)]
    ids = with_images(tiny_vision_config(), [3, None, 2, None, 1])
    session.prefill(ids[:4])
    assert opened == []
    session.prefill(ids[4:], images)
    assert len(opened) == 1
    assert opened[0]() is None, "the vision model's memory must be free again"
    expected = session.logits
    soft_tokens = [session.encode_image(image) for image in images]
    session.reset()
    assert np.array_equal(session.prefill(ids, soft_tokens), expected)
    assert len(opened) == 3


def test_refuses_a_file_of_another_layout_or_vocabulary(tiny: TinyOnnx) -> None:
    longer = replace(tiny.layout, layers=tuple(replace(layer, slots=256) for layer in tiny.layout.layers))
    with pytest.raises(BadInput, match=r"past_key_values\.0\.key is \[1, 1, 24, 32\], expected \[1, 1, 256, 32\]"):
        OnnxSession(tiny.path, longer, tiny.config)
    with pytest.raises(BadInput, match=r"logits is \[1, 1, 160\], expected \[1, 1, 161\]"):
        OnnxSession(tiny.path, tiny.layout, replace(tiny.config, vocab_size=161))


def last_external(model: onnx.ModelProto) -> onnx.TensorProto:
    return [tensor for tensor in model.graph.initializer if tensor.external_data][-1]


def relocate(location: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        (entry,) = [entry for entry in last_external(model).external_data if entry.key == "location"]
        entry.value = location
        path.write_bytes(model.SerializeToString())

    return damage


def link_the_data(path: Path) -> None:
    data = path.with_name("model.onnx.data")
    data.rename(path.with_name("elsewhere"))
    data.symlink_to("elsewhere")


def cut_the_data(path: Path) -> None:
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])


def remove_the_data(path: Path) -> None:
    path.with_name("model.onnx.data").unlink()


def move_a_weight(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    (entry,) = [entry for entry in last_external(model).external_data if entry.key == "offset"]
    entry.value = str(10**9)
    path.write_bytes(model.SerializeToString())


def hide_data_in_a_constant(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))
    path.write_bytes(model.SerializeToString())


def use_an_unknown_operator(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (relocate("../outside"), r"lies in '\.\./outside', which is not a file beside it"),
        (relocate("/etc/hostname"), r"lies in '/etc/hostname', which is not a file beside it"),
        (relocate(".."), r"lies in '\.\.', which is not a file beside it"),
        (relocate(""), "lies in '', which is not a file beside it"),
        (relocate("absent"), "absent is missing beside it"),
        (link_the_data, r"model\.onnx\.data is a link or not a plain file"),
        (cut_the_data, "the file is cut short"),
        (move_a_weight, "is at offset 1000000000; the file is cut short"),
        (remove_the_data, r"model\.onnx\.data is missing beside it"),
        (hide_data_in_a_constant, "holds subgraphs, functions or constants"),
        (use_an_unknown_operator, "ONNX Runtime does not load it"),
        (lambda path: path.write_bytes(b"not a protobuf"), "not readable as ONNX"),
        (lambda path: path.write_bytes(b""), "an empty graph"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_damaged_files_are_bad_input(copy: TinyOnnx, damage: Callable[[Path], None], message: str) -> None:
    damage(copy.path)
    with pytest.raises(BadInput, match=message):
        copy.session()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99, 0.9999])
def test_truncated_graphs_are_bad_input(copy: TinyOnnx, part: float) -> None:
    content = copy.path.read_bytes()
    copy.path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(BadInput):
        copy.session()
