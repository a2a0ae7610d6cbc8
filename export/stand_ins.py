"""Stand-ins: weights in another scheme, because the target's runtime has no kernel for their own kind.

SFP8 becomes 8-bit integers, which take about one byte per weight too: in groups of 32 columns for ONNX Runtime, with
one scale per row for XNNPACK (docs/sfp8.md says what else was tried). The dequantized weight is rounded to nearest, and
the resulting error is measured for each weight. After that, a stand-in is made again whenever it is used.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from export.target import StandIn, Target
from gemma3.errors import BadInput
from quant.integers import IntegerWeight, blocks_of_rows, round_to_nearest
from quant.recipe import SCHEMES, Integers
from quant.weights import OnDemand, QuantizedWeight, QuantizedWeights, Weight, form_of


def for_target(
    weights: QuantizedWeights, target: Target, exact: bool = False
) -> tuple[QuantizedWeights, dict[str, StandIn]]:
    """``weights`` as the target's file holds them, and a description of each stand-in among them, by name.

    With ``exact`` nothing is replaced. Raises BadInput for a weight that the file cannot hold.
    """
    forms, verdicts, stand_ins = dict(weights.forms), dict(weights.verdicts), dict[str, StandIn]()
    for name, form in weights.forms.items():
        if isinstance(form, Tensor):
            continue
        scheme = None if exact else target.stand_ins.get(form.kind)
        if scheme is not None:
            integers, decibels = stand_in(weights.quantized[name], scheme)
            forms[name], stand_ins[name] = form_of(integers), StandIn(form.kind, scheme, decibels)
            reason = f"{verdicts[name].reason}; as {scheme}, {decibels:.1f} dB from its values"
            verdicts[name] = replace(verdicts[name], reason=reason)
        elif form.kind not in target.kinds:
            raise BadInput(
                f"{name}: a .{target.name} cannot hold {form.kind.upper()} weights as they are; "
                "leave out --exact-sfp8, or choose another --format"
            )

    def make(name: str) -> Weight:
        if name in stand_ins:
            return stand_in(weights.quantized[name], stand_ins[name].scheme)[0]
        return weights.tensors[name]

    return replace(weights, tensors=OnDemand(forms, make), verdicts=verdicts), stand_ins


def stand_in(weight: QuantizedWeight, scheme: str) -> tuple[IntegerWeight, float]:
    """The weight's values rounded to nearest in ``scheme``, and the decibels of ``StandIn`` (∞ without error)."""
    form = SCHEMES[scheme]
    assert isinstance(form, Integers)
    parts, noise, signal = [], 0.0, 0.0
    for rows in blocks_of_rows(weight.codes.shape):
        values = weight.rows(rows).dequantize()
        integers = round_to_nearest(values, form.bits, form.group_size, pad=form.pad)
        noise += float((values - integers.dequantize()).double().square().sum())
        signal += float(values.double().square().sum())
        parts.append(integers)
    codes, scales = (torch.cat(pieces) for pieces in zip(*(part.tensors() for part in parts), strict=True))
    return replace(parts[0], codes=codes, scales=scales), 10 * math.log10(signal / noise) if noise else math.inf
