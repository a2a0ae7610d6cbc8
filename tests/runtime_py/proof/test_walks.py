from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checks import Check
from export.target import FLOAT
from gemma3.cache import cache_layout
from gemma3.images import Pixels
from gemma3.model import Gemma3
from quant.activations import keep_float, per_token
from quant.eager import quantized_model
from quant.integers import IntegerWeight, round_to_nearest
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.limits import (
    COST,
    KL_MAX,
    KL_MEAN,
    MOST_COST,
    NOISE,
    PEAK_NOISE,
    float_limits,
    rounded_limits,
    tolerances,
)
from runtime_py.proof.plan import Plan, make_plan, plan_images
from runtime_py.proof.references import references
from runtime_py.proof.table import validation_table
from runtime_py.proof.walks import ACTIVATIONS, advice_on_rounding, check_session
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Call, Image, Logits, Session, SoftTokens, soft_tokens_of
from tests.manifests import CHUNK, CONTEXT, manifest_of, seeing_manifest
from tests.shapes import VISION_SHAPES, random_model, tiny_config, tiny_vision_config

WINDOW = 12
ROUNDED = "int8-per-token"


def check(session: Session, plan: Plan, reference: ReferenceLogits, artifact: str, name: str = FLOAT) -> list[Check]:
    """The checks by the limits of the reference ``name``: FLOAT, or a rounding, of which none is measured here."""
    return check_session(session, plan, reference, artifact, tolerances(plan, reference, name))


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return random_model(tiny_config(sliding_window=WINDOW, num_hidden_layers=3, sliding_window_pattern=3))


@pytest.fixture(scope="module")
def plan(model: Gemma3) -> Plan:
    return make_plan(manifest_of(model.config))


def session_of(model: Gemma3) -> EagerSession:
    return EagerSession(model, cache_layout(model.config, "ring", CONTEXT, CHUNK))


def reference_of(model: Gemma3, plan: Plan, images: NDArray[np.uint8] | None = None) -> ReferenceLogits:
    images = np.zeros((0, 0, 0, 3), np.uint8) if images is None else images
    return references(model.config, weights_of(model), plan, images)[FLOAT]


def weights_of(model: Gemma3, integers: Mapping[str, IntegerWeight] | None = None) -> QuantizedWeights:
    """The weights of ``model``, some of them as ``integers``."""
    return QuantizedWeights({**dict(model.named_parameters()), **(integers or {})}, {})


@pytest.fixture(scope="module")
def reference(model: Gemma3, plan: Plan) -> ReferenceLogits:
    return reference_of(model, plan)


def failed(checks: list[Check]) -> set[str]:
    return {check.metric for check in checks if not check.passed}


# What must pass and what must fail


def test_the_model_passes_against_itself(model: Gemma3, plan: Plan, reference: ReferenceLogits) -> None:
    checks = check(session_of(model), plan, reference, "pte")
    assert not failed(checks)
    assert sum(check.limit is not None for check in checks) >= 10


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
@pytest.mark.parametrize("name", [FLOAT, ROUNDED])
def test_a_window_off_by_one_is_caught(
    model: Gemma3, plan: Plan, reference: ReferenceLogits, window: int, name: str
) -> None:
    other = Gemma3(replace(model.config, sliding_window=window)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check(session_of(other), plan, reference, "pte", name))


def test_a_ring_too_small_for_its_chunk_is_caught(model: Gemma3, plan: Plan, reference: ReferenceLogits) -> None:
    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    short = replace(layout, layers=tuple(replace(one, slots=min(one.slots, WINDOW + 2)) for one in layout.layers[:2]))
    short = replace(short, layers=(*short.layers, layout.layers[2]))
    assert failed(check(EagerSession(model, short), plan, reference, "pte", ROUNDED))


def test_a_fault_at_one_position_is_not_averaged_away(model: Gemma3, plan: Plan, reference: ReferenceLogits) -> None:
    class OneBadPosition(EagerSession):
        def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
            logits = super().prefill(ids, images)
            return logits[::-1].copy() if self.position == 51 else logits

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    checks = check(OneBadPosition(model, layout), plan, reference, "onnx", ROUNDED)
    assert "kl_max" in failed(checks)
    worst = {check.value for check in checks if check.metric == "kl_worst_position" and "one-by-one" in check.id}
    assert worst == {50}


