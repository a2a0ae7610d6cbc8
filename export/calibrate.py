"""Post-training quantization of a checkpoint: the method's name, and text where it needs some."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gemma3.checkpoint import Checkpoint, load_model
from gemma3.data import pack
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from quant.gptq import gptq
from quant.hqq import hqq
from quant.recipe import Method, QuantizedWeights, Recipe, quantize, rtn

PostTraining = Literal["rtn", "gptq", "hqq"]

ROW_TOKENS = 512
ROWS_AT_ONCE = 4


def quantize_checkpoint(
    checkpoint: Checkpoint, recipe: Recipe, method: PostTraining, data: Sequence[Path], tokens: int
) -> QuantizedWeights:
    """``checkpoint`` in ``recipe`` by ``method``; gptq looks at the first ``tokens`` tokens of ``data``.

    Raises BadInput when ``data`` is missing, not wanted or cannot be used, RecipeError when the recipe does not fit.
    """
    if (method == "gptq") != bool(data):
        raise BadInput(f"method {method} {'needs' if method == 'gptq' else 'does not look at'} text (--data)")
    chosen: Method = hqq if method == "hqq" else rtn
    if method == "gptq":
        for name in checkpoint.names:  # before minutes of work
            recipe.rule(name)
        model = load_model(checkpoint)
        layers = [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
        chosen = gptq(layers, model.hidden, calibration_rows(checkpoint, data, tokens), recipe)
    return quantize(checkpoint.items(), recipe, chosen)


def calibration_rows(checkpoint: Checkpoint, data: Sequence[Path], tokens: int) -> list[Tensor]:
    """int64 [rows, length] each. Raises BadInput as ``gemma3.data.pack`` does."""
    config = checkpoint.config
    length = min(ROW_TOKENS, config.max_position_embeddings)
    packed = pack(data, Tokenizer(checkpoint.path), length, config)
    if any(packed.images):
        raise BadInput(f"{', '.join(map(str, data))}: has images; gptq looks at text alone, give some without")
    rows = torch.from_numpy(packed.tokens[: max(1, tokens // length)]).long()
    return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
