import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from export.executorch.target import PTE
from export.onnx.file import load_graph, read_initializer
from export.onnx.target import ONNX
from export.onnx.write import export_onnx
from export.stand_ins import for_target, stand_in
from export.target import Target
from gemma3.cache import cache_layout
from quant.eager import quantized_model
from quant.methods import quantize_weights
from quant.recipe import Verdict, scheme_recipe
from quant.sfp8 import Sfp8Weight, encode_weight
from quant.weights import QuantizedWeights, Weight
from runtime_py.sessions.onnx import OnnxSession
from tests.shapes import random_model, random_tokens, tiny_config


@given(
    values=arrays(np.float32, (3, 40), elements=st.floats(-4, 4, width=32)),
    per_channel=st.booleans(),
    target=st.sampled_from([PTE, ONNX]),
)
def test_the_reported_noise_is_that_of_the_integers(values: np.ndarray, per_channel: bool, target: Target) -> None:
    weight = encode_weight(torch.from_numpy(values), per_channel=per_channel)
    integers, decibels = stand_in(weight, target.stand_ins["sfp8"])
    assert (integers.bits, integers.group_size) == (8, 32 if target is ONNX else 40)
    exact, found = weight.dequantize().double(), integers.dequantize().double()
    noise = float((exact - found).square().sum())
    if noise == 0:
        assert decibels == math.inf
    else:
        assert noise == pytest.approx(float(exact.square().sum()) * 10 ** (-decibels / 10), rel=1e-6)


@pytest.mark.parametrize(("target", "least"), [(ONNX, 43.0), (PTE, 40.0)])
def test_gaussian_weights(target: Target, least: float) -> None:
    """SFP8's own noise is about 31 dB below the weights that it encodes, so its stand-ins add little."""
    values = torch.randn(64, 640, generator=torch.Generator().manual_seed(0)) / 25
    weight = encode_weight(values, per_channel=False)
    _, decibels = stand_in(weight, target.stand_ins["sfp8"])
    assert least < decibels < least + 4


def test_only_sfp8_is_replaced_and_the_verdict_says_so() -> None:
    weights = quantize_weights(random_model(tiny_config()).named_parameters(), scheme_recipe("sfp8", "int8"))
    ready, stand_ins = for_target(weights, ONNX)
    decibels = {name: one.decibels for name, one in stand_ins.items()}
    assert {(one.kind, one.scheme) for one in stand_ins.values()} == {("sfp8", "int8-block32-padded")}
    assert ready.tensors.keys() == weights.tensors.keys()
    assert not any(isinstance(weight, Sfp8Weight) for weight in ready.tensors.values())
    assert decibels.keys() == {name for name, weight in weights.tensors.items() if isinstance(weight, Sfp8Weight)}
    for name, weight in weights.tensors.items():
        if name in decibels:
            assert str(ready.verdicts[name]) == (
                f"{weights.verdicts[name]}; as int8-block32-padded, {decibels[name]:.1f} dB from its values"
            )
        else:
            assert ready.tensors[name] is weight
            assert ready.verdicts[name] == weights.verdicts[name]


@pytest.mark.parametrize("shape", ["like-4b", "untied"])
def test_the_exact_onnx_keeps_the_codes_and_equals_eager(shape: str, tmp_path: Path) -> None:
    config = tiny_config(shape)
    named = dict(random_model(config).named_parameters())
    # gemma.cpp's scale for the table, one scale per row for the rest
    sfp8 = {name: encode_weight(w, per_channel="embed" not in name) for name, w in named.items() if w.dim() == 2}
    tensors: dict[str, Weight] = {**named, **sfp8}
    weights = QuantizedWeights(tensors, dict.fromkeys(named, Verdict("float32", "")))
    layout = cache_layout(config, "compacting", 128, chunk=8)
    path = tmp_path / "model.onnx"
    export_onnx(config, weights.tensors, layout, path)

    initializers = {tensor.name: tensor for tensor in load_graph(path).graph.initializer}
    for name, weight in sfp8.items():
        stored = read_initializer(path, initializers[f"{name}.codes"])
        assert stored.dtype == np.uint8
        assert np.array_equal(stored, weight.codes.numpy())
    size = path.with_name("model.onnx.data").stat().st_size
    assert size < 1.1 * weights.ideal_bytes

    ids = random_tokens(config, 60)
    with torch.no_grad():
        expected = quantized_model(config, weights)(torch.tensor([ids]))[0].numpy()
    session = OnnxSession(path, layout, config, threads=1)
    for start in range(0, 60, 6):
        assert np.abs(session.prefill(ids[start : start + 6]) - expected[start + 5]).max() <= 1e-4
