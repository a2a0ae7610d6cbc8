import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers the operators)
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.activations import fake_quantize_per_token, per_token
from quant.eager import RowsEmbedding, RowsLinear, with_integer_weights
from quant.integers import round_to_nearest
from quant.methods import quantize_weights
from quant.recipe import scheme_recipe
from tests.shapes import random_model, random_tokens, tiny_config


@given(x=arrays(np.float32, (3, 16), elements=st.floats(-1000, 1000, width=32)))
def test_rounds_to_the_nearest_of_255_steps(x: np.ndarray) -> None:
    """Equality with XNNPACK itself, bit for bit, is tested in tests/export/executorch/test_text.py."""
    tensor = torch.from_numpy(x)
    rounded = fake_quantize_per_token(tensor)
    span = tensor.amax(-1).clamp(min=0) - tensor.amin(-1).clamp(max=0)
    step = (span / 255).clamp(min=1e-29)[:, None]
    assert torch.all((rounded - tensor).abs() <= 0.501 * step)
    codes = rounded / step
    assert torch.all((codes - codes.round()).abs() < 1e-3)
    assert torch.all(codes.round().amax(-1) - codes.round().amin(-1) <= 255)


@given(x=arrays(np.float32, (3, 16), elements=st.floats(-1000, 1000, width=32)))
def test_executorch_operators_differ_by_a_step_at_most(x: np.ndarray) -> None:
    """An independent implementation. Its order of operations differs, which may round a tie the other way."""
    tensor = torch.from_numpy(x)
    ops = torch.ops.quantized_decomposed
    scale, zero_point = ops.choose_qparams_per_token_asymmetric(tensor, torch.int8)
    codes = ops.quantize_per_token(tensor, scale, zero_point, -128, 127, torch.int8)
    theirs = ops.dequantize_per_token(codes, scale, zero_point, -128, 127, torch.int8, torch.float32)
    assert torch.all((fake_quantize_per_token(tensor) - theirs).abs() <= 1.001 * scale)


def test_integers_replace_the_weights_and_the_shared_table_is_one_object() -> None:
    config = tiny_config()
    quantized = quantize_weights(random_model(config).named_parameters(), scheme_recipe("int4-block32"))
    tokens = torch.tensor([random_tokens(config, 24)])
    plain = random_model(config)(tokens)
    exact, rounded = random_model(config), random_model(config)
    with_integer_weights(exact, quantized.integers)
    with_integer_weights(rounded, quantized.integers, per_token)
    table = quantized.integers["model.embed_tokens.weight"]
    head, embedding = exact.get_submodule("lm_head"), exact.get_submodule("model.embed_tokens")
    assert isinstance(head, RowsLinear)
    assert isinstance(embedding, RowsEmbedding)
    assert head.rows is table
    assert embedding.rows is table
    dequantized = random_model(config)
    dequantized.load_state_dict({name: w.dequantize() for name, w in quantized.integers.items()}, strict=False)
    assert (exact(tokens) - dequantized(tokens)).abs().max() <= 1e-5
    scale = plain.std()
    assert 0.01 * scale < (exact(tokens) - plain).abs().mean() < scale
    assert 1e-4 * scale < (rounded(tokens) - exact(tokens)).abs().mean() < 0.1 * scale
    assert len([m for m in rounded.modules() if isinstance(m, RowsLinear)]) == 7 * config.num_layers + 1


def test_a_linear_layer_keeps_its_bias() -> None:
    linear = torch.nn.Linear(32, 5).requires_grad_(False)
    x, weight = torch.randn(3, 32), round_to_nearest(linear.weight, 8, None)
    model = with_integer_weights(torch.nn.Sequential(linear), {"0.weight": weight})
    assert torch.allclose(model(x), torch.nn.functional.linear(x, weight.dequantize(), linear.bias), atol=1e-6)
