"""The .onnx file compared with the eager network for every kind of shape, and its bytes with what they should be."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch

from export.integers import compare_integers
from export.onnx.file import exact_twin, load_graph
from export.onnx.layers import block_size, pack
from export.onnx.read_back import unpack
from export.onnx.target import ONNX
from export.onnx.write import export_onnx, genai_config
from export.target import TensorSpec, rounding_of
from gemma3.cache import COMPACTING_SLACK, cache_layout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, VerificationFailed
from gemma3.names import EMBEDDING
from quant.eager import quantized_model
from quant.integers import IntegerWeight, round_to_nearest
from quant.weights import OnDemand, Weight
from runtime_py.api import export_bundle
from runtime_py.sessions.onnx import OnnxSession
from tests.bundles import write_checkpoint
from tests.onnx_models import TinyOnnx, quantized_weights, tiny_onnx
from tests.shapes import SHAPES, random_model, random_tokens, tiny_config, tiny_vision_config

TOLERANCE = 1e-4
# In most tiny shapes buffers hold 8 + COMPACTING_SLACK rows; this is over four windows past their first move.
LENGTH = 8 + COMPACTING_SLACK + 4 * 8 + 6
SCHEMES = [("int4-block32", "int8"), ("int4-block32", "int4"), ("int4-channel", "int8")]


def logits_by_chunk(tiny: TinyOnnx, ids: list[int], chunk: int) -> dict[int, np.ndarray]:
    """Position → the logits after it, for the last position of every call of ``chunk`` ids."""
    session = OnnxSession(tiny.path, replace(tiny.layout, chunk=chunk), tiny.config, threads=1)
    return {
        start + len(piece) - 1: session.prefill(piece)
        for start in range(0, len(ids), chunk)
        for piece in [ids[start : start + chunk]]
    }


def assert_equals_eager(tiny: TinyOnnx, chunk_sizes: tuple[int, ...] = (LENGTH, 7, 1), length: int = LENGTH) -> None:
    ids = random_tokens(tiny.config, length)
    expected = tiny.eager_logits(ids).numpy()
    assert expected.std() > 0.1
    for chunk in chunk_sizes:
        for position, logits in logits_by_chunk(tiny, ids, chunk).items():
            difference = np.abs(logits - expected[position]).max()
            assert difference <= TOLERANCE, f"chunks of {chunk}, position {position}: {difference}"


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_eager(shape: str, tmp_path: Path) -> None:
    assert_equals_eager(tiny_onnx(tiny_config(shape), tmp_path))


@pytest.mark.parametrize(("scheme", "embedding"), SCHEMES)
@pytest.mark.parametrize("shape", ["like-4b", "untied"])
def test_integers_equal_eager(shape: str, scheme: str, embedding: str, tmp_path: Path) -> None:
    assert_equals_eager(tiny_onnx(tiny_config(shape), tmp_path, scheme, embedding))


@pytest.mark.parametrize("scheme", ["fp32", "int4-channel"])
def test_columns_that_do_not_divide_into_blocks(scheme: str, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=40, intermediate_size=50, vocab_size=163, num_hidden_layers=2, head_dim=8)
    assert_equals_eager(tiny_onnx(config, tmp_path, scheme), chunk_sizes=(7,))


@pytest.mark.parametrize("window", [120, 128])
def test_windows_close_to_the_context(window: int, tmp_path: Path) -> None:
    """The buffer is cut at the context: fewer spare rows than the slack, or none."""
    config = tiny_config(sliding_window=window, num_hidden_layers=2)
    assert_equals_eager(tiny_onnx(config, tmp_path), chunk_sizes=(7,), length=128)


def test_prompts_that_end_near_the_end_of_the_window_and_of_the_buffer(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(num_hidden_layers=7), tmp_path)
    session = OnnxSession(tiny.path, replace(tiny.layout, chunk=LENGTH), tiny.config, threads=1)
    ids = random_tokens(tiny.config, LENGTH)
    expected = tiny.eager_logits(ids).numpy()
    buffer = tiny.layout.layers[0].slots
    for prompt in (1, 7, 8, 9, 16, buffer - 1, buffer, buffer + 1, buffer + 8):
        session.reset()
        assert np.abs(session.prefill(ids[:prompt]) - expected[prompt - 1]).max() <= TOLERANCE
        for position in range(prompt, min(prompt + 10, LENGTH)):
            assert np.abs(session.step(ids[position]) - expected[position]).max() <= TOLERANCE


def test_a_twin_multiplies_in_float32_and_can_compute_some_logits_only(tmp_path: Path) -> None:
    rounded = tiny_onnx(tiny_config(), tmp_path, "int4-block32", "int8", accuracy_level=4)
    ids, columns = random_tokens(rounded.config, LENGTH), np.array([3, 7, 150], np.int32)
    expected = rounded.eager_logits(ids)[-1].numpy()
    for chosen in (None, columns):
        with exact_twin(rounded.path, chosen) as twin:
            size = rounded.config.vocab_size if chosen is None else len(chosen)
            session = OnnxSession(twin, rounded.layout, rounded.config, 1, logits=size)
            logits = session.prefill(ids)
        assert logits.shape == (size,)
        assert np.abs(logits - (expected if chosen is None else expected[chosen])).max() <= TOLERANCE
    assert not list(tmp_path.glob("exact*"))
    assert np.abs(rounded.session().prefill(ids) - expected).max() > 10 * TOLERANCE


def test_chosen_weights_keep_float_activations(tmp_path: Path) -> None:
    """Its reference rounds all other inputs. Weights that differ in this are not one matrix."""
    config = tiny_config()
    weights = quantized_weights(config, "int4-block32", "int8")
    kept = [name for name in weights.tensors if "down_proj" in name or "layers.0.self_attn.q_proj" in name]
    layout = cache_layout(config, "compacting", 128, chunk=8)
    export_onnx(config, weights.tensors, layout, tmp_path / "model.onnx", kept)
    levels = {
        name: attribute.i
        for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
        for name in json.loads(node.metadata_props[0].value)["rows"]
    }
    assert {name for name, level in levels.items() if level == 1} == set(kept)
    assert set(levels.values()) == {1, 4}
    ids = random_tokens(config, 6)
    model = quantized_model(config, weights, rounding_of(ONNX, "int8-per-block", kept))
    wrong = quantized_model(config, weights, rounding_of(ONNX, "int8-per-block"))
    logits = OnnxSession(tmp_path / "model.onnx", layout, config, 1).prefill(ids)
    right, other = (one(torch.tensor([ids]))[0, -1].numpy() for one in (model, wrong))
    assert np.abs(logits - right).max() < np.abs(logits - other).max()


def test_as_shipped_is_close_to_eager(tmp_path: Path) -> None:
    """Accuracy level 4 rounds activations by block, as the reference does, but for a rounding here and there."""
    tiny = tiny_onnx(tiny_config(), tmp_path, "int4-block32", "int8", accuracy_level=4)
    ids = random_tokens(tiny.config, LENGTH)
    logits = torch.tensor(np.stack(list(logits_by_chunk(tiny, ids, 1).values())))
    rounded = quantized_model(tiny.config, tiny.weights, rounding_of(ONNX, "int8-per-block"))

    def kl(expected: torch.Tensor) -> float:
        log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    with torch.inference_mode():
        to_rounded = kl(rounded(torch.tensor([ids]))[0])
    assert to_rounded < 0.2 * kl(tiny.eager_logits(ids)) < 2e-4


@pytest.mark.parametrize(("scheme", "embedding"), SCHEMES)
@pytest.mark.parametrize("shape", ["like-270m", "untied"])
def test_integers_read_back(shape: str, scheme: str, embedding: str, tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(shape), tmp_path, scheme, embedding)
    tiny.assert_integers_are_the_quantizers()


def test_a_changed_integer_is_found(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(), tmp_path, "int4-block32", "int8")
    data = tiny.path.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    before = tiny.counts().total_equal
    content[1000] ^= 1  # inside the table, which is written first
    data.write_bytes(content)
    assert tiny.counts().total_unequal == 1
    assert tiny.counts().total_equal == before - 1


def test_a_weight_that_no_node_uses_is_unequal(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(), tmp_path)
    weight = round_to_nearest(torch.ones(4, 32), 4, 32)
    counts = compare_integers({"unused.weight": weight}, ONNX, tiny.path)
    assert (counts.equal, counts.unequal) == ({"unused.weight": 0}, {"unused.weight": weight.codes.numel()})


def test_export_fails_when_the_file_does_not_hold_the_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_off(codes: torch.Tensor, bits: int, block: int) -> np.ndarray:
        packed = pack(codes, bits, block)
        packed[0, 0, 0] ^= 1
        return packed

    monkeypatch.setattr("export.onnx.layers.pack", one_off)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(VerificationFailed, match="integers in the file are the quantizer's"):
        export_bundle(checkpoint, tmp_path / "out", formats=["onnx"], context=96, chunk=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_what_the_kernels_read(bits: int) -> None:
    """Even columns are in the low nibble, codes are offset by 2^(bits−1), and padding means 0."""
    codes = torch.tensor([[-8, 7, 1, *[0] * 14]], dtype=torch.int8)
    packed = pack(codes, bits, 16)
    assert packed.shape == (1, 2, 2 * bits)
    assert packed[0, 0, :2].tolist() == ([0xF0, 0x89] if bits == 4 else [120, 135])
    assert packed[0, 1].tolist() == ([0x88] * 8 if bits == 4 else [128] * 16)
    assert torch.equal(unpack(packed, bits, 17), codes)


def test_the_file_holds_nothing_but_the_weights(tmp_path: Path) -> None:
    """The shared table once, one scale per row if per channel: only alignment is added to the ideal bytes."""
    for scheme, embedding in (("fp32", None), *SCHEMES):
        tiny = tiny_onnx(tiny_config(), tmp_path, scheme, embedding)
        external = [tensor for tensor in load_graph(tiny.path).graph.initializer if tensor.external_data]
        assert (
            0 <= tiny.path.with_name("model.onnx.data").stat().st_size - tiny.weights.ideal_bytes <= 64 * len(external)
        )


def cache_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every cache input by name, as the file declares it."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in load_graph(path).graph.input
        if value.name.startswith("past_key_values.")
    }


def test_local_caches_do_not_grow_with_the_context(tmp_path: Path) -> None:
    config = tiny_config()
    shapes = {context: cache_shapes(tiny_onnx(config, tmp_path, context=context).path) for context in (128, 256)}
    assert len(shapes[128]) == 2 * config.num_layers
    for name, shape in shapes[128].items():
        layer = int(name.split(".")[1])
        if config.layers[layer].window is not None:
            assert shape == shapes[256][name] == (1, 1, config.sliding_window + COMPACTING_SLACK, config.head_dim)
        else:
            assert (shape[2], shapes[256][name][2]) == (128, 256)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny_onnx(tiny_config(), tmp_path / name, "int4-channel", "int4")
        contents.append([(tmp_path / name / file).read_bytes() for file in ("model.onnx", "model.onnx.data")])
    assert contents[0] == contents[1]


def test_report_states_the_file(tmp_path: Path) -> None:
    tiny = tiny_onnx(tiny_config(), tmp_path, "int4-block32", "int8", accuracy_level=4)
    model = onnx.load(tiny.path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == tiny.report.opsets
    assert model.ir_version == tiny.report.details["ir_version"]
    (method,) = tiny.report.methods
    assert method.name == "forward"
    assert method.outputs[0] == TensorSpec("logits", "float32", (1, 1, tiny.config.vocab_size))
    levels = {
        attribute.i for node in model.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"
    }
    assert levels == {tiny.report.details["accuracy_level"]}
    assert json.loads(json.dumps(asdict(tiny.report)))["files"] == ["model.onnx", "model.onnx.data"]
    assert all((tmp_path / name).is_file() for name in tiny.report.files)


def test_refuses_what_the_runtime_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="head_dim is 12; ONNX Runtime's attention needs a multiple of 8"):
        tiny_onnx(tiny_config(head_dim=12), tmp_path)
    with pytest.raises(BadInput, match="w: 3-bit integers; ONNX Runtime's kernels take 4 or 8"):
        block_size("w", IntegerWeight(torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), 3))
    with pytest.raises(BadInput, match="w: groups of 24; ONNX Runtime's kernels take powers of two from 16 to 128"):
        block_size("w", IntegerWeight(torch.zeros(4, 48, dtype=torch.int8), torch.ones(4, 2), 4))


def test_refuses_weights_that_are_not_the_models(tmp_path: Path) -> None:
    config = tiny_config()
    layout = cache_layout(config, "compacting", 128, 8)
    tensors = dict(quantized_weights(config, "int4-block32", "int8").tensors)
    extra = tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(BadInput, match=r"1 weights are not part of this model, the first is model\.layers\.7"):
        export_onnx(config, extra, layout, tmp_path / "model.onnx")
    missing = {name: weight for name, weight in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(BadInput, match=r"weight model\.norm\.weight is missing"):
        export_onnx(config, missing, layout, tmp_path / "model.onnx")
    table = tensors["model.embed_tokens.weight"]
    assert isinstance(table, IntegerWeight)
    coarse = tensors | {"model.embed_tokens.weight": replace(table, scales=table.scales * 1.0001)}
    with pytest.raises(BadInput, match=r"model\.embed_tokens\.weight: scales are not exact in float16"):
        export_onnx(config, coarse, layout, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config("window-over-positions", max_position_embeddings=1024), tiny_vision_config()],
    ids=["text-only", "window-over-context", "sees"],
)
def test_stock_onnxruntime_genai_runs_the_text_model(config: ModelConfig, tmp_path: Path) -> None:
    """After a prompt far longer than the local buffers and in greedy decoding, its logits and tokens are ours."""
    tiny = tiny_onnx(config, tmp_path, context=256)
    genai = genai_config(tiny.config, tiny.layout, tiny.config.eos_token_ids)
    (tmp_path / "genai_config.json").write_text(json.dumps(genai))
    vocabulary = {f"t{index}": index for index in range(tiny.config.vocab_size)}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    model = onnxruntime_genai.Model(str(tmp_path))
    generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
    ids = random_tokens(tiny.config, 90)
    generator.append_tokens(np.array([ids], np.int32))
    eager = random_model(tiny.config)
    for _ in range(30):
        with torch.no_grad():
            expected = eager(torch.tensor([ids]), last_only=True)[0, 0].numpy()
        assert np.abs(generator.get_logits().reshape(-1) - expected).max() <= TOLERANCE
        generator.generate_next_token()
        ids.append(int(expected.argmax()))
        assert generator.get_sequence(0)[-1] == ids[-1]


def test_each_weight_is_asked_for_once(tmp_path: Path) -> None:
    """Making a weight takes time, and keeping it takes memory."""
    config = tiny_config("like-4b")
    asked: Counter[str] = Counter()
    held = quantized_weights(config, "int4-block32", "int8")

    def make(name: str) -> Weight:
        asked[name] += 1
        return held.tensors[name]

    weights = OnDemand(held.forms, make)
    layout = cache_layout(config, "compacting", 128, chunk=8)
    export_onnx(config, weights, layout, tmp_path / "model.onnx")
    assert asked == Counter(held.tensors.keys())
    asked.clear()
    counts = compare_integers(weights, ONNX, tmp_path / "model.onnx")
    assert counts.total_unequal == 0
    assert asked == Counter([*held.integers, EMBEDDING])  # the tied table is in two places
