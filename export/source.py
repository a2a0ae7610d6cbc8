"""What a bundle is exported from: a float checkpoint that is quantized on the way, or one that already is."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gemma3.checkpoint import check_shapes, open_checkpoint
from gemma3.config import ModelConfig, read_config
from gemma3.errors import BadInput
from quant.recipe import QuantizedWeights, Recipe, preset, quantize
from quant.stored import CONFIG, is_quantized, load_quantized

log = logging.getLogger(__name__)

DEFAULT_SCHEME = "int4-block32"


@dataclass(frozen=True)
class Source:
    """Weights in the form that ships, how they came to it, and the directory they came from."""

    path: Path
    config: ModelConfig
    weights: QuantizedWeights
    recipe: Recipe
    method: str


def open_source(path: Path, recipe: Recipe | None = None) -> Source:
    """A float checkpoint in ``recipe`` (int4-block32 if None), rounded to nearest; or a quantized one as it is.

    Raises BadInput when a quantized one is of another recipe than the one asked for or does not belong to its
    config.json, and what ``open_checkpoint``, ``quantize`` and ``load_quantized`` raise.
    """
    if not is_quantized(path):
        checkpoint = open_checkpoint(path)
        recipe = recipe or preset(DEFAULT_SCHEME)
        log.info("quantizing %d weights: %s", len(checkpoint.names), recipe.name)
        return Source(path, checkpoint.config, quantize(checkpoint.items(), recipe), recipe, "rtn")
    stored = load_quantized(path)
    if recipe is not None and recipe.rules != stored.recipe.rules:
        raise BadInput(
            f"{path}: is quantized as {stored.recipe.name} already, not {recipe.name}; leave the scheme out, or give "
            "the checkpoint it was made of"
        )
    config = read_config(path / CONFIG)
    try:
        check_shapes(config, stored.weights.shapes)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    log.info(
        "%d weights are quantized already: %s by %s", len(stored.weights.tensors), stored.recipe.name, stored.method
    )
    return Source(path, config, stored.weights, stored.recipe, stored.method)
