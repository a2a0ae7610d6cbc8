"""Int8 KV caches in an .onnx: the kernel's codes bit for bit, and the whole graph against the network that rounds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.onnx.read_back import stored_kv_scales
from export.onnx.write import export_onnx
from gemma3.cache import COMPACTING_SLACK, CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from gemma3.model import Gemma3
from quant.kv import PerChannel, codes_of, scales_of
from runtime_py.sessions.onnx import OnnxSession
from runtime_py.sessions.protocol import calls
from tests.onnx_models import quantized_weights
from tests.rewinding import assert_a_rewound_session_equals_one_that_never_went_on
from tests.seeing import eager_logits, random_images
from tests.shapes import random_model, random_tokens, tiny_config, tiny_vision_config, with_images

TOLERANCE = 1e-4
LENGTH = 8 + COMPACTING_SLACK + 4 * 8 + 6
HEADS, KV_HEADS, DIM = 4, 2, 16


def scales(config: ModelConfig, seed: int = 3) -> dict[int, PerChannel]:
    """Scales with which some values are clipped, and every channel has another."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_key_value_heads, config.head_dim)

    def drawn() -> torch.Tensor:
        return scales_of(1.0 + 2.0 * torch.rand(shape, generator=generator))

    return {index: PerChannel(drawn(), drawn()) for index in range(config.num_layers)}


def int8_file(config: ModelConfig, directory: Path, chunk: int = 8) -> tuple[Path, CacheLayout, Gemma3]:
    """A float32 file with int8 caches, and the network that rounds as it does."""
    layout = cache_layout(config, "compacting", 128, chunk, "int8")
    kv = scales(config)
    export_onnx(config, quantized_weights(config, "fp32", None).tensors, layout, directory / "model.onnx", kv=kv)
    model = random_model(config)
    model.round_heads(kv)
    return directory / "model.onnx", layout, model


def assert_but_for_a_few(differences: Sequence[np.float32], cost: np.float32) -> None:
    """The logits differ by float error, but for a few values within float error of the middle between two codes.

    Those may be rounded the other way and stay in the cache. They change a logit by little of what all roundings do.
    """
    assert cost > 100 * TOLERANCE
    assert np.median(differences) <= TOLERANCE
    assert max(differences) <= cost / 100


class Attention:
    """One GroupQueryAttention node with an int8 cache of ``slots`` rows, updated in place."""

    def __init__(self, scale: PerChannel, slots: int, window: int | None) -> None:
        cache = [1, KV_HEADS, slots, DIM]
        inputs: dict[str, tuple[int, list[Any]]] = {
            "q": (TensorProto.FLOAT, [1, "S", HEADS * DIM]),
            "k": (TensorProto.FLOAT, [1, "S", KV_HEADS * DIM]),
            "v": (TensorProto.FLOAT, [1, "S", KV_HEADS * DIM]),
            "past_k": (TensorProto.INT8, cache),
            "past_v": (TensorProto.INT8, cache),
            "past": (TensorProto.INT32, [1]),
            "total": (TensorProto.INT32, []),
        }
        outputs: dict[str, tuple[int, list[Any]]] = {"out": (TensorProto.FLOAT, [1, "S", HEADS * DIM])}
        outputs |= {name: (TensorProto.INT8, cache) for name in ("new_k", "new_v")}
        attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": DIM**-0.5}
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        if window is not None:
            attributes |= {"local_window_size": window, "sliding_window_cache": 1}
        node = helper.make_node(
            "GroupQueryAttention",
            [*inputs, *[""] * 5, "k_scale", "v_scale"],
            list(outputs),
            domain="com.microsoft",
            **attributes,
        )
        constants = [
            onnx.numpy_helper.from_array(part[None, :, None].numpy(), name)
            for name, part in (("k_scale", scale.keys), ("v_scale", scale.values))
        ]
        graph = helper.make_graph(
            [node],
            "attention",
            [helper.make_tensor_value_info(name, *one) for name, one in inputs.items()],
            [helper.make_tensor_value_info(name, *one) for name, one in outputs.items()],
            constants,
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        self._session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._past = 0
        self.caches = [ort.OrtValue.ortvalue_from_numpy(np.zeros(cache, np.int8)) for _ in "kv"]

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NDArray[np.float32]:
        """Queries [S, H, D], keys and values [S, K, D] → [S, H, D]."""
        binding = self._session.io_binding()
        binding.bind_output("out")
        for name, part in (("q", q), ("k", k), ("v", v)):
            binding.bind_cpu_input(name, part.reshape(1, len(part), -1).contiguous().numpy())
        for name, cache in zip("kv", self.caches, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"new_{name}", cache)
        self._past += len(q)
        binding.bind_cpu_input("past", np.array([self._past - 1], np.int32))
        binding.bind_cpu_input("total", np.array(self._past, np.int32))
        self._session.run_with_iobinding(binding)
        out: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0][0].reshape(-1, HEADS, DIM)
        return out


