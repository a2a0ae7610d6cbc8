"""Rounding of keys and values to int8, and the calibration of its scales."""

import math
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma3.data import pack
from quant.eager import quantized_model
from quant.kv import LARGEST, MARGIN, SMALLEST, PerChannel, calibrate, calibration_rows, codes_of, rounded, scales_of
from quant.quantize import in_recipe
from quant.source import open_source
from tests.shapes import random_model, random_tokens, tiny_config

scales = st.floats(2.0**-20, 2.0**20, width=32)
values = st.floats(-(2.0**20), 2.0**20, width=32)


@given(st.lists(st.tuples(values, scales), min_size=1, max_size=16))
def test_each_channel_is_rounded_to_the_nearest_code_that_there_is(pairs: list[tuple[float, float]]) -> None:
    x = torch.tensor([value for value, _ in pairs])[None, None, None]  # [1, 1, 1, D]
    scale = torch.tensor([[scale for _, scale in pairs]])  # [1, D]
    codes, out = codes_of(x, scale).flatten().tolist(), rounded(x, scale).flatten().tolist()
    for (value, step), code, result in zip(pairs, codes, out, strict=True):
        assert code == int(code)
        assert SMALLEST <= code <= LARGEST
        exact = min(max(value / step, SMALLEST), LARGEST)
        # The kernel multiplies by the reciprocal, so a value near the middle of two codes may get either.
        assert abs(code - exact) <= 0.5 + 256 * 2.0**-23
        assert math.isclose(result, code * step, rel_tol=1e-6)
    assert torch.equal(rounded(rounded(x, scale), scale), rounded(x, scale))


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 500.0, -500.0]).view(1, 1, 1, -1)
    assert codes_of(x, torch.ones(1, 9)).flatten().tolist() == [-2, -2, 0, 0, 2, 2, 126, 127, -128]


def test_scales_reach_beyond_the_largest_value_and_are_never_zero() -> None:
    found = scales_of(torch.tensor([[0.0, 1.0, 127.0]]))
    assert torch.allclose(found * LARGEST, MARGIN * torch.tensor([[1.0, 1.0, 127.0]]))
    assert (scales_of(torch.zeros(2, 4)) > 0).all()


def test_the_network_rounds_keys_and_values_with_and_without_a_cache() -> None:
    model = random_model(tiny_config(num_hidden_layers=7))
    ids = torch.tensor([random_tokens(model.config, 20)])
    plain = model(ids)
    scale = torch.full((model.config.num_key_value_heads, model.config.head_dim), 0.05)
    model.round_heads(dict.fromkeys(range(7), PerChannel(scale, scale)))
    coarse = model(ids)
    assert (coarse - plain).abs().max() > 1e-3
    model.round_heads({})
    assert torch.equal(model(ids), plain)


def test_calibration_sees_the_largest_keys_and_values_of_the_text(checkpoint: Path, text: Path) -> None:
    quantized = in_recipe(open_source(checkpoint))
    found = calibrate(quantized, calibration_rows(quantized, [text], tokens=10**6))
    config = quantized.config
    rows = torch.from_numpy(pack([text], quantized.tokenizer, min(256, config.max_position_embeddings), config).tokens)
    model = quantized_model(config, quantized.weights)
    values: list[torch.Tensor] = []
    model.model.layers[0].get_submodule("self_attn.v_proj").register_forward_hook(
        lambda _, __, output: values.append(output.abs().flatten(0, 1).amax(0))
    )
    for row in rows.long():
        model.hidden(row[None])
    largest = torch.stack(values).amax(0)
    assert torch.equal(found[0].values, scales_of(largest.view(config.num_key_value_heads, config.head_dim)))
    assert found.keys() == set(range(config.num_layers))
