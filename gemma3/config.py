"""The shape of a Gemma 3 model, read from Hugging Face's ``config.json`` as transformers reads it.

Two spellings are read: that of the released files (``rope_theta``, ``rope_local_base_freq``, ``rope_scaling``,
``sliding_window_pattern``) and the newer, nested one (``rope_parameters``, ``layer_types``). In a text-only file
(``model_type`` ``gemma3_text``) the keys are at the top; in a ``gemma3`` file they are under ``text_config``.

A key is read, or checked against the only value that this network implements, or it is one that transformers does not
read for Gemma 3 either: then it does no harm, and ``unread_keys`` names it. Where transformers reads a key in one
spelling and passes over it in another, a value that contradicts is refused.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from gemma3.errors import BadInput
from gemma3.host.files import read_json

log = logging.getLogger(__name__)

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
# Keys that may be null, which then means their default.
NULLABLE = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
# Any size is below this, and any number of layers below the other. A larger one is damage, and would take all memory.
MAX_SIZE, MAX_LAYERS = 2**31, 10_000

# Keys that would change the arithmetic, or which weights are read: any value but these is refused.
REQUIRED_ANYWHERE: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "transformers_weights": (None,),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (False,),
    "decoder": (None,),
    "generator": (None,),
    "text_encoder": (None,),
}
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    **REQUIRED_ANYWHERE,
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True,),
    "partial_rotary_factor": (1, None),
    "kv_sharing_modes": (None,),
    "num_kv_shared_layers": (0, None),
    "text_config": (None,),
    "vision_config": (None,),
}
# What to do about some of them.
ADVICE = {
    "quantization_config": "its weights were quantized by another tool; give the full-precision checkpoint",
    "compression_config": "its weights were compressed by another tool; give the full-precision checkpoint",
    "text_config": "in a 'gemma3_text' file it is not read; is model_type 'gemma3' meant?",
    "vision_config": "in a 'gemma3_text' file it is not read; is model_type 'gemma3' meant?",
}

# Keys that do not change what the network computes, and that transformers writes itself or reads for other purposes.
IGNORED = frozenset(
    {
        # provenance and storage
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path"),
        # training, and how transformers runs and returns things
        *("attention_dropout", "initializer_range", "use_cache", "cache_implementation", "return_dict"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "_sliding_window_pattern"),
        *("problem_type", "id2label", "label2id", "_attn_implementation", "_attn_implementation_autoset"),
    }
)
ROPE_KEYS = frozenset({"rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"})
TEXT_KEYS = frozenset({"model_type", "layer_types", "sliding_window_pattern", *DEFAULTS, *ROPE_KEYS, *REQUIRED_VALUES})
# What transformers reads of one layer kind's RoPE.
ROPE_PARAMETERS = frozenset({"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"})
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
    **REQUIRED_ANYWHERE,
    "model_type": ("siglip_vision_model",),
    "num_channels": (3,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "vision_use_head": (False,),
}
# Keys beside ``text_config`` that belong to the vision model: our name → its spellings, transformers' default. If a
# file has both spellings, transformers takes the first one here.
IMAGE_TOKENS: dict[str, tuple[tuple[str, ...], int]] = {
    "tokens_per_image": (("mm_tokens_per_image",), 256),
    "image_token_id": (("image_token_id", "image_token_index"), 262_144),
    "begin_image_token_id": (("boi_token_id", "boi_token_index"), 255_999),
    "end_image_token_id": (("eoi_token_id", "eoi_token_index"), 256_000),
}
OUTER_KEYS = frozenset(
    {
        *(key for keys, _ in IMAGE_TOKENS.values() for key in keys),
        *("model_type", "text_config", "vision_config", "tie_word_embeddings", *NULLABLE, *REQUIRED_ANYWHERE),
    }
)
VISION_KEYS = frozenset({*VISION_DEFAULTS, *VISION_REQUIRED_VALUES})
ROPE_TYPES = ("default", "linear")


def read_config(path: Path) -> ModelConfig:
    """Read the ``config.json`` at ``path``, and log one line that names the keys which Gemma 3 does not read.

    Raises BadInput when it is missing, unreadable or not that of a Gemma 3.
    """
    data = read_json(path, "give a Hugging Face checkpoint directory")
    try:
        if not isinstance(data, dict):
            raise BadInput(f"holds a JSON {type(data).__name__}, expected an object")
        config, unread = parse_config(data), unread_keys(data)
    except (BadInput, RecursionError) as error:
        raise BadInput(f"{path}: {error}") from None
    if unread:
        _report_unread(str(path), tuple(unread))
    return config


@cache  # one line, however often a command opens the checkpoint
def _report_unread(path: str, keys: tuple[str, ...]) -> None:
    shown = [ascii(key)[1:-1][:NAME_SHOWN] for key in keys[:KEYS_SHOWN]]
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    log.info("%s: keys that Gemma 3 does not read: %s%s", path, ", ".join(shown), more)


KEYS_SHOWN, NAME_SHOWN = 12, 60


def parse_config(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a parsed ``config.json``, with ``vision`` if the file has a ``vision_config``.

    Raises BadInput naming the key that is missing or has a value that cannot be used.
    """
    model_type = data.get("model_type")
    if model_type == "gemma3":
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise BadInput("model_type 'gemma3' without a text_config; the file is incomplete")
        _check_required(data, REQUIRED_ANYWHERE)
        # Where the outer level gives token ids, transformers generates with those. Whether the head is tied is decided
        # there too. Where it is silent, transformers loads a stored head even so, and the inner level says if there is
        # one.
        outer = {key: data[key] for key in NULLABLE if data.get(key) is not None}
        _flag(text, "tie_word_embeddings", default=True)
        tied = data.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        config = _parse_text({**text, **outer, "tie_word_embeddings": False if tied is None else tied})
        return config if data.get("vision_config") is None else replace(config, vision=_parse_vision(data, config))
    if model_type != "gemma3_text":
        raise BadInput(
            f"model_type is {_shown(model_type)}; only Gemma 3 checkpoints ('gemma3_text' or 'gemma3') can be used"
        )
    return _parse_text(data)