@pytest.mark.parametrize(("window", "slots"), [(None, 96), (16, 32), (16, 16)])
def test_the_kernel_rounds_as_the_reference_and_attends_to_rounded_keys(window: int | None, slots: int) -> None:
    """Its codes are equal to the bit. Its outputs are those of float64 attention over the rounded keys and values."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 1, 33, 1, 20, *[1] * 19, 3, 3]
    q = torch.randn(sum(lengths), HEADS, DIM, generator=generator)
    k, v = (torch.randn(sum(lengths), KV_HEADS, DIM, generator=generator) for _ in "kv")
    shape = (KV_HEADS, DIM)
    scale = PerChannel(*(scales_of(1.0 + 2.0 * torch.rand(shape, generator=generator)) for _ in "kv"))
    attention = Attention(scale, slots, window)
    parts = [torch.split(part, lengths) for part in (q, k, v)]
    out = np.concatenate([attention.feed(*call) for call in zip(*parts, strict=True)])

    _, keys, values = scale(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None])  # [1, K, T, D]
    position = torch.arange(len(q))
    mask = position[None] <= position[:, None]
    if window is not None:
        mask &= position[None] > position[:, None] - window
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None].double(), keys.double(), values.double(), mask, enable_gqa=True
    )
    assert np.abs(out - expected[0].transpose(0, 1).numpy()).max() < 2e-6

    live = len(q) if window is None else window
    stored = [cache.numpy()[0] for cache in attention.caches]
    wanted = [
        codes_of(part.transpose(0, 1)[None], scale)[0, :, -live:].to(torch.int8).numpy()
        for part, scale in ((k, scale.keys), (v, scale.values))
    ]
    places = [
        start
        for start in range(slots - live + 1)
        if all((one[:, start : start + live] == other).all() for one, other in zip(stored, wanted, strict=True))
    ]
    assert places == ([0] if window is None else places[:1])
    assert places


@pytest.mark.parametrize("shape", ["like-270m", "like-4b"])
def test_the_graph_equals_the_network_that_rounds(shape: str, tmp_path: Path) -> None:
    """Past the window and several moves of the bounded caches, in chunks and one by one, and after a reset."""
    config = tiny_config(shape)
    path, layout, model = int8_file(config, tmp_path)
    ids = random_tokens(config, LENGTH)
    expected = eager_logits(model, ids).numpy()
    model.round_heads({})
    cost = np.abs(eager_logits(model, ids).numpy() - expected).max()
    for chunk in (LENGTH, 7, 1):
        session = OnnxSession(path, replace(layout, chunk=chunk), config, threads=1)
        for _ in range(2):
            differences = []
            for start in range(0, LENGTH, chunk):
                end = min(start + chunk, LENGTH)
                differences.append(np.abs(session.prefill(ids[start:end]) - expected[end - 1]).max())
            assert_but_for_a_few(differences, cost)
            session.reset()


def test_a_rewound_session_equals_one_that_never_went_on(tmp_path: Path) -> None:
    config = tiny_config()
    path, layout, _ = int8_file(config, tmp_path)
    ids = random_tokens(config, layout.context)
    assert_a_rewound_session_equals_one_that_never_went_on(
        lambda: OnnxSession(path, layout, config, threads=1), ids, most=8
    )


def test_images_are_attended_to_through_int8_caches(tmp_path: Path) -> None:
    config = tiny_vision_config()
    assert config.vision is not None
    path, layout, model = int8_file(config, tmp_path, config.vision.tokens_per_image)
    ids = with_images(config, [5, None, 9, None, 30])
    images = random_images(config, 2)
    expected = eager_logits(model, ids, images).numpy()
    model.round_heads({})
    cost = np.abs(eager_logits(model, ids, images).numpy() - expected).max()
    for chunk in (7, 1):
        session = OnnxSession(path, layout, config, threads=1)
        differences = []
        for call in calls(session, ids, images, text_chunk=chunk):
            logits = session.prefill(call.ids, () if call.image is None else (call.image,))
            differences.append(np.abs(logits - expected[session.position - 1]).max())
        assert_but_for_a_few(differences, cost)


@pytest.mark.parametrize("config", [tiny_config(), tiny_vision_config()], ids=["text", "images"])
def test_every_scale_is_read_back_from_its_place(config: ModelConfig, tmp_path: Path) -> None:
    path, _, _ = int8_file(config, tmp_path, 8 if config.vision is None else config.vision.tokens_per_image)
    expected = scales(config)
    stored = list(stored_kv_scales(path))
    assert {layer for layer, _ in stored} == expected.keys()
    assert len(stored) == config.num_layers * (1 if config.vision is None else 2)  # a node for text, one for images
    for layer, found in stored:
        assert found.equal(expected[layer]) == found.count


def test_caches_of_another_dtype_than_the_manifest_says_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    path, layout, _ = int8_file(config, tmp_path)
    with pytest.raises(BadInput, match=r"past_key_values.0.key is tensor\(int8\), expected tensor\(float\)"):
        OnnxSession(path, replace(layout, dtype="float32"), config)


def test_bytes_of_caches_and_scales() -> None:
    layout = cache_layout(tiny_config(), "compacting", 128, 8, "int8")
    layer = layout.layers[0]
    assert layout.layer_bytes(0) == 2 * layer.num_key_value_heads * layer.head_dim * (layer.slots + 4)