def test_a_reset_that_leaves_something_behind_is_caught(model: Gemma3, plan: Plan, reference: ReferenceLogits) -> None:
    class Sticky(EagerSession):
        resets = 0

        def reset(self) -> None:
            super().reset()
            self.resets += 1

        def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
            return super().prefill(ids, images) + np.float32(1e-7 * (self.resets > 1))

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    checks = check(Sticky(model, layout), plan, reference, "pte")
    assert [check.name for check in checks if not check.passed] == ["odd sizes again after a reset"]


def test_not_a_number_does_not_pass(model: Gemma3, plan: Plan, reference: ReferenceLogits) -> None:
    class Broken(EagerSession):
        def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
            return super().prefill(ids, images) * np.float32("nan")

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    for name in (FLOAT, ROUNDED):
        assert failed(check(Broken(model, layout), plan, reference, "pte", name))


@pytest.mark.parametrize("name", [FLOAT, ROUNDED])
@pytest.mark.parametrize("place", [(1, 51), (5, 40)], ids=["in a walk", "after a reset"])
def test_one_position_without_numbers_does_not_pass(
    model: Gemma3, plan: Plan, reference: ReferenceLogits, place: tuple[int, int], name: str
) -> None:
    class Broken(EagerSession):
        resets = 0

        def reset(self) -> None:
            super().reset()
            self.resets += 1

        def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
            logits = super().prefill(ids, images)
            walk, position = place
            start, end = self.position - len(ids), self.position
            return logits * np.float32("nan") if self.resets == walk and start < position <= end else logits

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    assert failed(check(Broken(model, layout), plan, reference, "pte", name))


def test_golden_positions_alone_catch_a_window_off_by_one(
    model: Gemma3, plan: Plan, reference: ReferenceLogits
) -> None:
    golden = reference.at(plan.golden_positions)
    assert not failed(check(session_of(model), plan, golden, "pte"))
    other = Gemma3(replace(model.config, sliding_window=WINDOW - 1)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check(session_of(other), plan, golden, "onnx", ROUNDED))


def test_limits_for_rounded_activations_follow_the_noise_of_the_reference_itself(model: Gemma3, plan: Plan) -> None:
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    integers = {name: round_to_nearest(model.get_parameter(name), 8, None) for name in linears if "lm_head" not in name}
    weights, images = weights_of(model, integers), np.zeros((0, 0, 0, 3), np.uint8)
    kept, rounded = (quantized_model(model.config, weights, rounding) for rounding in (keep_float, per_token))
    reference = references(model.config, weights, plan, images, {ROUNDED: per_token})[ROUNDED]
    assert not reference.noise_kl.any()
    assert 1e-7 < reference.cost_kl.mean() < reference.cost_kl.max() < 1e-2
    calm = replace(reference, cost_kl=reference.cost_kl * 0)
    assert rounded_limits(calm, 1) == replace(rounded_limits(calm, 1), kl_mean=KL_MEAN, kl_max=KL_MAX)

    noisy = references(model.config, weights, plan, images, {ROUNDED: per_token}, frozenset({ROUNDED}))[ROUNDED]
    assert (noisy.values == reference.values).all()
    limits = rounded_limits(noisy, 10)
    mean, peak, cost = (float(value) for value in (noisy.noise_kl.mean(), noisy.noise_kl.max(), noisy.cost_kl.mean()))
    peak = min(peak, MOST_COST / PEAK_NOISE * float(noisy.cost_kl.max()))
    average = NOISE * mean + PEAK_NOISE * peak / 10
    assert limits.kl_mean == pytest.approx(max(1e-5, min(average, MOST_COST * cost), COST * cost))
    highest = float(noisy.cost_kl.max())
    assert limits.kl_max == max(1e-4, min(PEAK_NOISE * peak, MOST_COST * highest), COST * highest)
    assert 1e-12 < noisy.noise_kl.max() < 1e-2
    assert rounded_limits(noisy.at([5]), 10) == limits
    checks = check(session_of(rounded), plan, noisy, "pte", ROUNDED)
    assert not failed(checks)
    assert {"noise", "activations"} <= {check.id for check in checks}
    # A model that rounds nothing fails.
    assert failed(check(session_of(kept), plan, noisy, "pte", ROUNDED))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0, 1e3])
