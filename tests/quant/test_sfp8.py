from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.sfp8 import DECODE, LARGEST, channel_scale, decode, encode, encode_weight, tensor_scale

# 142 738 inputs and the codes that gemma.cpp's own encoder gives them.
VECTORS = np.load(Path(__file__).parent / "sfp8_vectors.npz")
INPUTS = torch.from_numpy(VECTORS["input_f32_bits"].view(np.float32))
CODES = torch.from_numpy(VECTORS["code"])

in_range = arrays(np.float32, st.integers(1, 40), elements=st.floats(-LARGEST, LARGEST, width=32))


def test_equals_gemma_cpp() -> None:
    assert torch.equal(encode(INPUTS), CODES)
    assert set(CODES.tolist()) == set(range(256)) - {0x80}


def test_every_code_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode(decode(codes)), torch.where(codes == 0x80, 0, codes))
    assert torch.equal(DECODE.bfloat16().float(), DECODE)
    assert DECODE.max() == LARGEST


@given(values=in_range)
def test_error_is_bounded(values: np.ndarray) -> None:
    """Half a step of two mantissa bits for small values, of three for others; rounding looks at six bits only."""
    x = torch.from_numpy(values)
    error = (decode(encode(x)) - x).abs()
    assert (error <= x.abs() * (2.0**-3 + 2.0**-6) + 1.25 * 2.0**-23).all()
    upper = x.abs() >= 2.0**-7
    assert (error[upper] <= x.abs()[upper] * (2.0**-4 + 2.0**-6)).all()


@given(values=in_range)
def test_encoding_is_monotonic_odd_and_idempotent(values: np.ndarray) -> None:
    x = torch.from_numpy(np.sort(values))
    coded = decode(encode(x))
    assert (coded.diff() >= 0).all()
    assert torch.equal(decode(encode(-x)), -coded + 0.0)
    assert torch.equal(decode(encode(coded)), coded + 0.0)


def test_shapes_and_dtypes() -> None:
    x = torch.rand(3, 4, 5).bfloat16()
    assert encode(x).dtype == torch.uint8
    assert decode(encode(x)).shape == x.shape
    assert torch.equal(encode(x.transpose(0, 2)), encode(x).transpose(0, 2))


def test_the_tables_move_to_the_device_of_the_values() -> None:
    assert decode(torch.empty(3, dtype=torch.uint8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("bad", [2.0, -1.94, float("inf"), float("nan")])
def test_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"do not fit ±1\.875; scale them down first"):
        encode(torch.tensor([0.5, bad]))


def test_scales() -> None:
    assert tensor_scale(torch.tensor([0.1, -0.2])) == 1.0
    assert tensor_scale(torch.tensor([0.1, -3.75])) == 2.0
    assert channel_scale(torch.tensor([[0.1, -3.75], [0.0, 0.0], [0.9375, 0.75]])).tolist() == [[2.0], [1.0], [0.5]]


@given(
    values=arrays(np.float32, (3, 8), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    per_channel=st.booleans(),
)
def test_weights(values: np.ndarray, per_channel: bool) -> None:
    weight = torch.from_numpy(values)
    stored = encode_weight(weight, per_channel=per_channel)
    scale = channel_scale(weight) if per_channel else tensor_scale(weight).view(1, 1)
    assert torch.equal(stored.scale, scale)
    assert torch.equal(stored.codes, encode(weight / scale))
    assert torch.equal(stored.dequantize(), decode(stored.codes) * scale)
    assert stored.ideal_bytes == 24 + 4 * (3 if per_channel else 1)
    # Under gemma.cpp's scale, what has been encoded once is encoded to the same codes again.
    if not per_channel and scale == 1:
        assert torch.equal(encode_weight(stored.dequantize(), per_channel=False).codes, stored.codes)
