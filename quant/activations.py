"""Rounds activations to int8, as a runtime's kernels round the input of a linear layer with integer weights.

A ``Rounding`` says how the kernels of one runtime on one kind of processor round the input of each weight.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.integers import IntegerWeight

Round = Callable[[Tensor], Tensor]
# (name, weight) → what the kernel does to the input of the linear layer with this weight; None: nothing.
Rounding = Callable[[str, IntegerWeight], Round | None]


def keep_float(_: str, __: IntegerWeight) -> Round | None:
    """The ``Rounding`` of kernels that multiply in float32."""
    return None


def per_token(_: str, __: IntegerWeight) -> Round | None:
    """The ``Rounding`` of XNNPACK's kernels."""
    return fake_quantize_per_token


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """x [..., features], rounded asymmetrically to int8 per token (over the last axis) and dequantized to x's dtype.

    The scale is (max − min) / 255 over a range that includes 0. The zero point is rounded to an integer, from the end
    of the range with the smaller error. The operations and their order are XNNPACK's
    (xnn_f32_qd8_asymmetric_quantization_params and its f32-to-qd8 conversion), so equal float32 inputs give equal codes
    and equal values; tests/export checks this bit for bit. torchao's choose_qparams_per_token_asymmetric computes the
    scale first and inverts it, which rounds about one value in a million the other way.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    # A token whose values are all (nearly) 0 rounds to zeros. For a range below 7.5e-37 the multiplier would overflow.
    span = torch.where(high - low < 1e-30, 255.0, high - low)
    # Not ``255.0 / span``: torch computes that as 255 · (1 / span), which rounds twice.
    multiplier = torch.full_like(span, 255.0) / span
    low_code, high_code = low * multiplier, high * multiplier
    zero_point = torch.where(-128 + low_code + 127 + high_code > 0, -128 - low_code, 127 - high_code)
    zero_point = zero_point.clamp(-128, 127).round()
    codes = ((x * multiplier).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * (1.0 / multiplier)


def fake_quantize_per_block(x: Tensor, size: int) -> Tensor:
    """x [..., features], rounded symmetrically to int8 in blocks of ``size`` features and dequantized to x's dtype.

    The scale is max(abs(x)) / 127 over a block; the last block may be shorter. So does MatMulNBits in ONNX Runtime at
    accuracy level 4 (QuantizeARow_CompInt8 in its MLAS library); tests/export compares with the kernel.
    """
    features = x.shape[-1]
    padded = F.pad(x, (0, -features % size))
    blocks = padded.view(*padded.shape[:-1], -1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    # For a block below 1e-30 the multiplier could overflow. Its values are far below anything that matters.
    largest = torch.where(largest < 1e-30, 127.0, largest)
    codes = (blocks * (torch.full_like(largest, 127.0) / largest)).round()
    return (codes * (largest / 127.0)).flatten(-2)[..., :features]