def test_limits_for_float_activations_follow_the_size_of_the_logits(
    plan: Plan, model: Gemma3, reference: ReferenceLogits, scale: float
) -> None:
    scaled = random_model(model.config)
    scaled.model.norm.weight.copy_((1 + model.model.norm.weight) * scale - 1)
    measured = reference_of(scaled, plan)
    limits = float_limits(measured)
    assert limits.max_abs is not None
    deviation = float(measured.values.std())
    assert 1e-7 * deviation < float(measured.float_error.max()) < 1e-5 * deviation
    assert limits.max_abs < 1e-4 * deviation
    assert not failed(check(session_of(scaled), plan, measured, "onnx"))
    wrong = Gemma3(replace(model.config, sliding_window=WINDOW - 1)).requires_grad_(False)
    wrong.load_state_dict(scaled.state_dict())
    assert failed(check(session_of(wrong), plan, measured, "onnx"))


def test_limits_of_rounded_activations_in_figures(reference: ReferenceLogits) -> None:
    """By hand, so that a factor cannot change unnoticed. Noise: mean 1e-4, peak 8e-4. Cost: mean 5e-4, peak 4e-3."""
    noise = np.asarray([8e-4, *[0.0] * 7], np.float32)
    cost = np.asarray([4e-3, *[0.0] * 7], np.float32)
    soft_noise, soft_cost = np.asarray([1e-3], np.float32), np.asarray([9e-3], np.float32)
    measured = replace(reference, noise_kl=noise, cost_kl=cost, soft_noise=soft_noise, soft_cost=soft_cost)
    many, few = rounded_limits(measured, 1000), rounded_limits(measured, 2)
    assert many.kl_mean == pytest.approx(2.5e-4)  # half the cost, which is over 2 × noise + 4 × peak / 1000
    assert few.kl_mean == pytest.approx(2 * 1e-4 + 4 * 8e-4 / 2)
    assert rounded_limits(measured, 1).kl_mean == pytest.approx(4 * 5e-4)  # the most that noise may excuse
    assert many.kl_max == few.kl_max == pytest.approx(4 * 8e-4)
    assert many.soft_rms == pytest.approx(9e-3 * 2**-0.5)
    odd = rounded_limits(replace(measured, noise_kl=noise * 50), 1000)  # noise far over the cost: the cost bounds it
    assert odd.kl_mean == pytest.approx(4 * 5e-4)
    assert odd.kl_max == pytest.approx(4 * 4e-3)
    calm = rounded_limits(replace(measured, noise_kl=noise * 0, cost_kl=cost * 0), 10)
    assert (calm.kl_mean, calm.kl_max) == (1e-5, 1e-4)


def test_limits_of_float_activations_in_figures(reference: ReferenceLogits) -> None:
    values = np.zeros_like(reference.values)
    values[:, 7] = 10.0
    measured = replace(reference, values=values, float_error=np.asarray([1e-5, 3e-5], np.float32))
    assert float_limits(measured).max_abs == pytest.approx(1.2e-4)
    exact = replace(measured, float_error=np.asarray([0.0], np.float32))
    assert float_limits(exact).max_abs == pytest.approx(10 * 16 * 2**-23)


def test_a_near_tie_may_fall_out_either_way(plan: Plan, reference: ReferenceLogits) -> None:
    tied = reference.values.copy()
    tied[0, :2] = tied[0].max() + 1
    assert float_limits(replace(reference, values=tied)).top1_agreement == 1 - 1 / len(reference.positions)
    assert float_limits(reference).top1_agreement == 1.0


# Images


@pytest.fixture(scope="module", params=VISION_SHAPES)
def seeing(request: pytest.FixtureRequest) -> tuple[Gemma3, Plan, ReferenceLogits]:
    model = random_model(tiny_vision_config(request.param))
    plan = make_plan(seeing_manifest(model.config))
    return model, plan, reference_of(model, plan, plan_images(seeing_manifest(model.config)))


def seeing_session(model: Gemma3, kind: type[EagerSession] = EagerSession) -> EagerSession:
    vision = model.config.vision
    assert vision is not None
    return kind(model, cache_layout(model.config, "ring", 128, max(CHUNK, vision.tokens_per_image)))


