"""The quantized eager model: the reference that an exported file is compared with.

Its weights are the dequantized codes. For runtimes that multiply in int8 (XNNPACK's 8da4w), the input of each linear
layer with integer weights is first rounded as the runtime rounds it. Integer weights are dequantized when they are
used, a few rows at a time, so that the reference of a model with a vocabulary of 262 144 fits in memory.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3.checkpoint import check_shapes, empty_model, fill
from gemma3.config import ModelConfig
from gemma3.model import Gemma3
from quant.activations import fake_quantize_per_token
from quant.integers import ROWS_AT_ONCE, IntegerWeight
from quant.recipe import Activations
from quant.weights import QuantizedWeights


def quantized_model(config: ModelConfig, weights: QuantizedWeights, activations: Activations) -> Gemma3:
    """The float32 eager model of ``config`` with exactly ``weights``, in eval mode, without gradients.

    For ``activations`` see ``with_integer_weights``. Raises BadInput when a weight is missing, is not part of the
    model, or has another shape.
    """
    check_shapes(config, weights.shapes)
    model = empty_model(config)
    with_integer_weights(model, weights.integers, activations)
    return fill(
        model,
        {
            name: (weight if isinstance(weight, Tensor) else weight.dequantize()).float()
            for name, weight in weights.tensors.items()
            if not isinstance(weight, IntegerWeight)
        },
    )


def with_integer_weights(
    model: nn.Module, integers: Mapping[str, IntegerWeight], activations: Activations
) -> nn.Module:
    """Replace, in place, the linear layers and embeddings whose parameters ``integers`` names; returns ``model``.

    The new layers compute with the integers. With ``activations`` "int8", each of these linear layers first rounds its
    input. A table that embedding and head share is one parameter: both use the integers, whichever of its two names is
    given.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[Tensor, IntegerWeight] = {parameters[name]: weight for name, weight in integers.items()}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight in shared:
            model.set_submodule(path, IntegerLinear(shared[module.weight], activations, module.bias))
        elif isinstance(module, nn.Embedding) and module.weight in shared:
            model.set_submodule(path, IntegerEmbedding(shared[module.weight]))
    return model


class IntegerLinear(nn.Module):
    """A linear layer, x [..., K] → [..., N]. Its integer weight [N, K] is dequantized ROWS_AT_ONCE rows at a time."""

    def __init__(self, weight: IntegerWeight, activations: Activations, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.integers = weight
        self.bias = bias
        self._activations = activations

    def forward(self, x: Tensor) -> Tensor:
        if self._activations == "int8":
            x = fake_quantize_per_token(x)
        rows = range(0, len(self.integers.codes), ROWS_AT_ONCE)
        parts = (_rows(self.integers, slice(start, start + ROWS_AT_ONCE)) for start in rows)
        out = torch.cat([F.linear(x, part.dequantize()) for part in parts], dim=-1)
        return out if self.bias is None else out + self.bias


class IntegerEmbedding(nn.Module):
    """An embedding, ids [...] → float32 [..., E]. Dequantizes only the rows of its table [V, E] that are looked up."""

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.integers = weight

    def forward(self, ids: Tensor) -> Tensor:
        return _rows(self.integers, ids.flatten()).dequantize().view(*ids.shape, -1)


def _rows(weight: IntegerWeight, index: slice | Tensor) -> IntegerWeight:
    return replace(weight, codes=weight.codes[index], scales=weight.scales[index])
