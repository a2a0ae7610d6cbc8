import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.gptq import gptq, gptq_weight, hessian
from quant.integers import IntegerWeight, bf16_grid, in_groups, nearest_codes, round_to_nearest
from quant.methods import quantize_weights
from quant.recipe import Integers, scheme_recipe
from tests.shapes import random_model, random_tokens, tiny_config

SCHEMES = st.builds(Integers, st.sampled_from([4, 8]), st.sampled_from([32, 128, None]), pad=st.just(True))
LAYERS = st.tuples(st.integers(1, 4), st.integers(1, 140), st.integers(0, 40)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float32, shape[:2], elements=st.floats(-100, 100, width=32)),
        arrays(np.float32, (shape[2], shape[1]), elements=st.floats(-8, 8, width=16)),
    )
)


def error(integers: IntegerWeight, weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    difference = (integers.dequantize() - weight).double()
    return torch.einsum("nk,kl,nl->n", difference, h, difference)


@settings(max_examples=30)
@given(drawn=LAYERS, scheme=SCHEMES)
def test_no_row_is_worse_than_round_to_nearest(drawn: tuple[np.ndarray, np.ndarray], scheme: Integers) -> None:
    weight, inputs = map(torch.from_numpy, drawn)
    h = inputs.double().T @ inputs.double()
    integers, ratio = gptq_weight(weight, h, scheme)
    plain = round_to_nearest(weight, scheme.bits, scheme.group_size, pad=True)
    assert (error(integers, weight, h) <= error(plain, weight, h) * (1 + 1e-9)).all()
    assert 0 <= ratio <= 1
    assert (integers.bits, integers.group_size) == (plain.bits, plain.group_size)
    assert integers.codes.dtype == torch.int8
    limit = 2 ** (scheme.bits - 1)
    assert -limit <= int(integers.codes.min()) <= int(integers.codes.max()) < limit
    assert torch.equal(bf16_grid(integers.scales), integers.scales)


@settings(max_examples=30)
@given(drawn=LAYERS, scheme=SCHEMES)
def test_columns_that_are_independent_are_rounded_to_nearest(
    drawn: tuple[np.ndarray, np.ndarray], scheme: Integers
) -> None:
    weight, inputs = map(torch.from_numpy, drawn)
    integers, _ = gptq_weight(weight, inputs.double().square().sum(0).diag(), scheme)
    grouped = in_groups(weight, integers.group_size)
    nearest = nearest_codes(grouped, integers.scales, integers.bits).view(len(weight), -1)
    assert torch.equal(integers.codes.float(), nearest[:, : weight.shape[1]])


def correlated(columns: int, tokens: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(tokens, 4, generator=generator)
    x = shared @ torch.randn(4, columns, generator=generator) + 0.3 * torch.randn(tokens, columns, generator=generator)
    return x.double().T @ x.double()


@pytest.mark.parametrize("group_size", [32, 128, None])
def test_halves_the_error_on_correlated_inputs(group_size: int | None) -> None:
    weight = torch.randn(24, 384, generator=torch.Generator().manual_seed(1))
    _, ratio = gptq_weight(weight, correlated(384), Integers(4, group_size))
    assert ratio < 0.5


def test_equals_the_algorithm_column_by_column() -> None:
    """The paper's form, which updates the inverse of H after every column, with one scale per row."""
    weight, h = torch.randn(5, 150, generator=torch.Generator().manual_seed(2)), correlated(150)
    integers, _ = gptq_weight(weight, h, Integers(4, None))
    inverse = (h + 0.01 * h.diagonal().mean() * torch.eye(150)).inverse()
    left = weight.double()
    for column in range(150):
        value = left[:, column] / integers.scales[:, 0]
        code = value.round().clamp(-8, 7)
        away_from_ties = (value.clamp(-8, 7) - value.clamp(-8, 7).floor() - 0.5).abs() > 1e-3
        assert torch.equal(code[away_from_ties], integers.codes[away_from_ties, column].double())
        code = integers.codes[:, column]
        step = (left[:, column] - code * integers.scales[:, 0]) / inverse[column, column]
        left = left - step[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]


def test_unused_columns_are_rounded_to_nearest() -> None:
    weight, h = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)), correlated(64)
    h[:, 10:20] = h[10:20] = 0
    integers, _ = gptq_weight(weight, h, Integers(4, None))
    nearest = nearest_codes(weight.unsqueeze(1), integers.scales, 4)[:, 0]
    assert torch.equal(integers.codes[:, 10:20].float(), nearest[:, 10:20])
    assert not torch.equal(integers.codes.float(), nearest)


def test_not_finite() -> None:
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        gptq_weight(torch.tensor([[1.0, torch.inf]]), torch.eye(2), Integers(4, None))


@pytest.mark.parametrize("shape", ["like-4b", "untied"])
def test_a_network(shape: str) -> None:
    """Every linear layer is calibrated on its inputs in the network whose earlier layers have their integers."""
    config, recipe = tiny_config(shape), scheme_recipe("int4-block32")
    batches = [torch.tensor([random_tokens(config, 40, seed)]) for seed in range(3)]
    original, model = random_model(config), random_model(config)
    layers = [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
    method = gptq(layers, model.hidden, batches, recipe)
    named = dict(original.named_parameters())
    quantized = quantize_weights(named.items(), recipe, method)
    assert quantized.tensors.keys() == named.keys()
    for name, integers in quantized.integers.items():
        in_a_layer = name.startswith("model.layers.")
        assert ("gptq" in quantized.verdicts[name].reason) == in_a_layer
        if in_a_layer:
            assert torch.equal(model.get_parameter(name), integers.dequantize())
            assert not torch.equal(integers.codes, round_to_nearest(named[name], 4, 32).codes)

    # The last linear layer again by hand, on the inputs that the finished network gives it.
    seen: list[torch.Tensor] = []
    name = f"model.layers.{config.num_layers - 1}.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        for batch in batches:
            model.hidden(batch)
    x = torch.cat(seen, 1)[0].double()
    again, _ = gptq_weight(named[f"{name}.weight"], x.T @ x, Integers(4, 32))
    assert (again.codes != quantized.integers[f"{name}.weight"].codes).float().mean() < 0.01


def test_other_schemes_are_left_to_the_recipe() -> None:
    config, recipe = tiny_config(), scheme_recipe("sfp8", "sfp8")
    model = random_model(config)
    layers = [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
    method = gptq(layers, model.hidden, [torch.tensor([random_tokens(config, 8)])], recipe)
    assert not quantize_weights(model.named_parameters(), recipe, method).integers
    unchanged = random_model(config)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), unchanged.parameters(), strict=True))


def test_hessian_stops_early_and_takes_its_hook_away() -> None:
    linear = torch.nn.Linear(3, 2)
    layer = torch.nn.Sequential(linear, torch.nn.Linear(2, 4))
    x = torch.arange(6.0).view(1, 2, 3)
    assert torch.equal(hessian(layer, linear, [(x,), (x,)]), 2 * (x[0].T @ x[0]).double())
    assert layer(x).shape == (1, 2, 4)
