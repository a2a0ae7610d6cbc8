"""The check of several logits in one call: right sessions pass, and one wrong row is found."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from export.target import FLOAT
from gemma3.cache import cache_layout
from gemma3.config import ModelConfig
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.limits import walk_id
from runtime_py.proof.plan import Plan, make_plan, plan_images
from runtime_py.proof.references import references
from runtime_py.proof.rows import WALK, check_rows
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Logits
from tests.manifests import CHUNK, CONTEXT, manifest_of, seeing_manifest
from tests.shapes import random_model, tiny_config, tiny_vision_config

CONFIG = tiny_config(sliding_window=12, num_hidden_layers=3, sliding_window_pattern=3)


def session_of(config: ModelConfig, kind: type[EagerSession] = EagerSession) -> EagerSession:
    return kind(random_model(config), cache_layout(config, "ring", CONTEXT, CHUNK))


def reference_of(config: ModelConfig, plan: Plan, images: NDArray[np.uint8] | None = None) -> ReferenceLogits:
    images = plan_images(manifest_of(config)) if images is None else images
    weights = QuantizedWeights(dict(random_model(config).named_parameters()), {})
    return references(config, weights, plan, images)[FLOAT]


def test_the_model_passes_against_itself() -> None:
    plan = make_plan(manifest_of(CONFIG))
    checks = check_rows(session_of(CONFIG), plan, {FLOAT: reference_of(CONFIG, plan)}, "pte")
    assert {check.id for check in checks} == {walk_id(WALK)}
    assert all(check.passed for check in checks)
    assert any(check.limit is not None for check in checks)
    assert f"({len(plan.ids)} positions)" in checks[0].name


def test_images_are_fed_between_the_calls() -> None:
    config = tiny_vision_config()
    manifest = seeing_manifest(config)
    plan = make_plan(manifest)
    reference = reference_of(config, plan, plan_images(manifest))
    checks = check_rows(seeing_session(config), plan, {FLOAT: reference}, "pte")
    assert checks
    assert all(check.passed for check in checks)


def seeing_session(config: ModelConfig) -> EagerSession:
    manifest = seeing_manifest(config)
    return EagerSession(random_model(config), cache_layout(config, "ring", manifest.context, manifest.chunk))


class Shifted(EagerSession):
    """The rows of one call are those of the positions before."""

    def verify(self, ids: Sequence[int]) -> Logits:
        rows = super().verify(ids)
        return np.roll(rows, 1, axis=0) if self.position > 40 and self.position <= 40 + len(ids) else rows


@pytest.mark.parametrize("name", [FLOAT, "int8-per-token"])
def test_a_wrong_row_is_found(name: str) -> None:
    plan = make_plan(manifest_of(CONFIG))
    reference = reference_of(CONFIG, plan)
    checks = check_rows(session_of(CONFIG, Shifted), plan, {name: reference}, "pte")
    assert not all(check.passed for check in checks)
