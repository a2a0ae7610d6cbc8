"""The names of weights, as the released checkpoints spell them. No other file spells them out."""

from gemma3.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAYERS = "model.layers"
FINAL_NORM = "model.norm.weight"
VISION_TOWER = "vision_tower.vision_model"
PROJECTOR = "multi_modal_projector"


def head_of(config: ModelConfig) -> str:
    """The name of the weight that the language model head multiplies with: a tied head uses the embedding table."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def layer(index: int) -> str:
    """The prefix of the weights of the text layer ``index``, without a dot at its end."""
    return f"{LAYERS}.{index}"


def vision_layer(index: int) -> str:
    """The prefix of the weights of the vision model's layer ``index``, without a dot at its end."""
    return f"{VISION_TOWER}.encoder.layers.{index}"
