"""The quantized eager model: the reference that an exported file is compared with.

Weights become their dequantized values in place; for runtimes that multiply in int8 (XNNPACK's 8da4w), each
quantized linear's input is first rounded the way the runtime rounds it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quant.integers import IntegerWeight

Activations = Literal["float", "int8"]


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """x [..., features] rounded to int8 per token (the last axis), asymmetric, and back to x's dtype.

    scale = (max − min) / 255 over a range that includes 0; the zero point is nudged onto an integer on the side
    with the smaller error. Source: torchao's choose_qparams_per_token_asymmetric and XNNPACK's
    xnn_f32_qd8_asymmetric_quantization_params, which agree.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
    low_code, high_code = low / scale, high / scale
    zero_point = torch.where(-128 + low_code + 127 + high_code > 0, -128 - low_code, 127 - high_code)
    zero_point = zero_point.clamp(-128, 127).round()
    # Multiplying by the reciprocal, as both sources do: dividing rounds some values the other way.
    codes = ((x * (1.0 / scale)).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * scale


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
            parameters[name].copy_(weight.dequantize())
            shared[parameters[name]] = weight
    if activations == "int8":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight in shared:
                module.register_forward_pre_hook(_round_input)
    return model


def _round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize_per_token(inputs[0]), *inputs[1:])
