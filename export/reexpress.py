"""SFP8 for runtimes that have no kernel for it: as 8-bit integers, about one byte a weight too.

ONNX Runtime takes them in blocks of 32 columns, XNNPACK one scale a row (docs/sfp8.md: what else was tried). They
are rounded to nearest from the SFP8 values, and what that changes is measured for each weight.
"""

import math

from export.manifest import Format
from quant.integers import IntegerWeight, round_to_nearest
from quant.recipe import SCHEMES, Integers, QuantizedWeights, Weight
from quant.sfp8 import Sfp8Weight

STAND_INS: dict[Format, str] = {"onnx": "int8-block32-padded", "pte": "int8-channel"}


def reexpressed(weights: QuantizedWeights, format: Format) -> tuple[QuantizedWeights, dict[str, float]]:
    """``weights`` with integers in place of SFP8, and by the name of each such weight how far its integers are from
    its SFP8 values, in dB: 10 · log₁₀(Σ value² / Σ (value − integer)²). Larger is nearer.
    """
    tensors: dict[str, Weight] = {}
    verdicts, decibels = dict(weights.verdicts), {}
    for name, weight in weights.tensors.items():
        tensors[name] = weight
        if isinstance(weight, Sfp8Weight):
            tensors[name], decibels[name] = stand_in(weight, format)
            verdicts[name] += f"; as {STAND_INS[format]}, {decibels[name]:.1f} dB from its values"
    return QuantizedWeights(tensors, verdicts), decibels


def stand_in(weight: Sfp8Weight, format: Format) -> tuple[IntegerWeight, float]:
    """The integers for ``format``, and their distance from the SFP8 values in dB."""
    scheme = SCHEMES[STAND_INS[format]]
    assert isinstance(scheme, Integers)
    values = weight.dequantize()
    integers = round_to_nearest(values, scheme.bits, scheme.group_size, pad=scheme.pad)
    noise = float((values - integers.dequantize()).double().square().sum())
    signal = float(values.double().square().sum())
    return integers, 10 * math.log10(signal / noise) if noise else math.inf
