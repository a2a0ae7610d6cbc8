"""Symmetric integer weights: codes, scales, and round-to-nearest.

A weight is [rows, columns] = [out features, in features]. A group is ``group_size`` neighbours along the
columns that share a scale; per-channel is one group a row. value = code · scale, zero point 0.

Scales are strictly positive, at least 2^−17 and on the bfloat16 grid. Such a scale is exact in float32,
float16 and bfloat16 alike, so every runtime holds the same value: XNNPACK stores blockwise int4 scales as
bfloat16 (and refuses zero or subnormal ones at load), ARM KleidiAI truncates to bfloat16, ONNX files hold
float16. The bound on top is float16's 65504.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 2.0**-17  # with bfloat16's 8 significant bits still exact as a float16 subnormal (2^−24 steps)
MAX_SCALE = 65280.0  # largest bfloat16 below float16's maximum

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class IntegerWeight:
    """codes int8 [rows, columns] in −2^(bits−1) … 2^(bits−1) − 1; scales float32 [rows, groups]."""

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def per_channel(self) -> bool:
        return self.scales.shape[1] == 1

    @property
    def ideal_bytes(self) -> int:
        """The codes at their bits plus two bytes a scale."""
        return self.codes.numel() * self.bits // 8 + 2 * self.scales.numel()

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """float32 [rows, columns]; in ``out`` (float32, contiguous) without further memory if given."""
        values = torch.empty(self.codes.shape) if out is None else out
        grouped = values.view(len(values), -1, self.group_size)
        grouped.copy_(self.codes.view(grouped.shape)).mul_(self.scales[..., None])
        return values


def bf16_grid(scales: Tensor) -> Tensor:
    """The nearest allowed scale: bfloat16, positive, within MIN_SCALE … MAX_SCALE (float32 out)."""
    return scales.float().clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16).float()


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None) -> IntegerWeight:
    """Absmax scales snapped to the bfloat16 grid, then codes rounded to nearest under the snapped scale.

    The scale is absmax / (2^(bits−1) − ½): the code range is used to its asymmetric end with at most half a step
    clipped on the positive side. ``group_size`` None is per channel; it must divide the columns.
    Raises ValueError on NaN or infinite weights.
    """
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    if columns % size:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // size)
    limit = 2 ** (bits - 1)
    # By rows, so that a table of 262 144 is never whole in float32.
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        grouped = weight[part].float().reshape(-1, columns // size, size)
        if not torch.isfinite(grouped).all():
            raise ValueError(f"{int((~torch.isfinite(grouped)).sum())} values are NaN or infinite")
        scales[part] = bf16_grid(grouped.abs().amax(-1) / (limit - 0.5))
        scaled = (grouped / scales[part, :, None]).round().clamp(-limit, limit - 1)
        codes[part] = scaled.to(torch.int8).view(-1, columns)
    return IntegerWeight(codes, scales, bits)
