"""Stand-ins: weights in another scheme, because the target's runtime has no kernel for their own kind.

SFP8 becomes 8-bit integers, which take about one byte per weight too: in groups of 32 columns for ONNX Runtime, with
one scale per row for XNNPACK (docs/sfp8.md says what else was tried). The dequantized weight is rounded to nearest, and
the resulting error is measured for each weight.
"""

import math
from dataclasses import replace

from torch import Tensor

from export.target import StandIn, Target
from gemma3.errors import BadInput
from quant.integers import IntegerWeight, round_to_nearest
from quant.recipe import SCHEMES, Integers
from quant.weights import QuantizedWeight, QuantizedWeights, Weight


def for_target(
    weights: QuantizedWeights, target: Target, exact: bool = False
) -> tuple[QuantizedWeights, dict[str, StandIn]]:
    """``weights`` as the target's file holds them, and a description of each stand-in among them, by name.

    With ``exact`` nothing is replaced. Raises BadInput for a weight that the file cannot hold.
    """
    tensors: dict[str, Weight] = {}
    verdicts, stand_ins = dict(weights.verdicts), dict[str, StandIn]()
    for name, weight in weights.tensors.items():
        tensors[name] = weight
        if isinstance(weight, Tensor):
            continue
        scheme = None if exact else target.stand_ins.get(weight.kind)
        if scheme is not None:
            tensors[name], decibels = stand_in(weight, scheme)
            stand_ins[name] = StandIn(weight.kind, scheme, decibels)
            reason = f"{verdicts[name].reason}; as {scheme}, {decibels:.1f} dB from its values"
            verdicts[name] = replace(verdicts[name], reason=reason)
        elif weight.kind not in target.kinds:
            raise BadInput(
                f"{name}: a .{target.name} cannot hold {weight.kind.upper()} weights as they are; "
                "leave out --exact-sfp8, or choose another --format"
            )
    return QuantizedWeights(tensors, verdicts), stand_ins


def stand_in(weight: QuantizedWeight, scheme: str) -> tuple[IntegerWeight, float]:
    """The weight's values rounded to nearest in ``scheme``, and the decibels of ``StandIn`` (∞ without error)."""
    form = SCHEMES[scheme]
    assert isinstance(form, Integers)
    values = weight.dequantize()
    integers = round_to_nearest(values, form.bits, form.group_size, pad=form.pad)
    noise = float((values - integers.dequantize()).double().square().sum())
    signal = float(values.double().square().sum())
    return integers, 10 * math.log10(signal / noise) if noise else math.inf
