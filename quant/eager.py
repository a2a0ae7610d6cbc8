"""The quantized eager model, whole: for sessions over it, and for tests of the layer-by-layer one (quant/streamed.py).

Its weights are the dequantized codes. For runtimes that multiply in int8 (XNNPACK's 8da4w), the input of each linear
layer with integer weights is first rounded as the runtime rounds it. Weights are dequantized, or widened to float64,
when they are used, a few rows at a time, so that a model with a vocabulary of 262 144 fits in memory.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3.checkpoint import check_shapes, empty_model, fill
from gemma3.config import ModelConfig
from gemma3.model import Gemma3
from gemma3.names import EMBEDDING
from quant.activations import Round, Rounding, keep_float
from quant.integers import ROWS_AT_ONCE, IntegerWeight
from quant.weights import QuantizedWeights


def quantized_model(
    config: ModelConfig,
    weights: QuantizedWeights,
    rounding: Rounding = keep_float,
    dtype: torch.dtype = torch.float32,
) -> Gemma3:
    """The eager model of ``config`` with exactly ``weights``, in eval mode, without gradients, computing in ``dtype``.

    For ``rounding`` see ``with_integer_weights``. Keys and values are rounded as ``weights.kv`` says. In float64 every
    matrix is widened when it is used. Raises BadInput when a weight is missing, is not part of the model, or has
    another shape.
    """
    check_shapes(config, weights.shapes)
    model = empty_model(config)
    by_rows: dict[str, Matrix] = dict(weights.integers)
    floats = {
        name: weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
        for name, weight in weights.tensors.items()
        if not isinstance(weight, IntegerWeight)
    }
    if dtype != torch.float32:
        by_rows |= {name: floats.pop(name) for name in list(floats) if _is_matrix(model, name)}
    _compute_by_rows(model, by_rows, rounding, dtype)
    model.round_heads(weights.kv)
    return fill(model, {name: weight.to(dtype) for name, weight in floats.items()})


def with_integer_weights(
    model: nn.Module, integers: Mapping[str, IntegerWeight], rounding: Rounding = keep_float
) -> nn.Module:
    """Replace, in place, the linear layers and embeddings whose parameters ``integers`` names; returns ``model``.

    The new layers compute with the integers. Each of these linear layers first rounds its input as ``rounding`` says. A
    table that embedding and head share is one parameter: both use the integers, whichever of its two names is given.
    """
    _compute_by_rows(model, integers, rounding, torch.float32)
    return model


def _compute_by_rows(model: nn.Module, weights: "Mapping[str, Matrix]", rounding: Rounding, dtype: torch.dtype) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[Tensor, tuple[str, Matrix]] = {parameters[name]: (name, weight) for name, weight in weights.items()}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight in shared:
            name, weight = shared[module.weight]
            round = rounding(name, weight) if isinstance(weight, IntegerWeight) else None
            model.set_submodule(path, RowsLinear(weight, round, module.bias))
        elif isinstance(module, nn.Embedding) and module.weight in shared:
            model.set_submodule(path, RowsEmbedding(shared[module.weight][1], dtype))


def _is_matrix(model: nn.Module, name: str) -> bool:
    """Is the weight ``name`` that of a linear layer, or the embedding table?"""
    path, _, parameter = name.rpartition(".")
    return name == EMBEDDING or (parameter == "weight" and isinstance(model.get_submodule(path), nn.Linear))


# A matrix [N, K] of which a few rows at a time are made floating point.
Matrix = IntegerWeight | Tensor


class RowsLinear(nn.Module):
    """A linear layer, x [..., K] → [..., N]. Takes ROWS_AT_ONCE rows of its weight [N, K] at a time, in x's dtype.

    ``round`` is what it does to its input first.
    """

    def __init__(self, weight: Matrix, round: Round | None = None, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.rows = weight
        self.bias = bias
        self._round = round

    def forward(self, x: Tensor) -> Tensor:
        if self._round is not None:
            x = self._round(x)
        count = len(self.rows.codes if isinstance(self.rows, IntegerWeight) else self.rows)
        parts = (rows_of(self.rows, slice(start, start + ROWS_AT_ONCE)) for start in range(0, count, ROWS_AT_ONCE))
        out = torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], dim=-1)
        return out if self.bias is None else out + self.bias


class RowsEmbedding(nn.Module):
    """An embedding, ids [...] → [..., E] in ``dtype``. Takes only the rows of its table [V, E] that are looked up."""

    def __init__(self, weight: Matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rows = weight
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return rows_of(self.rows, ids.flatten()).to(self._dtype).view(*ids.shape, -1)


def rows_of(weight: Matrix, index: slice | Tensor) -> Tensor:
    """Some rows of ``weight``: float32, or a float weight's own dtype."""
    if isinstance(weight, Tensor):
        return weight[index]
    return replace(weight, codes=weight.codes[index], scales=weight.scales[index]).dequantize()
