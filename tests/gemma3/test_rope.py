"""Angles of RoPE far out in the context, against transformers, float64 and the runtimes' own functions."""

import math
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from gemma3.config import FULL
from gemma3.model import inverse_frequencies, rope_angles
from tests.shapes import SHAPES, tiny_config

CONTEXT = 131_072
FACTOR = 8.0
POSITIONS = torch.tensor([0, 1, 511, 1024, 32_767, 32_768, 65_535, CONTEXT - 2, CONTEXT - 1])
SCALED: dict[str, Any] = {
    "rope_scaling": {"rope_type": "linear", "factor": FACTOR},
    "head_dim": 256,
    "max_position_embeddings": CONTEXT,
}


def test_scaled_angles_at_the_end_of_128k_are_those_of_transformers() -> None:
    config = tiny_config("like-4b", **SCALED)
    spec = next(spec for spec in config.layers if spec.kind == FULL)
    assert spec.rope.factor == FACTOR
    cos, sin = rope_angles(spec, POSITIONS)
    oracle = Gemma3RotaryEmbedding(Gemma3TextConfig(**(SHAPES["like-4b"] | SCALED)))
    theirs = oracle(torch.zeros(1, 1, 1), POSITIONS[None], FULL)
    for ours, other in zip((cos, sin), theirs, strict=True):
        assert torch.equal(ours, other[0, :, :128])


def test_angles_are_exact_to_the_rounding_of_a_float32_product() -> None:
    """The angle of the first element is position / 8 radians: 16 384 at the end, with half a unit of 2^-10."""
    spec = next(spec for spec in tiny_config("like-4b", **SCALED).layers if spec.kind == FULL)
    cos, sin = rope_angles(spec, POSITIONS)
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    angles = POSITIONS[:, None].double() / FACTOR / spec.rope.theta**exponents
    # Half a unit in the last place of the frequency, and as much of the product, and of cos and sin themselves.
    bound = angles * 1.5 * 2.0**-23 + 2.0**-23
    for found, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert ((found.double() - exact).abs() <= bound).all()
    assert bound.max() < 3.5e-3
    assert math.isclose(float(angles.max()), (CONTEXT - 1) / FACTOR)


def test_onnx_runtime_computes_sin_and_cos_of_large_angles() -> None:
    """Both take the same float32 angles, up to 131 071 radians."""
    local, whole = (inverse_frequencies(spec) for spec in dict.fromkeys(tiny_config("like-4b", **SCALED).layers))
    angles = torch.cat([POSITIONS[:, None].float() * one for one in (local, whole)], dim=-1)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["S", "D"]) for name in ("x", "cos", "sin")]
    nodes = [helper.make_node("Cos", ["x"], ["cos"]), helper.make_node("Sin", ["x"], ["sin"])]
    graph = helper.make_graph(nodes, "angles", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": angles.numpy()})
    exact = angles.double()
    for one, wanted in zip(found, (exact.cos(), exact.sin()), strict=True):
        assert np.abs(one - wanted.numpy()).max() <= 1e-6
