"""Symmetric integer weights: codes, scales, and round-to-nearest.

A weight is [rows, columns] = [out features, in features]. A group is ``group_size`` neighbouring columns of a row,
which share a scale; per channel means one group per row. value = code · scale; the zero point is 0.

Scales are strictly positive, at least 2^−17 and on the bfloat16 grid. Such a scale is exact in float32,
float16 and bfloat16 alike, so every runtime holds the same value: XNNPACK stores blockwise int4 scales as
bfloat16 (and refuses zero or subnormal ones at load), ARM KleidiAI truncates to bfloat16, ONNX files hold
float16. The upper bound comes from float16's largest value, 65504.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MIN_SCALE = 2.0**-17  # bfloat16's 8 significant bits are still exact in a float16 subnormal (steps of 2^−24)
MAX_SCALE = 65280.0  # the largest bfloat16 below float16's maximum

ROWS_AT_ONCE = 8192  # bounds the float32 copies of a large table
# Work on a weight goes through a few rows of about so many values at a time. Their temporary copies (1 MB in float32)
# stay in the processor's cache, which makes rounding twenty times as fast as with 8192 rows of 1152 columns.
VALUES_AT_ONCE = 1 << 18

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class IntegerWeight:
    """codes int8 [rows, columns] in −2^(bits−1) … 2^(bits−1) − 1; scales float32 [rows, groups].

    ``group`` is the group size, but only if it does not divide the columns, so that the last group is shorter.
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
        """The bytes of the codes at ``bits`` bits each, plus two bytes per scale."""
        return self.codes.numel() * self.bits // 8 + 2 * self.scales.numel()

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        rows, columns = self.codes.shape
        values = in_groups(self.codes, self.group_size).float() * self.scales[..., None]
        return values.view(rows, -1)[:, :columns]

    def rows(self, index: slice | Tensor) -> "IntegerWeight":
        """Some of its rows."""
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales

    def equal_codes(self, other: Any) -> int:
        """How many codes of ``other`` equal the code in their place, under an equal scale; 0 if the shapes differ."""
        if not isinstance(other, IntegerWeight):
            return 0
        if other.codes.shape != self.codes.shape or other.scales.shape != self.scales.shape:
            return 0
        equal, columns = 0, self.codes.shape[1]
        for part in blocks_of_rows(self.codes.shape):
            same_scale = (other.scales[part] == self.scales[part]).repeat_interleave(self.group_size, dim=1)
            same_code = other.codes[part] == self.codes[part]
            equal += int(torch.count_nonzero(same_code & same_scale[:, :columns]))
        return equal


def blocks_of_rows(shape: Sequence[int], values: int = VALUES_AT_ONCE, least: int = 1) -> Iterator[slice]:
    """The rows of a matrix of this shape, in order, so many at a time as have ``values`` values, or ``least`` rows."""
    rows, columns = shape
    count = max(least, values // max(1, columns))
    return (slice(start, start + count) for start in range(0, rows, count))


def in_groups(values: Tensor, size: int) -> Tensor:
    """values [rows, columns] as [rows, groups, size]. A shorter last group is padded with zeros."""
    rows, columns = values.shape
    padded = values if columns % size == 0 else F.pad(values, (0, -columns % size))
    return padded.reshape(rows, -1, size)


def bf16_grid(scales: Tensor) -> Tensor:
    """The nearest allowed scales, as float32: on the bfloat16 grid, within MIN_SCALE … MAX_SCALE."""
    return scales.float().clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16).float()


def absmax_scales(grouped: Tensor, bits: int) -> Tensor:
    """Scales [rows, groups] for values [rows, groups, size]: absmax / (2^(bits−1) − ½).

    They use the whole asymmetric range of codes. On the positive side at most half a step is clipped.
    """
    return grouped.abs().amax(-1) / (2 ** (bits - 1) - 0.5)


