import pytest
import torch

from quant.hqq import hqq
from quant.integers import MIN_SCALE, bf16_grid, round_to_nearest
from quant.recipe import Integers


@pytest.mark.parametrize("group_size", [32, None])
def test_smaller_error_than_round_to_nearest(group_size: int | None) -> None:
    """This holds at 4 bits: at 8, the two errors are within a tenth or two of a decibel."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    found, _ = hqq("any", weight, Integers(4, group_size))
    plain = round_to_nearest(weight, 4, group_size)
    assert torch.equal(bf16_grid(found.scales), found.scales)
    assert found.codes.shape == plain.codes.shape
    assert (found.bits, found.scales.shape) == (plain.bits, plain.scales.shape)

    def error(dequantized: torch.Tensor) -> float:
        return float((dequantized - weight).square().mean())

    assert error(found.dequantize()) < error(plain.dequantize())


def test_zeros() -> None:
    found, how = hqq("any", torch.zeros(2, 40), Integers(4, 32, pad=True))
    assert found.codes.count_nonzero() == 0
    assert (found.scales == MIN_SCALE).all()
    assert "HQQ" in how


def test_not_finite() -> None:
    with pytest.raises(ValueError, match="80 values are NaN"):
        hqq("any", torch.full((2, 40), torch.nan), Integers(4, None))
