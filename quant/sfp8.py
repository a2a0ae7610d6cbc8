"""SFP8, gemma.cpp's "switching floating point": one byte per value. Small values have more bits of exponent, large ones
more bits of mantissa.

The byte holds the sign, then seven bits m. From m = 64 on, m is four bits of exponent and three of mantissa:
2^((m >> 3) − 15) · (1 + (m & 7) / 8). Below, it is 2^((m >> 2) − 23) · (1 + (m & 3) / 4), except that m = 0 stands for
0. Magnitudes run from 1.25 · 2^−23 to 1.875; there is no infinity, no NaN, no negative zero. All values are exact in
bfloat16.

The encoder reads the sign, the exponent and six bits of mantissa of a float32, 15 bits in all, and drops the rest. So
the whole encoder is a table of 32 768 bytes. It rounds half to even, to three bits of mantissa from 1.9375 · 2^−8 on
and to two below, and chooses the form after rounding. Source: the SFP codec of gemma.cpp. The tests compare with
gemma.cpp's own encoder (tests/quant/sfp8_vectors.npz).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.integers import blocks_of_rows, require_finite

LARGEST = 1.875
THREE_BITS_FROM = 1.9375 * 2.0**-8
DROPPED_BITS = 32 - 15


def _decode_table() -> NDArray[np.float32]:
    code = np.arange(256)
    m = code & 127
    large = np.exp2((m >> 3) - 15.0) * (1 + (m & 7) / 8)
    small = np.exp2((m >> 2) - 23.0) * (1 + (m & 3) / 4)
    magnitude = np.where(m >= 64, large, np.where(m > 0, small, 0.0))
    return np.where(code >= 128, -magnitude, magnitude).astype(np.float32)


def _encode_table() -> NDArray[np.uint8]:
    index = np.arange(1 << 15, dtype=np.uint32)
    magnitude = ((index << DROPPED_BITS) & 0x7FFF_FFFF).view(np.float32)
    exponent = ((index >> 6) & 255).astype(np.int64) - 127
    mantissa = (index & 63).astype(np.int64)
    three_bits = magnitude >= THREE_BITS_FROM
    rounded = np.where(three_bits, np.rint(mantissa / 8), np.rint(mantissa / 16)).astype(np.int64)
    carry = rounded == np.where(three_bits, 8, 4)
    exponent, rounded = exponent + carry, np.where(carry, 0, rounded)
    m = np.where(exponent >= -7, (exponent + 15 << 3) + rounded, (exponent + 23 << 2) + rounded)
    m = np.where((exponent == -23) & (rounded == 0), 1, m)  # 2^−23 would be m = 0, which stands for 0
    m = np.where(exponent < -23, 0, m)
    sign = np.where(m > 0, index >> 14 << 7, 0)
    return (sign | np.clip(m, 0, 127)).astype(np.uint8)


DECODE = torch.from_numpy(_decode_table())
ENCODE = torch.from_numpy(_encode_table())


def encode(x: Tensor) -> Tensor:
    """The uint8 codes, in x's shape, of float values within ±1.875, or nearer to ±1.875 than to ±2.

    Raises ValueError for larger, infinite or NaN values: scale them down first (``tensor_scale``).
    """
    wide = x.detach().float().contiguous()
    if not bool((wide.abs() < LARGEST + 2.0**-4).all()):
        raise ValueError(f"values up to {float(wide.abs().max())} do not fit ±{LARGEST}; scale them down first")
    return ENCODE.to(x.device)[wide.view(torch.int32).long().bitwise_and(0xFFFF_FFFF) >> DROPPED_BITS]


def decode(codes: Tensor) -> Tensor:
    """The float32 values of uint8 codes, in the codes' shape. 0x80, which is never written, decodes to −0."""
    return DECODE.to(codes.device)[codes.long()]


def tensor_scale(x: Tensor) -> Tensor:
    """The scale of x as gemma.cpp chooses it, a float32 scalar: the largest magnitude / 1.875, but at least 1."""
    return (x.detach().abs().max().float() / LARGEST).clamp(min=1.0)


def channel_scale(x: Tensor) -> Tensor:
    """The scales of x [rows, columns] as the JAX library chooses them, float32 [rows, 1].

    Each is the row's largest magnitude / 1.875; for a row of zeros it is 1.
    """
    largest = x.detach().float().abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / LARGEST, 1.0)


@dataclass(frozen=True)
class Sfp8Weight:
    """codes uint8 [rows, columns]; scale float32 [1, 1] or [rows, 1]: value = decode(code) · scale."""

    kind: ClassVar[str] = "sfp8"

    codes: Tensor
    scale: Tensor

    @property
    def ideal_bytes(self) -> int:
        """One byte per code and four per scale."""
        return self.codes.numel() + 4 * self.scale.numel()

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        return decode(self.codes) * self.scale

    def rows(self, index: slice | Tensor) -> "Sfp8Weight":
        """Some of its rows."""
        return Sfp8Weight(self.codes[index], self.scale if len(self.scale) < len(self.codes) else self.scale[index])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale

    def equal_codes(self, other: Any) -> int:
        """How many codes of ``other`` equal the code in their place; 0 if a scale or the shape differs."""
        if not isinstance(other, Sfp8Weight) or other.codes.shape != self.codes.shape:
            return 0
        return int((other.codes == self.codes).sum()) if torch.equal(other.scale, self.scale) else 0


def encode_weight(weight: Tensor, *, per_channel: bool) -> Sfp8Weight:
    """SFP8 codes of weight [rows, columns], divided by its ``channel_scale`` or by its ``tensor_scale``.

    Raises ValueError on NaN or infinite weights.
    """
    require_finite(weight)
    scales = [channel_scale(weight[part]) for part in blocks_of_rows(weight.shape)]
    scale = torch.cat(scales) if per_channel else tensor_scale(weight).view(1, 1)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for part in blocks_of_rows(weight.shape):
        codes[part] = encode(weight[part].float() / (scale[part] if per_channel else scale))
    return Sfp8Weight(codes, scale)