def least_costly_scales(grouped: Tensor, bits: int, shares: Sequence[float], cost: Tensor | None = None) -> Tensor:
    """float32 scales [rows, groups] on the bfloat16 grid for values [rows, groups, size].

    Among ``shares`` of the absmax scale, each group gets the one with the least squared error; of equals the first.
    ``cost`` [size] is the weight of each column's error (None: all weigh the same).

    NumPy searches, in threads that each have a part of the groups. Torch's threads would share each small operation and
    wait for one another after it, which takes several times as long when the machine has other work.
    """
    size = grouped.shape[-1]
    groups = grouped.detach().reshape(-1, size).numpy()
    costs = None if cost is None else cost.numpy()[:, None]

    def search(part: slice) -> Tensor:
        return torch.from_numpy(_least_costly(groups[part].T.copy(), bits, shares, costs))

    parts = list(blocks_of_rows(groups.shape, least=64))  # NumPy's innermost loops go over the groups of a part
    if len(parts) == 1:
        return search(parts[0]).view(grouped.shape[:-1])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.cat(list(threads.map(search, parts))).view(grouped.shape[:-1])


def _least_costly(values: Floats, bits: int, shares: Sequence[float], costs: Floats | None) -> Floats:
    """Scales [groups] for values [size, groups], as ``least_costly_scales`` chooses them.

    The errors are added column by column, in the same order on every processor.
    """
    limit = 2 ** (bits - 1)
    absmax = np.abs(values).max(0) / np.float32(limit - 0.5)
    best, least = bf16_grid(torch.from_numpy(absmax)).numpy(), np.full_like(absmax, np.inf)
    errors = np.empty_like(values)
    with np.errstate(all="ignore"):  # of values that are not finite, which are refused elsewhere
        for share in shares:
            scales = bf16_grid(torch.from_numpy(absmax * np.float32(share))).numpy()
            np.divide(values, scales, out=errors)
            np.rint(errors, out=errors)
            np.clip(errors, -limit, limit - 1, out=errors)
            errors *= scales
            errors -= values
            errors *= errors
            if costs is not None:
                errors *= costs
            total = np.add.reduce(errors, axis=0)
            best = np.where(total < least, scales, best)
            least = np.minimum(total, least)
    return best


def nearest_codes(grouped: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes to values [rows, groups, size] under scales [rows, groups], as floats of the values' shape."""
    limit = 2 ** (bits - 1)
    return (grouped / scales[..., None]).round_().clamp_(-limit, limit - 1)


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int | None, *, pad: bool = False, scales: Tensor | None = None
) -> IntegerWeight:
    """The integers of weight [rows, columns]: codes rounded to nearest under scales on the bfloat16 grid.

    ``scales`` [rows, groups] are snapped to the grid; None means absmax scales. ``group_size`` None means per channel.
    Raises ValueError on NaN or infinite weights, and when the group size does not divide the columns, unless ``pad``
    lets the last group be shorter.
    """
    rows, columns = weight.shape
    size = whole_group_size(columns, group_size, pad)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    found = torch.empty(rows, -(-columns // size))
    for part in blocks_of_rows(weight.shape):
        grouped = in_groups(weight[part].float(), size)
        require_finite(grouped)
        found[part] = bf16_grid(absmax_scales(grouped, bits) if scales is None else scales[part])
        rounded = nearest_codes(grouped, found[part], bits)
        codes[part] = rounded.to(torch.int8).view(len(grouped), -1)[:, :columns]
    return IntegerWeight(codes, found, bits, size if columns % size else None)


def whole_group_size(columns: int, group_size: int | None, pad: bool) -> int:
    """The size of a group in rows of ``columns``; ``group_size`` None means per channel.

    Raises ValueError when the group size does not divide the columns, unless ``pad`` lets the last group be shorter.
    """
    size = columns if group_size is None or (pad and group_size > columns) else group_size
    if columns % size and not pad:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    return size


def require_finite(weight: Tensor) -> None:
    """Raises ValueError, with their number, when values are NaN or infinite."""
    if torch.isfinite(weight.sum()):  # NaN and ∞ carry over to the sum
        return
    count = weight.numel() - int(torch.isfinite(weight).sum())
    if count:
        raise ValueError(f"{count} values are NaN or infinite")
