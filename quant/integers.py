"""Symmetric integer weights: codes, scales, and round-to-nearest.

A weight is [rows, columns] = [out features, in features]. A group is ``group_size`` neighbours along the
columns that share a scale; per channel means one group a row. value = code · scale; the zero point is 0.

Scales are strictly positive, at least 2^−17 and on the bfloat16 grid. Such a scale is exact in float32,
float16 and bfloat16 alike, so every runtime holds the same value: XNNPACK stores blockwise int4 scales as
bfloat16 (and refuses zero or subnormal ones at load), ARM KleidiAI truncates to bfloat16, ONNX files hold
float16. The bound on top is float16's 65504.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SCALE = 2.0**-17  # with bfloat16's 8 significant bits still exact as a float16 subnormal (2^−24 steps)
MAX_SCALE = 65280.0  # largest bfloat16 below float16's maximum

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class IntegerWeight:
    """codes int8 [rows, columns] in −2^(bits−1) … 2^(bits−1) − 1; scales float32 [rows, groups].

    ``group`` is the group size, given only where it does not divide the columns, so that the last group is shorter.
    """

    kind: ClassVar[str] = "integers"

    codes: Tensor
    scales: Tensor
    bits: int
    group: int | None = None

    @property
    def group_size(self) -> int:
        return self.group or self.codes.shape[1] // self.scales.shape[1]

    @property
    def per_channel(self) -> bool:
        return self.scales.shape[1] == 1

    @property
    def ideal_bytes(self) -> int:
        """The codes at their bits plus two bytes a scale."""
        return self.codes.numel() * self.bits // 8 + 2 * self.scales.numel()

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        rows, columns = self.codes.shape
        values = in_groups(self.codes, self.group_size).float() * self.scales[..., None]
        return values.view(rows, -1)[:, :columns]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales

    def equal_codes(self, other: Any) -> int:
        """How many places of ``other`` hold the same code under the same scale; none when the shapes differ."""
        if not isinstance(other, IntegerWeight):
            return 0
        if other.codes.shape != self.codes.shape or other.scales.shape != self.scales.shape:
            return 0
        equal, columns = 0, self.codes.shape[1]
        for start in range(0, len(self.codes), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            same_scale = (other.scales[part] == self.scales[part]).repeat_interleave(self.group_size, dim=1)
            same_code = other.codes[part] == self.codes[part]
            equal += int(torch.count_nonzero(same_code & same_scale[:, :columns]))
        return equal


def in_groups(values: Tensor, size: int) -> Tensor:
    """values [rows, columns] as [rows, groups, size]; a shorter last group is padded with zeros."""
    rows, columns = values.shape
    padded = values if columns % size == 0 else F.pad(values, (0, -columns % size))
    return padded.reshape(rows, -1, size)


def bf16_grid(scales: Tensor) -> Tensor:
    """The nearest allowed scale: bfloat16, positive, within MIN_SCALE … MAX_SCALE (float32 out)."""
    return scales.float().clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16).float()


def absmax_scales(grouped: Tensor, bits: int) -> Tensor:
    """[rows, groups] of [rows, groups, size]: absmax / (2^(bits−1) − ½).

    This uses the whole asymmetric range of codes; at most half a step is clipped on the positive side.
    """
    return grouped.abs().amax(-1) / (2 ** (bits - 1) - 0.5)


def nearest_codes(grouped: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes, as floats [rows, groups, size], of values of that shape under scales [rows, groups]."""
    limit = 2 ** (bits - 1)
    return (grouped / scales[..., None]).round_().clamp_(-limit, limit - 1)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    *,
    pad: bool = False,
    choose_scales: Callable[[Tensor, int], Tensor] = absmax_scales,
) -> IntegerWeight:
    """Scales snapped to the bfloat16 grid, then codes rounded to nearest under the snapped scales.

    ``group_size`` None is per channel. It must divide the columns, unless ``pad`` lets the last group be shorter.
    Raises ValueError on NaN or infinite weights.
    """
    rows, columns = weight.shape
    size = columns if group_size is None or (pad and group_size > columns) else group_size
    if columns % size and not pad:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, -(-columns // size))
    # A few rows at a time, so that an embedding table of 262 144 rows is never whole in float32.
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        grouped = in_groups(weight[part].float(), size)
        require_finite(grouped)
        scales[part] = bf16_grid(choose_scales(grouped, bits))
        rounded = nearest_codes(grouped, scales[part], bits)
        codes[part] = rounded.to(torch.int8).view(len(grouped), -1)[:, :columns]
    return IntegerWeight(codes, scales, bits, size if columns % size else None)


def require_finite(weight: Tensor) -> None:
    """Raises ValueError with the number of values that are NaN or infinite."""
    count = weight.numel() - int(torch.isfinite(weight).sum())
    if count:
        raise ValueError(f"{count} values are NaN or infinite")
