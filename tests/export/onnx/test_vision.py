"""The two .onnx files of a multimodal model compared with the eager network, wherever images are in the text."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.onnx.file import graphs_of, load_graph
from export.onnx.read_back import read_back_onnx
from gemma3.cache import COMPACTING_SLACK
from gemma3.errors import BadInput
from tests.onnx_models import TinyOnnx, tiny_onnx
from tests.rewinding import assert_guesses_after_an_image_are_checked_as_by_single_steps
from tests.seeing import TOLERANCE, assert_steps_equal, random_images
from tests.shapes import VISION_SHAPES, random_model, tiny_config, tiny_vision_config, with_images

# A sliding layer's buffer holds up to 8 + COMPACTING_SLACK rows. Texts end before, at and after its first move.
BUFFER = 8 + COMPACTING_SLACK
PIECES: list[list[int | None]] = [
    [None, 3],
    [None, None, None, 40],
    [5, None, 20, None, 3],
    [3, None, 2, None, 7, None, None, 12],
    *([text, None, BUFFER + 3] for text in range(BUFFER - 12, BUFFER + 2, 3)),
    [70, None, 1, None, 8],
]


def assert_equals_eager(tiny: TinyOnnx, pieces: list[int | None], chunk: int) -> None:
    ids, images = with_images(tiny.config, pieces), random_images(tiny.config, pieces.count(None))
    assert_steps_equal(tiny.session(), ids, images, tiny.eager_logits(ids, images), chunk)


@pytest.fixture(scope="module", params=VISION_SHAPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyOnnx:
    return tiny_onnx(tiny_vision_config(request.param), tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("chunk", [1, 8])
def test_fp32_equals_eager(tiny: TinyOnnx, pieces: list[int | None], chunk: int) -> None:
    assert_equals_eager(tiny, pieces, chunk)


def test_images_attend_both_ways(tiny: TinyOnnx) -> None:
    """An image's soft tokens give other logits if fed one by one, so the tests above would notice causal attention."""
    ids, images = with_images(tiny.config, [3, None]), random_images(tiny.config, 1)
    whole = tiny.session().prefill(ids, images)
    session = tiny.session()
    soft_tokens = session.encode_image(images[0])
    session.prefill(ids[:4])
    for row in soft_tokens:
        session._feed(np.empty((1, 0), np.int64), row[None, None])
    assert np.abs(session.prefill(ids[-1:]) - whole).max() > 100 * TOLERANCE


def test_guesses_after_an_image_are_checked_as_by_single_steps(tiny: TinyOnnx) -> None:
    ids, images = with_images(tiny.config, [3, None, 20]), random_images(tiny.config, 1)
    assert_guesses_after_an_image_are_checked_as_by_single_steps(tiny.session(), tiny.session(), ids, images)


def test_soft_tokens_equal_eager(tiny: TinyOnnx) -> None:
    session, images = tiny.session(), random_images(tiny.config, 2)
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
    expected = random_model(tiny.config).encode_images(pixels).numpy()
    for image, soft_tokens in zip(images, expected, strict=True):
        assert np.abs(session.encode_image(image) - soft_tokens).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["int4-block32", "int4-channel"])
def test_integers_equal_eager_and_read_back(scheme: str, tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_vision_config(), tmp_path, scheme, "int8")
    assert_equals_eager(tiny, [3, None, 2, None, 40], 8)
    assert sum(name.startswith("vision_tower.") for name, _ in read_back_onnx(tiny.path)) == 2 * 6
    tiny.assert_integers_are_the_quantizers()


def test_a_changed_integer_of_the_vision_model_is_found(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_vision_config(), tmp_path, "int4-block32", "int8")
    vision_path = graphs_of(tiny.path)[1]
    codes = next(tensor for tensor in load_graph(vision_path).graph.initializer if tensor.name.endswith(".codes"))
    offset = next(int(entry.value) for entry in codes.external_data if entry.key == "offset")
    data = tmp_path / "vision.onnx.data"
    content = bytearray(data.read_bytes())
    content[offset] ^= 1
    data.write_bytes(content)
    assert tiny.counts().total_unequal == 1


def test_the_files_hold_nothing_but_the_weights(tmp_path: Path) -> None:
    for scheme, embedding in (("fp32", None), ("int4-block32", "int8")):
        tiny = tiny_onnx(tiny_vision_config(), tmp_path, scheme, embedding)
        files = {name: (tmp_path / name).stat().st_size for name in tiny.report.files}
        assert [method.file for method in tiny.report.methods] == ["model.onnx", "vision.onnx"]
        assert set(files) == {"model.onnx", "model.onnx.data", "vision.onnx", "vision.onnx.data"}
        external = [
            tensor
            for path in graphs_of(tiny.path)
            for tensor in load_graph(path).graph.initializer
            if tensor.external_data
        ]
        spare = files["model.onnx.data"] + files["vision.onnx.data"] - tiny.weights.ideal_bytes
        assert 0 <= spare <= 64 * len(external)


def test_a_text_only_model_has_one_graph_without_branches(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(), tmp_path)
    assert graphs_of(tiny.path) == [tiny.path]
    graph = load_graph(tiny.path).graph
    assert "soft_tokens" not in {value.name for value in graph.input}
    assert "If" not in {node.op_type for node in graph.node}


def test_the_caches_are_updated_in_place(tiny: TinyOnnx) -> None:
    """By text and by images alike: a call reads only what the one before it left in the bound buffers."""
    session = tiny.session()
    outputs = {output.name for output in session._session.get_outputs()}
    ids, images = with_images(tiny.config, [3, None, 30]), random_images(tiny.config, 1)
    expected = session.prefill(ids, images)
    kept = [buffer.numpy().copy() for buffer in session._caches]
    assert len(outputs) == 2 + len(kept)  # "logits" and "last_logits"
    other = tiny.session()
    for buffer, values in zip(other._caches, kept, strict=True):
        buffer.update_inplace(values)
    other.position = len(ids)
    assert np.array_equal(other.step(5), session.step(5))
    session.reset()
    assert np.array_equal(session.prefill(ids, images), expected)


def test_the_vision_model_never_holds_all_attention_scores(tiny: TinyOnnx) -> None:
    kinds = {node.op_type for node in load_graph(graphs_of(tiny.path)[1]).graph.node}
    assert "MultiHeadAttention" in kinds
    assert not kinds & {"Softmax", "Attention"}


def test_damaged_vision_models_are_bad_input(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_vision_config(), tmp_path)
    data = tmp_path / "vision.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"vision\.onnx: vision\.onnx\.data has .* the file is cut short"):
        tiny.session()
    (tmp_path / "vision.onnx").unlink()
    with pytest.raises(BadInput, match=r"vision\.onnx: no such file"):
        tiny.session()


def test_branches_hold_no_weights_of_their_own(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_vision_config(), tmp_path)
    model = onnx.load(tiny.path, load_external_data=False)
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    tensor = branch.initializer.add(name="w", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    tiny.path.write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="holds subgraphs, functions or constants"):
        tiny.session()


def test_the_graphs_pass_the_onnx_checker(tiny: TinyOnnx) -> None:
    for path in graphs_of(tiny.path):
        onnx.checker.check_model(path)
        onnxruntime.InferenceSession(path)
