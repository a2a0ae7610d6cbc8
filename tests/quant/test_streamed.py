"""The streamed model against the cached eager session, which computes the same in calls of a few ids."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemma3.cache import cache_layout
from gemma3.config import ModelConfig
from gemma3.model import Gemma3, new_cache
from quant.activations import Rounding, keep_float, per_token
from quant.eager import quantized_model
from quant.integers import round_to_nearest
from quant.streamed import Streamed, Variant
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
