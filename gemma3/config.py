"""The shape of a Gemma 3 model, read from Hugging Face's ``config.json``.

Two spellings are read: that of the released files (``rope_theta``, ``rope_local_base_freq``, ``rope_scaling``,
``sliding_window_pattern``) and the newer, nested one (``rope_parameters``, ``layer_types``). In a text-only file
(``model_type`` ``gemma3_text``) the keys are at the top; in a ``gemma3`` file they are under ``text_config``.
Every key is used, checked against the only value that this network implements, or listed in ``IGNORED``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gemma3.errors import BadInput

LayerKind = Literal["sliding_attention", "full_attention"]
SLIDING: LayerKind = "sliding_attention"
FULL: LayerKind = "full_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base ``theta``, positions divided by ``factor`` (linear scaling)."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """The attention of one text layer. Layers with equal specs share their masks and RoPE angles."""

    kind: LayerKind
    window: int | None  # how many positions a query attends to, its own included; None: all up to its own
    rope: Rope
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class VisionConfig:
    """The vision model (SigLIP), and the number of soft tokens that it passes to the text model for one image."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels on each side of its square input
    patch_size: int
    layer_norm_eps: float
    tokens_per_image: int
    image_token_id: int  # the placeholder that a soft token replaces
    begin_image_token_id: int
    end_image_token_id: int

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def pool_size(self) -> int:
        """Patches on each side of the square that is averaged into one soft token."""
        return self.patches_per_side // math.isqrt(self.tokens_per_image)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the network: the text model and, unless it is text-only, the vision model.

    The number of text layers is the length of ``layer_types``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[LayerKind, ...]
    sliding_window: int
    max_position_embeddings: int
    query_pre_attn_scalar: float
    rms_norm_eps: float
    local_rope: Rope
    global_rope: Rope
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vision: VisionConfig | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The specs of the text layers, in order. Caches, graphs and readers take a layer's sizes from here."""
        return tuple(
            LayerSpec(
                kind=kind,
                window=self.sliding_window if kind == SLIDING else None,
                rope=self.local_rope if kind == SLIDING else self.global_rope,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
            )
            for kind in self.layer_types
        )


# transformers' Gemma3TextConfig defaults: the released 4B–27B files leave these keys out and rely on them.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ROPE_THETA, ROPE_LOCAL_BASE_FREQ, SLIDING_WINDOW_PATTERN = 1_000_000.0, 10_000.0, 6

# Keys that would change the arithmetic: anything but the value Gemma 3 uses is refused.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}