def unread_keys(data: Mapping[str, Any]) -> list[str]:
    """The keys in a ``config.json`` that neither transformers nor this program reads for Gemma 3.

    Left out are keys that transformers writes into every file. ``data`` must be one that ``parse_config`` accepts.
    """
    if data["model_type"] == "gemma3_text":
        return _unread_text(data, "")
    found = sorted(data.keys() - OUTER_KEYS - IGNORED)
    found += _unread_text(data["text_config"], "text_config.")
    vision = data.get("vision_config") or {}
    return found + [f"vision_config.{key}" for key in sorted(vision.keys() - VISION_KEYS - IGNORED)]


def _unread_text(text: Mapping[str, Any], place: str) -> list[str]:
    found = sorted(text.keys() - TEXT_KEYS - IGNORED)
    if text.get("layer_types") is not None and "sliding_window_pattern" in text:
        found.append("sliding_window_pattern")
    nested = text.get("rope_parameters") or {}
    for kind, key in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        own = nested.get(kind) or {}
        found += [key] if key in text and own.get("rope_theta", text[key]) != text[key] else []
        found += [f"rope_parameters.{kind}.{name}" for name in sorted(own.keys() - ROPE_PARAMETERS)]
    found += [f"rope_parameters.{name}" for name in sorted(nested.keys() - {SLIDING, FULL})]
    scaling = text.get("rope_scaling") or {}
    found += [f"rope_scaling.{name}" for name in sorted(scaling.keys() - ROPE_PARAMETERS)]
    return [place + key for key in found]


