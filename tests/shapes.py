"""Tiny random models that the tests share: every kind of shape that a Gemma 3 config.json can describe."""

from typing import Any

import torch

from gemma3.config import FULL, SLIDING, ModelConfig, parse_config
from gemma3.model import Gemma3

# With the keys of the released files.
RELEASED: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "like-270m": RELEASED,
    "like-1b": RELEASED | {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 8},
    "like-4b": RELEASED
    | {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    # As in 27B, the attention scale does not follow from head_dim.
    "like-27b": RELEASED
    | {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 21,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "untied": RELEASED | {"tie_word_embeddings": False, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    "all-local": RELEASED | {"num_hidden_layers": 2, "layer_types": [SLIDING, SLIDING]},
    "all-global": RELEASED | {"num_hidden_layers": 2, "layer_types": [FULL, FULL]},
    "global-first": RELEASED
    | {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 5, "head_dim": 64},
    "window-of-one": RELEASED | {"num_hidden_layers": 3, "sliding_window_pattern": 3, "sliding_window": 1},
    # All layers see everything: their caches hold the context.
    "window-over-positions": RELEASED | {"num_hidden_layers": 2, "sliding_window_pattern": 2, "sliding_window": 4096},
    "other-ropes": RELEASED
    | {"num_hidden_layers": 4, "sliding_window_pattern": 2, "rope_theta": 5_000.0, "rope_local_base_freq": 300.0},
}


# Multimodal models, with the keys of the released files. Soft tokens per image: 4, 16 (over the window of 8), 9.
VISION_SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "gemma3",
        "text_config": SHAPES[text],
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "image_size": size,
            "patch_size": patch,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": tokens,
        "boi_token_index": 151,
        "eoi_token_index": 152,
        "image_token_index": 153,
    }
    for name, text, width, intermediate, heads, size, patch, tokens in [
        ("like-4b", "like-4b", 24, 40, 2, 28, 7, 4),
        ("image-over-window", "like-270m", 32, 48, 4, 56, 7, 16),
        ("unpooled", "global-first", 16, 24, 2, 12, 4, 9),
    ]
}


def tiny_vision_config(shape: str = "like-4b") -> ModelConfig:
    return parse_config(VISION_SHAPES[shape])


def tiny_config(shape: str = "like-270m", **changes: Any) -> ModelConfig:
    return parse_config(SHAPES[shape] | changes)


def random_model(config: ModelConfig, seed: int = 0) -> Gemma3:
    """Random weights with which every part matters: norms differ from 1, and attention is not uniform."""
    torch.manual_seed(seed)
    model = Gemma3(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3 if "norm" in name else 2.0 * parameter.shape[-1] ** -0.5)
        if name.startswith("vision_tower") and "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)  # a LayerNorm's weight, which is not an offset from 1
    model.model.embed_tokens.weight.normal_(0, config.hidden_size**-0.5)
    return model


def random_pixels(config: ModelConfig, images: int, seed: int = 2) -> torch.Tensor:
    """float32 [images, 3, size, size] in 0 … 1."""
    assert config.vision is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, 3, config.vision.image_size, config.vision.image_size, generator=generator)


def with_images(config: ModelConfig, pieces: list[int | None], seed: int = 1) -> list[int]:
    """Ids: a number stands for that many random text tokens, None for an image between its markers."""
    vision = config.vision
    assert vision is not None
    special = {vision.begin_image_token_id, vision.end_image_token_id, vision.image_token_id}
    image = [
        vision.begin_image_token_id,
        *[vision.image_token_id] * vision.tokens_per_image,
        vision.end_image_token_id,
    ]
    ids: list[int] = []
    for index, count in enumerate(pieces):
        text = random_tokens(config, count or 0, seed + index)
        ids += image if count is None else [4 if token in special else token for token in text]
    return ids


def random_tokens(config: ModelConfig, length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
