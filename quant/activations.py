"""The quantized eager model: the reference that an exported file is compared with.

Weights become their dequantized values in place; for runtimes that multiply in int8 (XNNPACK's 8da4w), each
quantized linear's input is first rounded the way the runtime rounds it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
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
    """Put the dequantized ``integers`` (by parameter name) into ``model``, and return it.

    With ``activations`` "int8" every linear whose weight is in ``integers`` rounds its input first. A table
    shared by embedding and head is one parameter: whichever name it is given by, both see it.
    """
    shared: dict[Tensor, IntegerWeight] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in integers.items():
            # By rows, so that a table of 262 144 is not in float32 twice.
            for start in range(0, len(weight.codes), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                rows = replace(weight, codes=weight.codes[part], scales=weight.scales[part])
                parameters[name][part] = rows.dequantize()
            shared[parameters[name]] = weight
    if activations == "int8":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight in shared:
                module.register_forward_pre_hook(_round_input)
    return model


def _round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize_per_token(inputs[0]), *inputs[1:])
