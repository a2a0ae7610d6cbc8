import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, SiglipVisionConfig

from gemma3 import typed_json
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import DEFAULTS, FULL, SLIDING, VISION_DEFAULTS, ModelConfig, Rope, parse_config, read_config
from gemma3.errors import BadInput, DoesNotFit
from scripts import random_checkpoint
from tests.shapes import RELEASED, SHAPES, tiny_config

# The released files (with the sizes in the report).
GEMMA_3_270M: dict[str, Any] = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(18)],
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_3_4B: dict[str, Any] = {**random_checkpoint.SHAPES["4b"], "transformers_version": "4.50.0.dev0"}


def test_270m() -> None:
    config = parse_config(GEMMA_3_270M)
    assert (config.num_layers, config.hidden_size, config.sliding_window) == (18, 640, 512)
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == [5, 11, 17]
    assert (config.local_rope, config.global_rope) == (Rope(10_000.0), Rope(1_000_000.0))


def test_4b_relies_on_defaults_and_outer_keys() -> None:
    config = parse_config(GEMMA_3_4B)
    assert (config.num_layers, config.num_attention_heads, config.num_key_value_heads) == (34, 8, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (262_208, 131_072)
    assert (config.local_rope, config.global_rope) == (Rope(10_000.0), Rope(1_000_000.0, 8.0))
    assert config.eos_token_ids == (1, 106)
    vision = config.vision
    assert vision is not None
    assert (vision.patches_per_side, vision.pool_size, vision.tokens_per_image) == (64, 4, 256)
    assert (vision.begin_image_token_id, vision.end_image_token_id, vision.image_token_id) == (255999, 256000, 262144)


def test_defaults_are_transformers() -> None:
    vision = SiglipVisionConfig()
    for key, value in VISION_DEFAULTS.items():
        assert getattr(vision, key) == value, key
    oracle = Gemma3TextConfig()
    for key, value in DEFAULTS.items():
        assert getattr(oracle, key) == value, key
    assert parse_config({"model_type": "gemma3_text"}) == parse_config(oracle.to_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_dict_round_trip(shape: str) -> None:
    config = tiny_config(shape)
    assert typed_json.decode(ModelConfig, json.loads(typed_json.encode(config)), "config") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only Gemma 3"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"model_type": "gemma3"}, "without a text_config"),
        ({"new_feature": 1}, "unknown key 'new_feature'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "only rope_type 'default' and 'linear'"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters must hold"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers 7"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types holds 'chunked_attention'"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"hidden_size": "640"}, "hidden_size is '640'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 is not a multiple"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"eos_token_id": [-1]}, "eos_token_id is -1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message.replace("[", r"\[")):
        parse_config(RELEASED | change)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"{", "not readable as JSON"), (b"[]", "expected an object")]
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_config(path)


def test_layout_is_bounded_on_local_layers_only() -> None:
    config = tiny_config(max_position_embeddings=4096)
    short, long = (cache_layout(config, "ring", context, chunk=9) for context in (64, 4096))
    assert [layer.slots for layer in short.layers] == [16, 16, 16, 16, 16, 64, 16]
    assert [layer.slots for layer in long.layers] == [16, 16, 16, 16, 16, 4096, 16]
    assert long.total_bytes == 2 * 32 * 4 * (6 * 16 + 4096)
    assert typed_json.decode(CacheLayout, json.loads(typed_json.encode(long)), "cache") == long


@pytest.mark.parametrize(
    ("context", "chunk", "error", "message"),
    [
        (512, 8, DoesNotFit, "context 512 is larger than the model's max_position_embeddings 256"),
        (7, 4, DoesNotFit, "context 7 is smaller than the sliding window 8"),
        (64, 0, BadInput, "chunk 0 is not between 1 and the context 64"),
        (64, 65, BadInput, "chunk 65"),
    ],
)
def test_layout_refusals(context: int, chunk: int, error: type[Exception], message: str) -> None:
    for style in ("ring", "compacting"):
        with pytest.raises(error, match=message):
            cache_layout(tiny_config(), style, context, chunk)
