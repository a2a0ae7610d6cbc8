"""The streamed model against the cached eager session, which computes the same in calls of a few ids."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from gemma3.cache import cache_layout
from gemma3.config import ModelConfig
from gemma3.images import network_input
from gemma3.model import Gemma3, new_cache
from quant.activations import Rounding, keep_float, per_token
from quant.eager import quantized_model
from quant.integers import round_to_nearest
from quant.streamed import Streamed, Variant, error_of_adding
from quant.weights import QuantizedWeights, Weight
from runtime_py.proof.plan import Plan, make_plan, plan_images
from runtime_py.proof.references import encode, logits_along
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import every_position
from tests.manifests import manifest_of, seeing_manifest
from tests.shapes import SHAPES, VISION_SHAPES, random_model, tiny_config, tiny_vision_config


def integers_of(model: Gemma3) -> QuantizedWeights:
    """The weights of ``model``: linear layers in int4, the table in int8, one layer kept as it is."""
    matrices = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    tensors: dict[str, Weight] = {}
    for name, weight in model.named_parameters():
        kept = (name not in matrices and "embed_tokens" not in name) or "layers.1.mlp.up" in name
        bits, group = (8, None) if "embed_tokens" in name or "vision" in name else (4, 16)
        tensors[name] = weight if kept else round_to_nearest(weight, bits, group, pad=True)
    return QuantizedWeights(tensors, {})


def difference(
    config: ModelConfig, plan: Plan, images: NDArray[np.uint8], rounding: Rounding, dtype: torch.dtype, chunk: int
) -> float:
    """The largest difference of a logit at the plan's positions, and of a soft token, over their deviation."""
    weights = integers_of(random_model(config))
    session = EagerSession(
        quantized_model(config, weights, rounding, dtype), cache_layout(config, "ring", len(plan.ids), chunk)
    )
    model = Streamed(config, weights, [Variant(dtype, rounding), Variant()])
    soft_tokens = encode(model, images)
    expected_soft = [session.encode_image(image) for image in images]
    found = [one.astype(np.float64) for _, (one, _) in logits_along(model, plan, len(plan.ids), soft_tokens)]
    fed = every_position(session, plan.ids, plan.images_to_feed(expected_soft), frozenset(plan.positions))
    expected = [logits.astype(np.float64) for _, logits in fed]
    assert len(found) == len(expected) == len(plan.positions)
    distances = [np.abs(np.stack(found) - np.stack(expected)).max() / np.std(expected)]
    if len(images):
        soft = np.stack(expected_soft)
        distances.append(np.abs(soft_tokens[0] - soft).max() / soft.std())
    return float(max(distances))


# In float64 both give the same float32 numbers, but for the last place. A rounding turns nothing there.
LIMITS = [(torch.float64, keep_float, 1e-6), (torch.float64, per_token, 1e-6), (torch.float32, keep_float, 3e-5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding", "limit"), LIMITS)
def test_text_equals_the_cached_session(shape: str, dtype: torch.dtype, rounding: Rounding, limit: float) -> None:
    config = tiny_config(shape)
    plan = make_plan(manifest_of(config))
    assert difference(config, plan, np.zeros((0, 0, 0, 3), np.uint8), rounding, dtype, 8) < limit


@pytest.mark.parametrize("shape", VISION_SHAPES)
@pytest.mark.parametrize(("dtype", "rounding", "limit"), LIMITS)
def test_images_equal_the_cached_session(shape: str, dtype: torch.dtype, rounding: Rounding, limit: float) -> None:
    config = tiny_vision_config(shape)
    manifest = seeing_manifest(config)
    plan = make_plan(manifest)
    assert len(plan.image_places) > 2
    assert difference(config, plan, plan_images(manifest), rounding, dtype, manifest.chunk) < limit


def test_in_float64_they_are_equal_to_the_last_places() -> None:
    """The head's input, before it is made float32."""
    config = tiny_config("like-4b")
    weights = integers_of(random_model(config))
    tokens = torch.tensor([make_plan(manifest_of(config)).ids])
    (found,) = Streamed(config, weights, [Variant(torch.float64, per_token)]).hidden(tokens)
    model = quantized_model(config, weights, per_token, torch.float64)
    cache = new_cache(cache_layout(config, "ring", tokens.shape[1], 8), torch.float64)
    parts = [model.hidden(part, cache, 8 * index) for index, part in enumerate(torch.split(tokens, 8, dim=1))]
    assert (found - torch.cat(parts, dim=1)).abs().max() < 1e-12 * found.abs().max()


@pytest.mark.parametrize("terms", [640, 6912])
def test_errors_of_adding_are_as_large_as_those_of_onnx_runtime(terms: int) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (256, terms), np.uint8)
    x = random.standard_normal((64, terms), np.float32)
    expected = torch.from_numpy(x.astype(np.float64) @ (codes.T - 8.0))
    found = torch.from_numpy(product_by_onnx_runtime(x, codes))
    drawn = error_of_adding(expected, terms, torch.Generator().manual_seed(0))
    assert float(drawn.std()) == pytest.approx(float((found - expected).std()), rel=0.2)


def product_by_onnx_runtime(x: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """x [rows, terms] by codes − 8 [columns, terms], multiplied by MatMulNBits in float32."""
    (rows, terms), columns = x.shape, len(codes)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(columns, terms // 32, 16)
    scales = np.ones((columns, terms // 32), np.float32)
    sizes = {"K": terms, "N": columns, "bits": 4, "block_size": 32, "accuracy_level": 1}
    float32, domain = onnx.TensorProto.FLOAT, "com.microsoft"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain=domain, **sizes)],
        "product",
        [onnx.helper.make_tensor_value_info("x", float32, [rows, terms])],
        [onnx.helper.make_tensor_value_info("y", float32, [rows, columns])],
        [onnx.numpy_helper.from_array(packed, "codes"), onnx.numpy_helper.from_array(scales, "scales")],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(domain, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    product: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return product


def test_every_product_of_a_variant_with_errors_of_adding_has_them() -> None:
    """Of the vision model, of the text model's layers, and of the head. The same seed gives the same errors."""
    config = tiny_vision_config()
    manifest = seeing_manifest(config)
    weights, plan, images = integers_of(random_model(config)), make_plan(manifest), plan_images(manifest)
    variants = [Variant(torch.float64), Variant(torch.float64, adding=0)]

    def errors() -> list[float]:
        """Relative to each result's standard deviation."""
        model = Streamed(config, weights, variants)
        soft, soft_found = model.soft_tokens(torch.from_numpy(np.concatenate([network_input(one) for one in images])))
        x, x_found = model.hidden(torch.tensor([plan.ids[: plan.image_places[0]]]))
        ((y, y_found), *_) = model.logits([x[0], x[0]])
        pairs = ((soft, soft_found), (x, x_found), (y, y_found))
        return [float((one - two).std() / two.std()) for one, two in pairs]

    soft, hidden, logits = errors()
    assert 1e-8 < soft < 1e-5
    assert 1e-8 < hidden < 1e-5
    expected = 2**-24 * math.sqrt(config.hidden_size / 12)
    assert logits == pytest.approx(expected, rel=0.5)  # float32's own last place is of about this size
    assert errors() == [soft, hidden, logits]