def test_a_multimodal_model_passes_against_itself(seeing: tuple[Gemma3, Plan, ReferenceLogits]) -> None:
    model, plan, reference = seeing
    checks = check(seeing_session(model), plan, reference, "pte")
    assert not failed(checks)
    soft = [check.value for check in checks if check.metric == "soft_rms"]
    assert len(soft) == 2
    assert max(soft) < 1e-6  # the reference encodes both images at once, and adds in another order
    assert sum("landmark/image" in check.id for check in checks) == 2 * len(plan.image_places)


class CausalImages(EagerSession):
    """Feeds an image's soft tokens one by one, so that none attends to those after it."""

    def call(self, call: Call, wanted: Collection[int] | None = None) -> list[tuple[int, Logits]]:
        if call.image is None:
            return super().call(call, wanted)
        for soft_token in soft_tokens_of(self, call.image):
            logits = self.model(
                torch.tensor([call.ids[:1]]),
                self._cache,
                self.position,
                soft_tokens=torch.tensor(soft_token[None, None]),
            )
            self.position += 1
        return [(self.position - 1, logits[0, -1].numpy())]


class SwappedImages(EagerSession):
    """Reverses the order of a prompt's images."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        return super().prefill(ids, images[::-1])


class ShiftedImages(EagerSession):
    """Rotates the order of an image's soft tokens."""

    def encode_image(self, image: Pixels) -> SoftTokens:
        return np.roll(super().encode_image(image), 1, axis=0)


class BgrImages(EagerSession):
    def encode_image(self, image: Pixels) -> SoftTokens:
        return super().encode_image(image[..., ::-1])


@pytest.mark.parametrize("fault", [CausalImages, SwappedImages, ShiftedImages, BgrImages])
@pytest.mark.parametrize("name", [FLOAT, ROUNDED])
@pytest.mark.parametrize("golden", [False, True])
def test_faults_with_images_are_caught(
    seeing: tuple[Gemma3, Plan, ReferenceLogits], fault: type[EagerSession], name: str, golden: bool
) -> None:
    model, plan, reference = seeing
    kept = reference.at(plan.golden_positions) if golden else reference
    checks = check(seeing_session(model, fault), plan, kept, "pte", name)
    assert failed(checks) - {"soft_rms"}
    assert ("soft_rms" in failed(checks)) == (fault in (ShiftedImages, BgrImages))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_is_caught_with_images_too(
    seeing: tuple[Gemma3, Plan, ReferenceLogits], change: int
) -> None:
    model, plan, reference = seeing
    other = Gemma3(replace(model.config, sliding_window=model.config.sliding_window + change)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check(seeing_session(other), plan, reference, "onnx", ROUNDED))


def test_the_noise_of_the_vision_model_is_measured(seeing: tuple[Gemma3, Plan, ReferenceLogits]) -> None:
    model, plan, reference = seeing
    assert ((reference.soft_noise > 1e-9) & (reference.soft_noise < 1e-5)).all()  # of float32 against float64
    images = reference.images
    noisy = references(model.config, weights_of(model), plan, images, {"r": keep_float}, frozenset({"r"}))["r"]
    assert ((noisy.soft_noise > 1e-9) & (noisy.soft_noise < 1e-5)).all()


def test_the_table_marks_failed_checks() -> None:
    checks = [
        Check("pte", "id", "kl_mean", "walk", 0.5, 1e-3, False),
        Check("pte", "id", "max_abs", "walk", 1, None, True),
    ]
    assert validation_table(checks).splitlines() == [
        "| artifact | check | max_abs |    kl_mean |",
        "| -------- | ----- | ------: | ---------: |",
        "| pte      | walk  |       1 | 0.5 FAILED |",
        "",
        "limits of pte, id: kl_mean ≤ 0.001",
    ]


def test_advice_names_what_is_rounded() -> None:
    def cost(format: str, value: float) -> Check:
        return Check(format, ACTIVATIONS, "kl_mean", "what rounding costs", value, None, True)

    checks = [cost("pte", 0.02), cost("onnx", 0.03)]
    pte, onnx = advice_on_rounding(checks, keep_float=["onnx"])
    assert pte.startswith(".pte: rounding activations")
    assert onnx.startswith(".onnx: an int8 KV cache costs a KL divergence of 0.03 nats")
    assert advice_on_rounding([cost("pte", 0.005)]) == []
