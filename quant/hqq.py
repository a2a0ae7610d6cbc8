"""HQQ, half-quadratic quantization, in torchao's version for symmetric integers: scales chosen without data.

torchao's general HQQ moves the zero point, but no int4 kernel of our runtimes accepts one. Its scale-only form
alternates between rounding and the least-squares scale. We take the scales from it, snap them to the bfloat16 grid
and round the weight once, under the snapped scales.
"""

from typing import cast

from torch import Tensor

from quant.integers import IntegerWeight, round_to_nearest
from quant.recipe import Integers


def hqq(_: str, weight: Tensor, scheme: Integers) -> tuple[IntegerWeight, str]:
    """A method for ``quantize_weights``: round to nearest under HQQ's scales. Raises as ``round_to_nearest`` does."""
    integers = round_to_nearest(weight, scheme.bits, scheme.group_size, pad=scheme.pad, choose_scales=scales)
    return integers, "round to nearest under HQQ's scales"


def scales(grouped: Tensor, bits: int) -> Tensor:
    """HQQ's scales [rows, groups] for values [rows, groups, size], not yet on the bfloat16 grid."""
    # Imported here, because it takes seconds to load. The function is private to torchao, but the public interface
    # would round the weight a second time.
    from torchao.quantization import quant_primitives  # type: ignore[import-untyped]

    rows, _, size = grouped.shape
    limit = 2 ** (bits - 1)
    choose = quant_primitives._choose_qparams_and_quantize_scale_only_hqq
    _, found = choose(grouped.reshape(rows, -1), [1, size], -limit, limit - 1)
    return cast(Tensor, found)
