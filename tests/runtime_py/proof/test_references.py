"""References: what limits follow from is measured over the beginning of the plan, and does not change them."""

import numpy as np
import pytest

from quant.activations import per_token
from runtime_py.proof import plan as plans
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.plan import Plan, make_plan, plan_images
from runtime_py.proof.references import references
from tests.manifests import seeing_manifest
from tests.quant.test_streamed import integers_of
from tests.shapes import random_model, tiny_vision_config


def test_error_and_noise_of_the_first_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_vision_config()
    manifest = seeing_manifest(config)
    plan, images, weights = make_plan(manifest), plan_images(manifest), integers_of(random_model(config))

    def measured(plan: Plan) -> dict[str, ReferenceLogits]:
        return references(config, weights, plan, images, {"rounded": per_token}, frozenset({"rounded"}))

    whole = measured(plan)
    monkeypatch.setattr(plans, "MEASURED", plan.image_places[2] + 1)  # inside the third image
    end = plan.measured(config.vision.tokens_per_image) if config.vision else 0
    assert end == plan.image_places[2]
    early = measured(plan)
    first = [position for position in plan.positions if position < end]
    assert 0 < len(first) < len(plan.positions)
    for key, one in early.items():
        assert one.values.tobytes() == whole[key].values.tobytes()
        assert one.cost_kl.tobytes() == whole[key].cost_kl.tobytes()
    error, expected = early["float"].float_error, whole["float"].float_error[: len(first)]
    assert len(error) == len(first)
    assert np.allclose(error, expected, rtol=0.5, atol=1e-6)
    noise, expected = early["rounded"].noise_kl, whole["rounded"].noise_kl
    assert len(noise) == len(first) < len(expected)
    assert (noise > 0).any()
    assert early["rounded"].soft_noise.size > 0