def _parse_text(data: Mapping[str, Any]) -> ModelConfig:
    if data.get("model_type", "gemma3_text") != "gemma3_text":
        raise BadInput(f"text_config.model_type is {_shown(data['model_type'])}, expected 'gemma3_text'")
    _check_required(data, REQUIRED_VALUES)
    values = _values(data, DEFAULTS)
    layer_types = _layer_types(data, _count(values, "num_hidden_layers"))
    local_rope, global_rope = _ropes(data)
    eos = values["eos_token_id"]
    positions = _count(values, "max_position_embeddings")
    config = ModelConfig(
        vocab_size=_count(values, "vocab_size"),
        hidden_size=_count(values, "hidden_size"),
        intermediate_size=_count(values, "intermediate_size"),
        num_attention_heads=_count(values, "num_attention_heads"),
        num_key_value_heads=_count(values, "num_key_value_heads"),
        head_dim=_count(values, "head_dim"),
        layer_types=layer_types,
        # A window over all positions sees all of them.
        sliding_window=min(_count(values, "sliding_window"), positions),
        max_position_embeddings=positions,
        query_pre_attn_scalar=_positive(values["query_pre_attn_scalar"], "query_pre_attn_scalar"),
        rms_norm_eps=_positive(values["rms_norm_eps"], "rms_norm_eps"),
        local_rope=local_rope,
        global_rope=global_rope,
        tie_word_embeddings=_flag(data, "tie_word_embeddings", default=True),
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
        raise BadInput(f"vision_config is {_shown(encoder)}, expected an object")
    _check_required(encoder, VISION_REQUIRED_VALUES, "vision_config.")
    values = _values(encoder, VISION_DEFAULTS, "vision_config.")
    for field, (keys, default) in IMAGE_TOKENS.items():
        values[field] = next((data[key] for key in keys if key in data), default)
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


def _values(data: Mapping[str, Any], defaults: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The values of the keys of ``defaults``. transformers refuses null too."""
    for key in defaults:
        if key not in NULLABLE and data.get(key, defaults[key]) is None:
            raise BadInput(f"{place}{key} is null; remove the key, or give it a value")
    return {key: default if data.get(key) is None else data[key] for key, default in defaults.items()}


def _check_required(data: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]], place: str = "") -> None:
    for key, allowed in required.items():
        # Compared with their types, because in Python 0 equals False.
        if key in data and not any(data[key] == one and type(data[key]) in _types(one) for one in allowed):
            advice = ADVICE.get(key, f"Gemma 3 has {allowed[0]!r} and nothing else is implemented")
            raise BadInput(f"{place}{key} is {_shown(data[key])}; {advice}")


def _types(value: Any) -> tuple[type, ...]:
    return (int, float) if type(value) is int else (type(value),)


def _layer_types(data: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    if layers > MAX_LAYERS:
        raise BadInput(f"num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
    given = data.get("layer_types")
    if given is None:
        every = data.get("sliding_window_pattern", SLIDING_WINDOW_PATTERN)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise BadInput(f"sliding_window_pattern is {_shown(every)}, expected a positive integer")
        saved = data.get("_sliding_window_pattern", every)
        if saved != every:
            raise BadInput(
                f"_sliding_window_pattern is {_shown(saved)}, but only sliding_window_pattern is read, and is {every}; "
                "write layer_types"
            )
        return tuple(FULL if (index + 1) % every == 0 else SLIDING for index in range(layers))
    if not isinstance(given, list):
        raise BadInput(f"layer_types is {_shown(given)}, expected a list")
    if len(given) != layers:
        raise BadInput(f"layer_types has {len(given)} entries for num_hidden_layers {layers}")
    kinds: list[LayerKind] = []
    for kind in given:
        kind = FULL if kind == "attention" else kind  # its former name in transformers
        if kind not in (SLIDING, FULL):
            raise BadInput(f"layer_types holds {_shown(kind)}, expected '{SLIDING}' or '{FULL}'")
        kinds.append(kind)
    return tuple(kinds)


def _ropes(data: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The local and the global RoPE, merged as ``Gemma3TextConfig.convert_rope_params_to_dict`` does.

    What is nested under a layer kind counts first, then the keys of the old spelling, then the defaults.
    ``rope_scaling`` applies to full-attention layers only.
    """
    nested, scaling = data.get("rope_parameters"), data.get("rope_scaling")
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, Mapping):
            raise BadInput(f"{name} is {_shown(value)}, expected an object")
    own: dict[LayerKind, dict[str, Any]] = {}
    for kind in (SLIDING, FULL):
        given = {} if nested is None else nested.get(kind)
        if given is not None and not isinstance(given, Mapping):
            raise BadInput(f"rope_parameters.{kind} is {_shown(given)}, expected an object")
        own[kind] = dict(given or {})
    if nested is not None and (flat := sorted(ROPE_PARAMETERS & nested.keys())):
        raise BadInput(
            f"rope_parameters holds {flat[0]!r} itself; Gemma 3 reads it only under '{SLIDING}' and '{FULL}': "
            f"rope_parameters must hold these two"
        )
    where = f"rope_parameters.{FULL}"
    if scaling is not None:
        where = "rope_scaling"
        if nested is not None and not nested.get(FULL):
            raise BadInput(f"rope_scaling stands beside rope_parameters without '{FULL}'; leave one of them out")
        # Without rope_parameters, transformers starts from rope_type "default": the older key "type" changes nothing.
        own[FULL] = {**({"rope_type": "default"} if nested is None else own[FULL]), **scaling}
    return (
        _rope(own[SLIDING], data.get("rope_local_base_freq", ROPE_LOCAL_BASE_FREQ), f"rope_parameters.{SLIDING}"),
        _rope(own[FULL], data.get("rope_theta", ROPE_THETA), where),
    )


def _rope(data: Mapping[str, Any], theta: Any, where: str) -> Rope:
    kind = data.get("rope_type", data.get("type", "default"))
    if data.get("type", kind) != kind:
        raise BadInput(
            f"{where} has rope_type {_shown(kind)} and type {_shown(data['type'])}, of which only rope_type is read; "
            "write rope_type alone"
        )
    if not isinstance(kind, str) or kind not in ROPE_TYPES or data.get("partial_rotary_factor", 1) not in (1, None):
        raise BadInput(
            f"{where} is {_shown(dict(data))}; only rope_type 'default' and 'linear' with a factor are implemented"
        )
    if kind == "linear" and "factor" not in data:
        raise BadInput(f"{where} is linear without a factor; give it one")
    factor = data["factor"] if kind == "linear" else 1.0
    return Rope(_positive(data.get("rope_theta", theta), f"{where}.rope_theta"), _positive(factor, f"{where}.factor"))


def _flag(data: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise BadInput(f"{key} is {_shown(value)}, expected true or false")
    return value


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
        raise BadInput(f"{key} is {_shown(value)}, expected a positive integer below {MAX_SIZE}")
    return value


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**127:
        raise BadInput(f"{key} is {_shown(value)}, expected a positive number")
    return float(value)


def _token_id(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_SIZE:
        raise BadInput(f"{key} is {_shown(value)}, expected a token id")
    return value


def _shown(value: Any) -> str:
    """The value for a message, which is one short line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
