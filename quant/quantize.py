"""Post-training quantization of a checkpoint by a named method; GPTQ is calibrated on text."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gemma3 import names
from gemma3.checkpoint import Checkpoint, load_model
from gemma3.data import pack
from gemma3.errors import BadInput
from quant.gptq import gptq
from quant.methods import IntegerMethod, mse, quantize_weights, round_on_demand, rtn
from quant.recipe import DEFAULT, Recipe
from quant.source import QuantizedCheckpoint, Source

log = logging.getLogger(__name__)

# The methods that see nothing but the weight. A bundle's integers can be made again by them from the checkpoint.
OF_WEIGHTS_ALONE: dict[str, IntegerMethod] = {"mse": mse, "rtn": rtn}
METHODS = (*OF_WEIGHTS_ALONE, "gptq")

CALIBRATION_TOKENS = 65_536
ROW_TOKENS = 512
ROWS_AT_ONCE = 4


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    method: str = "mse",
    *,
    data: Sequence[Path] = (),
    tokens: int = CALIBRATION_TOKENS,
) -> QuantizedCheckpoint:
    """``checkpoint`` quantized by ``recipe``. ``method``, one of METHODS, chooses the integers.

    They are rounded to nearest, under the scales of least squared error or under absmax scales, and then made again
    from the checkpoint whenever one is used; or they are GPTQ's, and stay in memory. GPTQ is calibrated on the first
    ``tokens`` tokens of the files ``data``: text, or rows (docs/quantization.md) without images. Raises BadInput for an
    unknown method, for GPTQ without ``data`` or another method with it, for data that cannot be used, and when the
    recipe or the tokenizer does not fit the checkpoint.
    """
    if method not in METHODS:
        raise BadInput(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if method == "gptq" and not data:
        raise BadInput("method gptq needs text; give files with --data")
    if method != "gptq" and data:
        raise BadInput(f"method {method} takes no data; leave out --data")
    checkpoint.tokenizer  # noqa: B018 (raises for one that no bundle can have, before minutes of work)
    log.info("quantizing %d weights: %s", len(checkpoint.names), recipe.name)
    if method in OF_WEIGHTS_ALONE:
        weights = round_on_demand(checkpoint.names, checkpoint.tensor, recipe, OF_WEIGHTS_ALONE[method])
    else:
        for name in checkpoint.names:  # raises for a weight without a rule, before minutes of work
            recipe.rule(name)
        rows = calibration_rows(checkpoint, data, tokens)
        model = load_model(checkpoint)
        layers = [(names.layer(index), layer) for index, layer in enumerate(model.model.layers)]
        chosen = gptq(layers, model.hidden, rows, recipe)
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


def in_recipe(source: Source, recipe: Recipe | None = None, method: str = "mse") -> QuantizedCheckpoint:
    """A full-precision checkpoint quantized by ``recipe`` (None: the default) and ``method``; a quantized one as it is.

    What ``recipe`` says about activations holds for a quantized checkpoint too. Raises BadInput when that was quantized
    by other schemes than those of ``recipe``, and what ``quantize`` raises.
    """
    if not isinstance(source, QuantizedCheckpoint):
        return quantize(source, recipe or DEFAULT, method)
    if recipe is not None and recipe.schemes != source.recipe.schemes:
        raise BadInput(
            f"{source.path}: is quantized as {source.recipe.name} already, not {recipe.name}; leave the scheme out, "
            "or give the checkpoint it was made of"
        )
    log.info(
        "%d weights are quantized already: %s by %s", len(source.weights.tensors), source.recipe.name, source.method
    )
    return source if recipe is None else replace(source, recipe=recipe)
