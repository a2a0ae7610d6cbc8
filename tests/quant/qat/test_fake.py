from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gemma3.model import Gemma3
from quant.activations import keep_float, per_token
from quant.eager import with_integer_weights
from quant.integers import IntegerWeight, round_to_nearest
from quant.methods import quantize_weights
from quant.qat.fake import BorrowedHead, FakeInteger, FakeSfp8, convert, prepare
from quant.recipe import Activations, scheme_recipe
from quant.sfp8 import encode_weight
from quant.weights import QuantizedWeights
from tests.shapes import random_model, random_tokens, tiny_config

RECIPES = [(scheme, table) for scheme in ("int4-block32", "int4-channel") for table in ("int8", "int4")]


def prepared(scheme: str, table: str, shape: str = "all-global") -> tuple[Gemma3, QuantizedWeights]:
    model = random_model(tiny_config(shape))
    start = quantize_weights(model.named_parameters(), scheme_recipe(scheme, table))
    prepare(model, start)
    return model, start


def nudge(model: nn.Module, seed: int = 0) -> None:
    """Change every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = 0.3 * parameter.square().mean().sqrt()
                parameter.add_(step * torch.randn(parameter.shape, generator=generator))


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    size=st.sampled_from([1, 32, 33]),
    bits=st.sampled_from([4, 8]),
    magnitude=st.floats(1e-7, 1e7),
    seed=st.integers(0, 9),
)
def test_computes_with_the_integers_of_round_to_nearest(
    rows: int, columns: int, size: int, bits: int, magnitude: float, seed: int
) -> None:
    weight = magnitude * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = round_to_nearest(weight, bits, size, pad=True)
    fake = FakeInteger(expected)
    assert torch.equal(fake(weight), expected.dequantize())
    encoded = fake.encode(weight)
    assert torch.equal(encoded.codes, expected.codes)
    assert torch.equal(encoded.scales, expected.scales)
    assert (encoded.bits, encoded.group_size) == (bits, size if columns > size else encoded.group_size)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 50.0])
def test_computes_with_sfp8(per_channel: bool, magnitude: float) -> None:
    weight = magnitude * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    expected = encode_weight(weight, per_channel=per_channel)
    fake = FakeSfp8(expected)
    assert torch.equal(fake(weight), expected.dequantize())
    moved = 1.5 * weight
    assert torch.equal(fake(moved), fake.encode(moved).dequantize())
    moved.requires_grad_(True)
    fake(moved).sum().backward()
    assert moved.grad is not None
    assert torch.equal(moved.grad, torch.ones_like(moved))


def test_the_gradient_passes_straight_through() -> None:
    torch.manual_seed(0)
    weight, upstream = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    fake = FakeInteger(round_to_nearest(weight.detach() / 2, 4, 32))
    codes = fake.encode(weight.detach()).codes
    assert bool((codes == 7).any())
    fake(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize(("scheme", "table"), RECIPES)
@pytest.mark.parametrize("shape", ["all-global", "untied"])
def test_converts_to_the_weights_that_it_computed_with(scheme: str, table: str, shape: str) -> None:
    model, start = prepared(scheme, table, shape)
    nudge(model)
    converted = convert(model, start)
    assert converted.tensors.keys() == start.tensors.keys() == converted.verdicts.keys()
    for name, weight in converted.tensors.items():
        computed: Any = model.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(weight, Tensor if name.endswith("norm.weight") else IntegerWeight)
        assert torch.equal(weight if isinstance(weight, Tensor) else weight.dequantize(), computed)
        if isinstance(weight, IntegerWeight):
            assert torch.equal(weight.scales, start.integers[name].scales)
            assert not torch.equal(weight.codes, start.integers[name].codes)
            assert str(converted.verdicts[name]).endswith(": trained")


@pytest.mark.parametrize("shape", ["all-global", "untied"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_prepared_network_is_the_quantized_reference(shape: str, activations: Activations) -> None:
    model, reference = random_model(tiny_config(shape)), random_model(tiny_config(shape))
    start = quantize_weights(model.named_parameters(), scheme_recipe("int4-block32", "int4"))
    prepare(model, start, activations)
    with_integer_weights(reference, start.integers, per_token if activations == "int8" else keep_float)
    tokens = torch.tensor([random_tokens(model.config, 20)])
    with torch.no_grad():
        assert torch.equal(model(tokens), reference(tokens))


def test_starts_from_integers_that_are_not_the_nearest() -> None:
    model = random_model(tiny_config("all-global"))
    start = quantize_weights(model.named_parameters(), scheme_recipe("int4-block32"))
    generator = torch.Generator().manual_seed(0)
    for weight in start.integers.values():
        moves = torch.randint(-2, 3, weight.codes.shape, generator=generator)
        weight.codes.add_(moves).clamp_(-8, 7)
    prepare(model, start)
    converted = convert(model, start)
    for name, weight in start.integers.items():
        assert torch.equal(converted.integers[name].codes, weight.codes), name


def test_a_tied_table_is_one_parameter_computed_once() -> None:
    model, _ = prepared("int4-block32", "int4")
    assert isinstance(model.lm_head, BorrowedHead)
    tables = [name for name, parameter in model.named_parameters() if parameter.shape == (160, 64)]
    assert tables == ["model.embed_tokens.parametrizations.weight.original"]
    calls = []
    table: Any = model.model.embed_tokens
    (fake,) = table.parametrizations.weight
    fake.register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        loss = model(torch.tensor([[1, 2, 3]])).square().sum()
    loss.backward()
    assert calls == [1]
    # Rows that only the head reads have a gradient, and those that were also looked up.
    gradient = table.parametrizations.weight.original.grad
    assert bool((gradient.abs().sum(-1) > 0).all())