# Keys that do not change what the network computes.
IGNORED = frozenset(
    {
        # provenance and storage
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path"),
        # training, and how transformers runs and returns things
        *("attention_dropout", "initializer_range", "use_cache", "cache_implementation", "return_dict"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("problem_type", "id2label", "label2id", "_attn_implementation", "_attn_implementation_autoset"),
    }
)
# transformers' SiglipVisionConfig defaults.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
VISION_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("siglip_vision_model",),
    "num_channels": (3,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "vision_use_head": (False,),
}
# Keys beside ``text_config`` that belong to the vision model: our name → the two spellings, transformers' default.
IMAGE_TOKENS: dict[str, tuple[tuple[str, ...], int]] = {
    "tokens_per_image": (("mm_tokens_per_image",), 256),
    "image_token_id": (("image_token_index", "image_token_id"), 262_144),
    "begin_image_token_id": (("boi_token_index", "boi_token_id"), 255_999),
    "end_image_token_id": (("eoi_token_index", "eoi_token_id"), 256_000),
}
ROPE_TYPES = ("default", "linear")


def read_config(path: Path) -> ModelConfig:
    """Read the ``config.json`` at ``path``. Raises BadInput when it is missing, unreadable or not that of a Gemma 3."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give a Hugging Face checkpoint directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    try:
        return parse_config(data)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def parse_config(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a parsed ``config.json``, with ``vision`` if the file has a ``vision_config``.

    Raises BadInput naming the key that is missing, unknown or has a value that cannot be used.
    """
    model_type = data.get("model_type")
    if model_type == "gemma3":
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise BadInput("model_type 'gemma3' without a text_config; the file is incomplete")
        outer = {key: value for key, value in data.items() if key != "text_config"}
        _refuse_unknown(
            outer,
            known={
                *(key for keys, _ in IMAGE_TOKENS.values() for key in keys),
                "vision_config",
                "model_type",
                "eos_token_id",
                "bos_token_id",
                "pad_token_id",
                "tie_word_embeddings",
            },
        )
        # Where the outer level gives token ids and tying, transformers uses those.
        inherited = {
            key: outer[key]
            for key in ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")
            if outer.get(key) is not None
        }
        config = _parse_text({**text, **inherited})
        return config if outer.get("vision_config") is None else replace(config, vision=_parse_vision(outer, config))
    if model_type != "gemma3_text":
        raise BadInput(
            f"model_type is {model_type!r}; only Gemma 3 checkpoints ('gemma3_text' or 'gemma3') can be used"
        )
    return _parse_text(data)


def _parse_text(data: Mapping[str, Any]) -> ModelConfig:
    rope_keys = {"rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"}
    pattern_keys = {"sliding_window_pattern", "_sliding_window_pattern", "layer_types"}
    _refuse_unknown(data, known={"model_type", *DEFAULTS, *rope_keys, *pattern_keys})
    if data.get("model_type", "gemma3_text") != "gemma3_text":
        raise BadInput(f"text_config.model_type is {data['model_type']!r}, expected 'gemma3_text'")
    values = {key: default if data.get(key) is None else data[key] for key, default in DEFAULTS.items()}
    for key, allowed in REQUIRED_VALUES.items():
        if key in data and data[key] not in allowed:
            raise BadInput(f"{key} is {data[key]!r}; Gemma 3 has {allowed[0]!r} and nothing else is implemented")
    local_rope, global_rope = _ropes(data)
    eos = values["eos_token_id"]
    config = ModelConfig(
        vocab_size=_count(values, "vocab_size"),
        hidden_size=_count(values, "hidden_size"),
        intermediate_size=_count(values, "intermediate_size"),
        num_attention_heads=_count(values, "num_attention_heads"),
        num_key_value_heads=_count(values, "num_key_value_heads"),
        head_dim=_count(values, "head_dim"),
        layer_types=_layer_types(data, _count(values, "num_hidden_layers")),
        sliding_window=_count(values, "sliding_window"),
        max_position_embeddings=_count(values, "max_position_embeddings"),
        query_pre_attn_scalar=_positive(values["query_pre_attn_scalar"], "query_pre_attn_scalar"),
        rms_norm_eps=_positive(values["rms_norm_eps"], "rms_norm_eps"),
        local_rope=local_rope,
        global_rope=global_rope,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        bos_token_id=_token_id(values["bos_token_id"], "bos_token_id"),
        eos_token_ids=tuple(_token_id(i, "eos_token_id") for i in (eos if isinstance(eos, list) else [eos])),
        pad_token_id=_token_id(values["pad_token_id"], "pad_token_id"),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadInput(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise BadInput(f"head_dim is {config.head_dim}; rotary embeddings need an even number")
    return config


def _parse_vision(data: Mapping[str, Any], text: ModelConfig) -> VisionConfig:
    """The vision model's configuration, from the keys beside ``text_config``."""
    encoder = data["vision_config"]
    if not isinstance(encoder, Mapping):
        raise BadInput(f"vision_config is {encoder!r}, expected an object")
    unknown = sorted(set(encoder) - set(VISION_DEFAULTS) - set(VISION_REQUIRED_VALUES) - IGNORED)
    if unknown:
        raise BadInput(f"unknown key vision_config.{unknown[0]}; it may change the network, so it is not ignored")
    for key, allowed in VISION_REQUIRED_VALUES.items():
        if key in encoder and encoder[key] not in allowed:
            raise BadInput(f"vision_config.{key} is {encoder[key]!r}; Gemma 3 has {allowed[0]!r}")
    values = {key: default if encoder.get(key) is None else encoder[key] for key, default in VISION_DEFAULTS.items()}
    for field, (keys, default) in IMAGE_TOKENS.items():
        values[field] = next((data[key] for key in keys if data.get(key) is not None), default)
    sizes = {key: _count(values, key) for key in values if key != "layer_norm_eps"}
    config = VisionConfig(**sizes, layer_norm_eps=_positive(values["layer_norm_eps"], "vision_config.layer_norm_eps"))
    if config.hidden_size % config.num_attention_heads:
        raise BadInput(
            f"vision_config.hidden_size {config.hidden_size} is not a multiple of its num_attention_heads "
            f"{config.num_attention_heads}"
        )
    side = math.isqrt(config.tokens_per_image)
    if config.image_size % config.patch_size or side**2 != config.tokens_per_image or config.patches_per_side % side:
        raise BadInput(
            f"an image of {config.image_size} pixels in patches of {config.patch_size} cannot be pooled to "
            f"mm_tokens_per_image {config.tokens_per_image}; expected a square number whose root divides the patches"
        )
    for name in ("image_token_id", "begin_image_token_id", "end_image_token_id"):
        if getattr(config, name) >= text.vocab_size:
            raise BadInput(f"{name} {getattr(config, name)} is outside the vocabulary of {text.vocab_size}")
    return config


def _refuse_unknown(data: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(data) - known - IGNORED - set(REQUIRED_VALUES))
    if unknown:
        raise BadInput(
            f"unknown key {', '.join(map(repr, unknown))}; it may change the network, so it is not ignored: "
            "remove it if it does not"
        )


def _layer_types(data: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    given = data.get("layer_types")
    if given is None:
        pattern = data.get("sliding_window_pattern", data.get("_sliding_window_pattern"))
        every = SLIDING_WINDOW_PATTERN if pattern is None else pattern
        if not isinstance(every, int) or every < 1:
            raise BadInput(f"sliding_window_pattern is {every!r}, expected a positive integer")
        return tuple(FULL if (index + 1) % every == 0 else SLIDING for index in range(layers))
    if not isinstance(given, list) or len(given) != layers:
        raise BadInput(f"layer_types has {len(given)} entries for num_hidden_layers {layers}")
    for kind in given:
        if kind not in (SLIDING, FULL):
            raise BadInput(f"layer_types holds {kind!r}, expected '{SLIDING}' or '{FULL}'")
    return tuple(given)


def _ropes(data: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The local and the global RoPE. In the old spelling, linear scaling applies to full-attention layers only."""
    nested = data.get("rope_parameters")
    if nested is None:
        theta = data.get("rope_theta")
        local_theta = data.get("rope_local_base_freq")
        return (
            Rope(_positive(ROPE_LOCAL_BASE_FREQ if local_theta is None else local_theta, "rope_local_base_freq")),
            _rope(data.get("rope_scaling") or {}, ROPE_THETA if theta is None else theta, "rope_scaling"),
        )
    if not isinstance(nested, Mapping) or set(nested) != {SLIDING, FULL}:
        raise BadInput(f"rope_parameters must hold '{SLIDING}' and '{FULL}', saw {nested!r}")
    return (
        _rope(
            nested[SLIDING],
            data.get("rope_local_base_freq", ROPE_LOCAL_BASE_FREQ),
            f"rope_parameters.{SLIDING}",
        ),
        _rope(nested[FULL], data.get("rope_theta", ROPE_THETA), f"rope_parameters.{FULL}"),
    )


def _rope(data: Mapping[str, Any], theta: Any, where: str) -> Rope:
    unknown = sorted(set(data) - {"rope_type", "type", "rope_theta", "factor"})
    kind = data.get("rope_type", data.get("type", "default"))
    if unknown or kind not in ROPE_TYPES:
        raise BadInput(
            f"{where} is {dict(data)!r}; only rope_type 'default' and 'linear' with a factor are implemented"
        )
    factor = data.get("factor", 1.0) if kind == "linear" else 1.0
    return Rope(_positive(data.get("rope_theta", theta), f"{where}.rope_theta"), _positive(factor, f"{where}.factor"))


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"{key} is {value!r}, expected a positive integer")
    return value


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise BadInput(f"{key} is {value!r}, expected a positive number")
    return float(value)


def _token_id(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadInput(f"{key} is {value!r}, expected a token id")
    return value
