"""HQQ, half-quadratic quantization, as torchao has it for symmetric integers: scales chosen without data.

torchao's general HQQ moves the zero point, which no kernel of our runtimes that multiplies int4 takes. Its
scale-only form alternates between rounding and the scale of least squares. What is taken from it are the scales;
they are snapped to the bfloat16 grid and the weight is rounded once, under the snapped ones.
"""

from typing import cast

from torch import Tensor

from quant.integers import IntegerWeight, round_to_nearest
from quant.recipe import Integers


def hqq(_: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
    """A method for ``quant.recipe.quantize``. Raises ValueError as ``round_to_nearest`` does."""
    integers = round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad, choose_scales=scales)
    return integers, "round to nearest under HQQ's scales"


def scales(grouped: Tensor, bits: int) -> Tensor:
    """[rows, groups] of [rows, groups, size], off any grid."""
    # Takes seconds to load, and is private to torchao: its public way to it would round a second time.
    from torchao.quantization import quant_primitives  # type: ignore[import-untyped]

    rows, _, size = grouped.shape
    limit = 2 ** (bits - 1)
    choose = quant_primitives._choose_qparams_and_quantize_scale_only_hqq
    _, found = choose(grouped.reshape(rows, -1), [1, size], -limit, limit - 1)
    return cast(Tensor, found)
