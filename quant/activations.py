"""The quantized eager model: the reference that an exported file is compared with.

Weights are the integers' values; for runtimes that multiply in int8 (XNNPACK's 8da4w), each quantized linear's input
is first rounded the way the runtime rounds it. Weights are dequantized when they are used, by rows: the reference of
a model with a vocabulary of 262 144 then fits beside it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.integers import ROWS_AT_ONCE, IntegerWeight

Activations = Literal["float", "int8"]


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """x [..., features] rounded to int8 per token (the last axis), asymmetric, and back to x's dtype.

    The step is (max − min) / 255 over a range that includes 0; the zero point is nudged onto an integer on the
    side with the smaller error. The order of the operations is XNNPACK's (xnn_f32_qd8_asymmetric_quantization_params
    and its f32-to-qd8 conversion), so that equal float32 inputs give equal codes and equal values: tested bit for bit
    in tests/export. torchao's choose_qparams_per_token_asymmetric computes the step first and inverts it, which rounds
    about one value in a million to the other neighbour.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    # A token of (all but) zeros rounds to zeros; below 7.5e-37 the multiplier would overflow.
    span = torch.where(high - low < 1e-30, 255.0, high - low)
    # Not ``255.0 / span``: torch computes that as 255 · (1 / span), which rounds twice.
    multiplier = torch.full_like(span, 255.0) / span
    low_code, high_code = low * multiplier, high * multiplier
    zero_point = torch.where(-128 + low_code + 127 + high_code > 0, -128 - low_code, 127 - high_code)
    zero_point = zero_point.clamp(-128, 127).round()
    codes = ((x * multiplier).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * (1.0 / multiplier)


def with_integer_weights(
    model: nn.Module, integers: Mapping[str, IntegerWeight], activations: Activations
) -> nn.Module:
    """Let the linears and embeddings whose parameters ``integers`` names compute with those, and return ``model``.

    With ``activations`` "int8" every such linear rounds its input first. A table shared by embedding and head is
    one parameter: whichever name it is given by, both use the integers.
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
    """x [..., K] → [..., N] with a weight [N, K] that is never whole in float32, only some rows at a time."""

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
    """Rows of a table [V, E]: ids [...] → float32 [..., E]."""

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.integers = weight

    def forward(self, ids: Tensor) -> Tensor:
        return _rows(self.integers, ids.flatten()).dequantize().view(*ids.shape, -1)


def _rows(weight: IntegerWeight, index: slice | Tensor) -> IntegerWeight:
    return replace(weight, codes=weight.codes[index], scales=weight.scales[index])
