"""Post-training quantization of a checkpoint by a named method; GPTQ is calibrated on text."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from gemma3 import names
from gemma3.checkpoint import Checkpoint, load_model
from gemma3.data import pack
from gemma3.errors import BadInput
from quant.gptq import gptq
from quant.hqq import hqq
from quant.methods import IntegerMethod, quantize_weights, round_on_demand, rtn
from quant.recipe import DEFAULT, Recipe
from quant.source import QuantizedCheckpoint, Source

log = logging.getLogger(__name__)

PostTraining = Literal["rtn", "gptq", "hqq"]

CALIBRATION_TOKENS = 65_536
ROW_TOKENS = 512
ROWS_AT_ONCE = 4


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    method: PostTraining = "rtn",
    *,
    data: Sequence[Path] = (),
    tokens: int = CALIBRATION_TOKENS,
) -> QuantizedCheckpoint:
    """``checkpoint`` quantized by ``recipe``. ``method`` chooses the integers: round to nearest, GPTQ or HQQ.

    Integers rounded to nearest are made again from the checkpoint whenever one is used; the others stay in memory.
    GPTQ is calibrated on the first ``tokens`` tokens of the files ``data``: text, or rows (docs/quantization.md)
    without images. Raises BadInput for an unknown method, for GPTQ without ``data`` or another method with it, for data
    that cannot be used, and when the recipe or the tokenizer does not fit the checkpoint.
    """
    if method not in get_args(PostTraining):
        raise BadInput(f"method {method!r} is unknown; use one of {', '.join(get_args(PostTraining))}")
    if method == "gptq" and not data:
        raise BadInput("method gptq needs text; give files with --data")
    if method != "gptq" and data:
        raise BadInput(f"method {method} takes no data; leave out --data")
    checkpoint.tokenizer  # noqa: B018 (raises for one that no bundle can have, before minutes of work)
    log.info("quantizing %d weights: %s", len(checkpoint.names), recipe.name)
    chosen: IntegerMethod = hqq if method == "hqq" else rtn
    if method == "gptq":
        for name in checkpoint.names:  # raises for a weight without a rule, before minutes of work
            recipe.rule(name)
        model = load_model(checkpoint)
        layers = [(names.layer(index), layer) for index, layer in enumerate(model.model.layers)]
        chosen = gptq(layers, model.hidden, calibration_rows(checkpoint, data, tokens), recipe)
    if method == "rtn":
        weights = round_on_demand(checkpoint.names, checkpoint.tensor, recipe)
    else:
        weights = quantize_weights(checkpoint.items(), recipe, chosen)
    return QuantizedCheckpoint(checkpoint.path, checkpoint.config, checkpoint.companions, weights, recipe, method)


def calibration_rows(checkpoint: Checkpoint, data: Sequence[Path], tokens: int) -> list[Tensor]:
    """About ``tokens`` token ids in batches of rows, int64 [rows, length].

    Raises BadInput for data with images, and as ``gemma3.data.pack`` does.
    """
    config = checkpoint.config
    length = min(ROW_TOKENS, config.max_position_embeddings)
    packed = pack(data, checkpoint.tokenizer, length, config, chat=checkpoint.chat)
    if any(packed.images):
        raise BadInput(f"{', '.join(map(str, data))}: has images, but gptq uses text only; give files without images")
    rows = torch.from_numpy(packed.tokens[: max(1, tokens // length)]).long()
    return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]


def in_recipe(source: Source, recipe: Recipe | None = None) -> QuantizedCheckpoint:
    """A full-precision checkpoint rounded to nearest in ``recipe`` (None: the default); a quantized one as it is.

    What ``recipe`` says about activations holds for a quantized checkpoint too. Raises BadInput when that was quantized
    by other schemes than those of ``recipe``, and what ``quantize`` raises.
    """
    if not isinstance(source, QuantizedCheckpoint):
        return quantize(source, recipe or DEFAULT)
    if recipe is not None and recipe.schemes != source.recipe.schemes:
        raise BadInput(
            f"{source.path}: is quantized as {source.recipe.name} already, not {recipe.name}; leave the scheme out, "
            "or give the checkpoint it was made of"
        )
    log.info(
        "%d weights are quantized already: %s by %s", len(source.weights.tensors), source.recipe.name, source.method
    )
    return source if recipe is None else replace(source, recipe=recipe)
