import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from gemma3 import typed_json
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import (
    DEFAULTS,
    FULL,
    SLIDING,
    VISION_DEFAULTS,
    ModelConfig,
    Rope,
    parse_config,
    read_config,
    unread_keys,
)
from gemma3.errors import BadInput, DoesNotFit
from scripts import random_checkpoint
from tests.shapes import RELEASED, SHAPES, VISION_SHAPES, tiny_config

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
        ({"eos_token_id": [2**31]}, "eos_token_id is 2147483648"),
        ({"hidden_size": 10**4000}, "hidden_size is 1000"),
        ({"rope_theta": 10**4000}, "rope_theta is 1000"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most"),
        ({"model_type": "x" * 10**6}, "model_type is 'xxx"),
        ({"head_dim": None}, "head_dim is null"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"attention_bias": 0}, "attention_bias is 0"),
        ({"is_causal": False}, "is_causal is False"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is"),
        ({"quantization_config": {"quant_method": "bnb"}}, "quantized by another tool; give the full-precision"),
        ({"vision_config": {}}, "is model_type 'gemma3' meant"),
        ({"text_config": {}}, "is model_type 'gemma3' meant"),
        ({"decoder": {}}, "decoder is {}"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type 'default' and type 'linear', of which only"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear without a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "only rope_type"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], expected an object"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
        ({"rope_parameters": {FULL: 3}}, "full_attention is 3, expected an object"),
        ({"rope_parameters": {}, "rope_scaling": {}}, "beside rope_parameters without 'full_attention'"),
        ({"sliding_window_pattern": None}, "sliding_window_pattern is None"),
        ({"_sliding_window_pattern": 3}, "_sliding_window_pattern is 3, but only sliding_window_pattern is read"),
        ({"layer_types": "sliding_attention"}, "layer_types is 'sliding_attention', expected a list"),
        ({"layer_types": [[]] * 7}, "layer_types holds []"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as refused:
        parse_config(RELEASED | change)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not readable as JSON"),
        (b"[]", "expected an object"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), r"not UTF-8 text \(byte 0 is 0xff\)"),
        (b"[" * 10**6, "nested too deeply"),
        (
            b'{"model_type": "gemma3_text", "a": ' + b"[" * 900 + b"]" * 900 + b', "hidden_size": 1' + b"0" * 5000,
            "JSON",
        ),
        (b'{"rope_theta": NaN}', "holds NaN"),
        (b'{"rope_theta": -Infinity}', "holds -Infinity"),
        (b'{"model_type": "gemma3_text", "rope_theta": 1e999}', "rope_theta is inf"),
        (b'{"text_config": {"head_dim": 8, "head_dim": 16}}', "holds the key 'head_dim' twice"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_config(path)


def effective(config: Gemma3TextConfig) -> dict[str, Any]:
    """What transformers' text model computes with."""

    def rope(kind: str) -> Rope:
        assert config.rope_parameters is not None
        given = config.rope_parameters[kind]
        linear = given.get("rope_type") == "linear"
        assert linear or given.get("rope_type") in (None, "default")
        return Rope(given["rope_theta"], given["factor"] if linear else 1.0)

    plain = {name: getattr(config, name) for name in DEFAULTS if name not in ("eos_token_id", "num_hidden_layers")}
    assert config.layer_types is not None
    assert config.sliding_window is not None
    return plain | {
        "layer_types": tuple(config.layer_types),
        "sliding_window": min(config.sliding_window, config.max_position_embeddings),
        "ropes": (rope(SLIDING), rope(FULL)),
    }


def ours(config: ModelConfig) -> dict[str, Any]:
    plain = {name: getattr(config, name) for name in DEFAULTS if name not in ("eos_token_id", "num_hidden_layers")}
    return plain | {"layer_types": config.layer_types, "ropes": (config.local_rope, config.global_rope)}


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


ROPE: dict[str, Any] = {
    "rope_type": one_of("default", "linear", "yarn", None),
    "type": one_of("default", "linear"),
    "rope_theta": one_of(300.0, 5000.0, None),
    "factor": one_of(1.0, 4, 8.0, None),
    "partial_rotary_factor": one_of(1.0, 0.5),
    "beta_fast": one_of(32),
}
ROPE_OBJECTS = st.fixed_dictionaries({}, optional=ROPE)
TEXT: dict[str, Any] = {
    "rope_theta": one_of(700.0, 10_000.0, None),
    "rope_local_base_freq": one_of(700.0, 20.0, None),
    "rope_scaling": st.none() | ROPE_OBJECTS,
    "rope_parameters": st.none()
    | st.fixed_dictionaries(
        {}, optional={SLIDING: st.none() | ROPE_OBJECTS, FULL: st.none() | ROPE_OBJECTS, **ROPE, "other": ROPE_OBJECTS}
    ),
    "layer_types": one_of(
        None, [FULL] * 3, [SLIDING, FULL, SLIDING], ["attention", SLIDING, FULL], [FULL], ["conv"] * 3
    ),
    "sliding_window_pattern": one_of(2, 3, None),
    "_sliding_window_pattern": one_of(2, 6),
    "sliding_window": one_of(8, 4096, None),
    "max_position_embeddings": one_of(64, 4096, None),
    "head_dim": one_of(8, 16, None),
    "tie_word_embeddings": one_of(True, False, None),
    "hidden_act": one_of("silu", None),
    "hidden_activation": one_of("gelu_pytorch_tanh", None),
    "final_logit_softcapping": one_of(None, 30.0),
    "use_bidirectional_attention": one_of(None, False, True),
    "pad_token_id": one_of(0, 3),
    "num_labels": one_of(3),
    "max_length": one_of(20),
    "tokenizer_class": one_of("GemmaTokenizer"),
    "auto_map": one_of({"AutoConfig": "other.Config"}),
    "unsloth_fixed": one_of(True),
    "pretraining_tp": one_of(1),
}


@given(st.fixed_dictionaries({}, optional=TEXT))
def test_any_spelling_is_read_as_transformers_reads_it_or_refused(change: dict[str, Any]) -> None:
    data = {"model_type": "gemma3_text", "num_hidden_layers": 3} | change
    try:
        config = parse_config(copy.deepcopy(data))
    except BadInput:
        return
    assert ours(config) == effective(Gemma3TextConfig.from_dict(copy.deepcopy(data)))
    unread = set(unread_keys(data))
    assert unread >= {key for key in ("unsloth_fixed", "hidden_act", "auto_map", "max_length") if key in data}
    assert not unread & {"head_dim", "layer_types", "rope_scaling", "rope_parameters"}


@pytest.mark.parametrize(
    ("change", "unread"),
    [
        ({"unsloth_fixed": True, "unsloth_version": "2025.9.1"}, ["unsloth_fixed", "unsloth_version"]),
        ({"auto_map": {}, "tokenizer_class": "x", "is_decoder": False}, ["auto_map", "is_decoder", "tokenizer_class"]),
        ({"max_length": 20, "num_labels": 2, "pretraining_tp": 1}, ["max_length", "num_labels", "pretraining_tp"]),
        ({"hidden_act": "silu"}, ["hidden_act"]),
        ({"quantization_config": None, "text_config": None}, []),
        ({"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 7.0}}}, ["rope_theta"]),
        ({"rope_parameters": {FULL: {"rope_type": "linear", "factor": 4}}, "rope_theta": 9.0}, []),
        (
            {"rope_parameters": {FULL: {"rope_theta": 7.0}}, "rope_scaling": {"rope_type": "linear", "factor": 4}},
            ["rope_theta"],
        ),
        ({"rope_parameters": {FULL: {"type": "linear", "factor": 8.0}}}, []),
        ({"rope_parameters": {SLIDING: None, "moe": {}}}, ["rope_parameters.moe"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8, "beta": 1}}, ["rope_scaling.beta"]),
        ({"layer_types": ["attention"] * 7}, ["sliding_window_pattern"]),
        ({"sliding_window": 512}, []),
    ],
)
def test_what_transformers_accepts(change: dict[str, Any], unread: list[str]) -> None:
    data = RELEASED | change
    assert ours(parse_config(data)) == effective(Gemma3TextConfig.from_dict(copy.deepcopy(data)))
    assert unread_keys(data) == unread


MULTIMODAL: dict[str, Any] = VISION_SHAPES["like-4b"]
OUTER: dict[str, Any] = {
    "tie_word_embeddings": one_of(True, False, None),
    "image_token_index": one_of(150, 140),
    "image_token_id": one_of(150, 141),
    "boi_token_id": one_of(142),
    "eoi_token_id": one_of(143),
    "mm_tokens_per_image": one_of(1, 16),
    "hidden_size": one_of(3),
    "sliding_window": one_of(3),
    "rope_theta": one_of(3.0),
    "final_logit_softcapping": one_of(30.0),
    "unsloth_fixed": one_of(True),
}
VISION: dict[str, Any] = {
    "final_logit_softcapping": one_of(30.0),
    "sliding_window": one_of(3),
    "hidden_act": one_of("gelu_pytorch_tanh", "silu"),
    "num_channels": one_of(3, 1, None),
    "hidden_size": one_of(24, 12, None),
    "projection_dim": one_of(7),
}


@given(
    outer=st.fixed_dictionaries({}, optional=OUTER),
    text=st.fixed_dictionaries({}, optional={"tie_word_embeddings": one_of(True, False), "lm_head": one_of(1)}),
    vision=st.fixed_dictionaries({}, optional=VISION),
)
def test_the_levels_of_a_multimodal_file(outer: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> None:
    inner = {"text_config": MULTIMODAL["text_config"] | text, "vision_config": MULTIMODAL["vision_config"] | vision}
    data = MULTIMODAL | inner | outer
    if "tie_word_embeddings" not in text:
        data["text_config"].pop("tie_word_embeddings", None)
    try:
        config = parse_config(copy.deepcopy(data))
    except BadInput:
        return
    oracle: Any = Gemma3Config.from_dict(copy.deepcopy(data))
    # A file that unties on the inner level alone stores a head, which transformers loads; tests/test_kinds.py runs it.
    tied = bool(oracle.tie_word_embeddings) and (
        "tie_word_embeddings" in outer or oracle.text_config.tie_word_embeddings
    )
    assert ours(config) == effective(oracle.text_config) | {"tie_word_embeddings": tied}
    assert config.vision is not None
    for key in VISION_DEFAULTS:
        assert getattr(config.vision, key) == getattr(oracle.vision_config, key)
    for name, attribute in (("tokens_per_image", "mm_tokens_per_image"), ("image_token_id", "image_token_id")):
        assert getattr(config.vision, name) == getattr(oracle, attribute)
    assert config.vision.begin_image_token_id == oracle.boi_token_id
    assert config.vision.end_image_token_id == oracle.eoi_token_id
    unread = unread_keys(data)
    assert {f"vision_config.{key}" for key in ("sliding_window", "final_logit_softcapping") if key in vision} <= set(
        unread
    )
    assert {key for key in ("hidden_size", "rope_theta", "unsloth_fixed") if key in outer} <= set(unread)


def test_the_keys_that_are_not_read_are_one_short_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    strange = {"\n\u2028\ud800": 1, "z" * 10_000: 2, **{f"key-{number:04}": 3 for number in range(1000)}}
    path.write_text(json.dumps(RELEASED | strange))
    with caplog.at_level(logging.INFO, "gemma3"):
        read_config(path)
        read_config(path)
    (message,) = caplog.messages
    assert message.startswith(f"{path}: keys that Gemma 3 does not read: \\n\\u2028\\ud800, key-0000, ")
    assert message.endswith(" and 990 more")
    assert len(message) < 1000
    assert "\n" not in message


def test_a_window_over_the_positions_is_clamped() -> None:
    for window in (256, 4096):
        assert tiny_config(sliding_window=window) == tiny_config(sliding_window=256)
    layout = cache_layout(tiny_config(sliding_window=4096), "compacting", 64, chunk=9)
    assert {layer.slots for layer in layout.layers} == {64}


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
        (64, 0, BadInput, "chunk 0 is not between 1 and the context 64"),
        (64, 65, BadInput, "chunk 65"),
    ],
)
def test_layout_refusals(context: int, chunk: int, error: type[Exception], message: str) -> None:
    for style in ("ring", "compacting"):
        with pytest.raises(error, match=message):
            cache_layout(tiny_config(), style, context, chunk)
