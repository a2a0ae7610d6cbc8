from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.integers import (
    MAX_SCALE,
    MIN_SCALE,
    IntegerWeight,
    bf16_grid,
    in_groups,
    least_costly_scales,
    round_to_nearest,
)

weights = st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda shape: arrays(
        np.float32,
        (shape[0], 128 * shape[1]),
        elements=st.floats(-(2.0**15), 2.0**15, width=32),
    )
)


@given(values=weights, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 128, None]))
def test_round_to_nearest(values: np.ndarray, bits: int, group_size: int | None) -> None:
    weight = torch.from_numpy(values)
    result = round_to_nearest(weight, bits, group_size)
    limit = 2 ** (bits - 1)
    assert result.codes.dtype == torch.int8
    assert result.codes.min() >= -limit
    assert result.codes.max() <= limit - 1
    assert result.group_size == (group_size or weight.shape[1])
    scales = result.scales
    assert (scales >= MIN_SCALE).all()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scales.to(dtype).float(), scales)  # exact as every runtime stores them
    # Every value is within half a step, or is clipped at the end of the range by at most half a step plus the
    # rounding of the scale to bfloat16 (2^−9 of the range).
    step = scales.repeat_interleave(result.group_size, 1)
    assert ((result.dequantize() - weight).abs() <= step * (0.5 + limit * 2.0**-8)).all()


@given(values=weights, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 128, None]))
def test_integers_are_a_fixed_point(values: np.ndarray, bits: int, group_size: int | None) -> None:
    """Dequantized values, divided by their scales, give the same codes: quantizing twice changes nothing."""
    once = round_to_nearest(torch.from_numpy(values), bits, group_size)
    scales = once.scales.repeat_interleave(once.group_size, 1)
    assert torch.equal((once.dequantize() / scales).round().to(torch.int8), once.codes)


def test_literal() -> None:
    weight = torch.tensor([[-8.0, 7.0, 3.4, 0.0]]).repeat(1, 8)
    result = round_to_nearest(weight, 4, 32)
    assert result.scales.tolist() == [[1.0703125]]  # 8 / 7.5 = 1.0667 on the bfloat16 grid
    assert result.codes[0, :4].tolist() == [-7, 7, 3, 0]
    assert result.ideal_bytes == 32 // 2 + 2


def test_scale_bounds() -> None:
    assert bf16_grid(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [MIN_SCALE, MIN_SCALE, MAX_SCALE]
    assert round_to_nearest(torch.zeros(2, 32), 4, 32).dequantize().abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        round_to_nearest(weight, 4, 32)


def test_not_divisible() -> None:
    with pytest.raises(ValueError, match="40 columns do not divide into groups of 32"):
        round_to_nearest(torch.zeros(2, 40), 4, 32)


@given(values=weights, cut=st.integers(1, 127), bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 128]))
def test_a_shorter_last_group(values: np.ndarray, cut: int, bits: int, group_size: int) -> None:
    """Padding gives the codes and scales of the weight filled up with zeros."""
    weight = torch.from_numpy(values)[:, :-cut]
    short = round_to_nearest(weight, bits, group_size, pad=True)
    filled = round_to_nearest(in_groups(weight, group_size).flatten(1), bits, group_size)
    assert short.codes.shape == weight.shape
    size = min(group_size, weight.shape[1])  # a single group is the row
    assert short.group_size == size
    assert short.group == (None if weight.shape[1] % size == 0 else size)
    assert torch.equal(short.scales, filled.scales)
    assert torch.equal(short.dequantize(), filled.dequantize()[:, : weight.shape[1]])


@given(
    values=arrays(np.float32, (3, 96), elements=st.floats(-100, 100, width=32)),
    cost=st.none() | arrays(np.float32, 32, elements=st.floats(0.0625, 100, width=32)),
    bits=st.sampled_from([4, 8]),
    shares=st.lists(st.floats(0.5, 1.1), min_size=1, max_size=5),
)
def test_least_costly_scales_by_brute_force(
    values: np.ndarray, cost: np.ndarray | None, bits: int, shares: list[float]
) -> None:
    """NumPy tries every candidate, in float64, group by group."""
    limit = 2 ** (bits - 1)
    weights = None if cost is None else torch.from_numpy(cost)
    found = least_costly_scales(in_groups(torch.from_numpy(values), 32), bits, shares, weights)
    for row, group in np.ndindex(3, 3):
        x = values[row, 32 * group : 32 * group + 32].astype(np.float64)
        absmax = np.float32(np.abs(x).max()) / np.float32(limit - 0.5)
        candidates = bf16_grid(torch.tensor([float(absmax * np.float32(share)) for share in shares])).double().numpy()

        def total(scale: float, x: np.ndarray = x) -> float:
            error = np.rint(x / scale).clip(-limit, limit - 1) * scale - x
            return float((error**2 * (1 if cost is None else cost)).sum())

        chosen = float(found[row, group])
        assert chosen in candidates
        # In float32 a value may be on the other side of a tie between two codes, where its error is the same.
        assert total(chosen) <= min(map(total, candidates)) * (1 + 1e-5)


def test_of_equal_candidates_the_first_is_taken() -> None:
    grouped = torch.tensor([[[7.0, -7.0]]])  # as codes: ±7 in steps of 1, and just as exactly ±1 in steps of 7
    assert least_costly_scales(grouped, 4, [7.5 / 7, 7.5]).item() == 1
    assert least_costly_scales(grouped, 4, [7.5, 7.5 / 7]).item() == 7


def test_threads_search_the_same_scales() -> None:
    grouped = torch.randn(1500, 8, 32, generator=torch.Generator().manual_seed(0))  # more than a thread gets at once
    found = least_costly_scales(grouped, 4, [1, 0.875])
    assert torch.equal(found[1498:], least_costly_scales(grouped[1498:], 4, [1, 0.875]))


def test_shapes() -> None:
    weight = IntegerWeight(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1), 8)
    assert weight.per_channel
    assert (weight.group_size, weight.ideal_bytes) == (64, 3 * 64 + 3 * 2)


@pytest.mark.parametrize("group_size", [32, None])
def test_equal_codes_are_counted(group_size: int | None) -> None:
    weight = round_to_nearest(torch.randn(3, 64), 4, group_size)
    assert weight.equal_codes(weight) == 3 * 64
    changed = weight.codes.clone()
    changed[1, 5] ^= 1
    assert weight.equal_codes(replace(weight, codes=changed)) == 3 * 64 - 1
    scales = weight.scales.clone()
    scales[2, 0] *= 2
    assert weight.equal_codes(replace(weight, scales=scales)) == 3 * 64 - weight.group_size
    assert weight.equal_codes(round_to_nearest(torch.randn(3, 32), 4, group_size)) == 0
