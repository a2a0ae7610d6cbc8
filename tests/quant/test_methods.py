"""Methods that see nothing but the weight, and weights that are rounded on demand by them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quant.integers import MIN_SCALE, IntegerWeight, bf16_grid, in_groups, nearest_codes
from quant.methods import STEPS, IntegerMethod, mse, quantize_weights, round_on_demand, rtn
from quant.recipe import Integers, Recipe, Rule, Verdict

SEARCHED = "round to nearest with the least squared error"
FOUR_BITS = st.builds(Integers, st.just(4), st.sampled_from([32, 128, None]), pad=st.just(True))
WEIGHTS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 200)), elements=st.floats(-(2.0**15), 2.0**15, width=32)
)


def errors(integers: IntegerWeight, weight: Tensor) -> Tensor:
    """The squared error of each group, float64 [rows, groups]."""
    return in_groups(integers.dequantize().double() - weight.double(), integers.group_size).square().sum(-1)


@given(values=WEIGHTS, scheme=FOUR_BITS)
def test_no_group_is_worse_than_under_the_absmax_scale(values: np.ndarray, scheme: Integers) -> None:
    weight = torch.from_numpy(values)
    found, how = mse("any", weight, scheme)
    plain, _ = rtn("any", weight, scheme)
    assert (errors(found, weight) <= errors(plain, weight) * (1 + 1e-6)).all()
    assert how == SEARCHED
    assert (found.bits, found.group, found.group_size) == (plain.bits, plain.group, plain.group_size)
    assert torch.equal(bf16_grid(found.scales), found.scales)
    nearest = nearest_codes(in_groups(weight, found.group_size), found.scales, 4).view(len(weight), -1)
    assert torch.equal(found.codes.float(), nearest[:, : weight.shape[1]])


@pytest.mark.parametrize(("group_size", "share"), [(32, 0.86), (128, 0.86), (None, 0.7)])
def test_less_error_than_rounding_to_nearest(group_size: int | None, share: float) -> None:
    weight = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    found, plain = (method("any", weight, Integers(4, group_size))[0] for method in (mse, rtn))
    assert errors(found, weight).sum() < share * errors(plain, weight).sum()


@pytest.mark.parametrize("largest", [7, -7, -8])
def test_a_weight_that_has_four_bits_already_keeps_them(largest: int) -> None:
    """Some checkpoints in floating point were trained for such integers. Absmax scales would round them once more."""
    codes = torch.randint(-6, 7, (16, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = largest
    scales = bf16_grid(torch.rand(16, 2, generator=torch.Generator().manual_seed(1)) / 50 + 0.01)
    weight = IntegerWeight(codes.to(torch.int8), scales, 4).dequantize()
    found, _ = mse("any", weight, Integers(4, 32))
    assert torch.equal(found.codes, codes.to(torch.int8))
    assert torch.equal(found.scales, scales)
    assert not torch.equal(rtn("any", weight, Integers(4, 32))[0].dequantize(), weight)


@pytest.mark.parametrize("group_size", [32, 128, None])
def test_eight_bits_are_rounded_under_absmax_scales(group_size: int | None) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    found, how = mse("any", weight, Integers(8, group_size))
    plain, plainly = rtn("any", weight, Integers(8, group_size))
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    assert how == plainly == "round to nearest"


def test_zeros() -> None:
    weight = torch.zeros(2, 72)
    weight[1, 33] = 1.0  # the other groups are still zeros
    found, _ = mse("any", weight, Integers(4, 32, pad=True))
    assert found.codes.count_nonzero() == 1
    assert (found.scales == MIN_SCALE).sum() == 5
    assert found.dequantize()[1, 33] == pytest.approx(1.0, rel=0.04)


def test_huge_values_whose_squares_are_infinite() -> None:
    found, _ = mse("any", torch.full((1, 32), 3e38), Integers(4, 32))
    assert (found.codes == 7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        mse("any", weight, Integers(4, 32))


def test_absmax_is_the_first_candidate() -> None:
    """So that it wins among equals, and no group is worse."""
    assert STEPS[0] == 7.5
    assert len(set(STEPS)) == len(STEPS)


@pytest.mark.parametrize(("method", "how"), [(mse, SEARCHED), (rtn, "round to nearest")])
def test_on_demand_the_scales_are_chosen_once(monkeypatch: pytest.MonkeyPatch, method: IntegerMethod, how: str) -> None:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    weights = {
        "rows": drawn(300, 1100),  # more than are rounded at once
        "blocks": drawn(5, 72).bfloat16(),
        "table": drawn(40, 64),
        "norm": drawn(64),
    }
    schemes = ("int4-channel", "int4-block32-padded", "int8-channel", "float32")
    recipe = Recipe("mine", tuple(Rule(name, scheme) for name, scheme in zip(weights, schemes, strict=True)))
    whole = quantize_weights(weights.items(), recipe, method)
    made = round_on_demand(weights, weights.__getitem__, recipe, method)
    assert made.verdicts == whole.verdicts
    assert made.verdicts["blocks"] == Verdict(schemes[1], f"{how}, its last group 8 of 32 columns")

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a scale is chosen again")

    monkeypatch.setattr("quant.integers.absmax_scales", refuse)
    monkeypatch.setattr("quant.methods.least_costly_scales", refuse)
    monkeypatch.setattr("quant.methods.rtn", refuse)
    monkeypatch.setattr("quant.methods.mse", refuse)
    for _ in range(2):
        for name, integers in whole.integers.items():
            again = made.integers[name]
            assert torch.equal(again.codes, integers.codes)
            assert torch.equal(again.scales, integers.scales)
            assert (again.bits, again.group) == (integers.bits, integers.group)
