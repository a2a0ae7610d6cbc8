"""The spec of each layer, and what is derived from it."""

from dataclasses import replace

import pytest
import torch

from gemma3 import names
from gemma3.cache import cache_layout
from gemma3.config import FULL, SLIDING, LayerSpec, Rope
from gemma3.model import Gemma3, inverse_frequencies, new_cache
from tests.shapes import SHAPES, tiny_config, tiny_vision_config


def test_a_spec_says_everything_about_its_layer() -> None:
    config = tiny_config("like-4b")
    local, full = config.layers[0], config.layers[5]
    assert local == LayerSpec(SLIDING, 8, Rope(10_000.0), 8, 4, 16)
    assert full == LayerSpec(FULL, None, Rope(1_000_000.0, 8.0), 8, 4, 16)
    assert [spec.kind for spec in config.layers] == list(config.layer_types)
    assert len(set(config.layers)) == 2
    assert replace(config, sliding_window=9).layers[0].window == 9


@pytest.mark.parametrize("shape", SHAPES)
def test_caches_and_buffers_have_the_specs_sizes(shape: str) -> None:
    config = tiny_config(shape)
    layout = cache_layout(config, "ring", 64, 8)
    sizes = 0
    for spec, cache, buffers in zip(config.layers, layout.layers, new_cache(layout), strict=True):
        assert cache.by_head == tuple(buffers.keys.shape) == (1, spec.num_key_value_heads, cache.slots, spec.head_dim)
        assert cache.by_slot == (1, cache.slots, spec.num_key_value_heads, spec.head_dim)
        sizes += sum(part.numel() * part.element_size() for part in (buffers.keys, buffers.values))
    assert layout.total_bytes == sizes


def test_frequencies_are_the_ropes() -> None:
    spec = tiny_config("like-4b").layers[5]
    expected = [1_000_000.0 ** (-2 * i / 16) / 8.0 for i in range(8)]
    assert inverse_frequencies(spec).tolist() == pytest.approx(expected, rel=1e-6)


def test_names_are_the_networks() -> None:
    config = tiny_vision_config()
    with torch.device("meta"):
        weights = Gemma3(config).state_dict()
    for name in (names.EMBEDDING, names.HEAD, names.FINAL_NORM, f"{names.layer(2)}.self_attn.q_proj.weight"):
        assert name in weights
    assert f"{names.vision_layer(1)}.mlp.fc1.weight" in weights
    assert f"{names.VISION_TOWER}.post_layernorm.weight" in weights
    assert f"{names.PROJECTOR}.mm_input_projection_weight" in weights
    assert names.head_of(config) == names.EMBEDDING
    assert names.head_of(tiny_config("untied")) == names.HEAD
