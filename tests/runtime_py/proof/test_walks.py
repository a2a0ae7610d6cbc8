from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from export.manifest import SCHEMA_VERSION, Artifact, Check, Manifest, TokenizerInfo
from gemma3.cache import COMPACTING_SLACK, cache_layout
from gemma3.config import ModelConfig, parse_config
from gemma3.model import Gemma3
from quant.activations import with_integer_weights
from quant.integers import round_to_nearest
from runtime_py.proof.golden import Reference
from runtime_py.proof.plan import Plan, local_slots, make_plan
from runtime_py.proof.walks import (
    FLOAT_LIMITS,
    INTEGER_LIMITS,
    NOISE,
    PEAK_NOISE,
    Limits,
    check_session,
    limits_for,
    validation_table,
    with_noise_limits,
)
from runtime_py.sessions.eager import EagerSession, record, with_noise
from runtime_py.sessions.protocol import Image, Logits, Piece, Pixels, SoftTokens, soft_tokens_of
from scripts.random_checkpoint import SHAPES
from tests.shapes import VISION_SHAPES, random_model, tiny_config, tiny_vision_config

CONTEXT, CHUNK, WINDOW = 96, 8, 12


def manifest_of(config: ModelConfig, context: int = CONTEXT, chunk: int = CHUNK, verdict: str = "float32") -> Manifest:
    def artifact(style: str) -> Artifact:
        layout = cache_layout(config, style, context, chunk)  # type: ignore[arg-type]
        return Artifact("model", layout, (), "float", {}, {}, 1, 1, 1, {}, {})

    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=config,
        recipe="",
        rules={},
        method="rtn",
        weights={"a": verdict},
        context=context,
        chunk=chunk,
        reference_dtype="float32",
        tokenizer=TokenizerInfo("", 2, (1,), 0, "gemma3"),
        artifacts={"pte": artifact("ring"), "onnx": artifact("compacting")},
        files={},
        validation=(),
    )


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return random_model(tiny_config(sliding_window=WINDOW, num_hidden_layers=3, sliding_window_pattern=3))


@pytest.fixture(scope="module")
def plan(model: Gemma3) -> Plan:
    return make_plan(manifest_of(model.config))


def session_of(model: Gemma3) -> EagerSession:
    return EagerSession(model, cache_layout(model.config, "ring", CONTEXT, CHUNK))


@pytest.fixture(scope="module")
def reference(model: Gemma3, plan: Plan) -> Reference:
    return record(session_of(model), plan)


def failed(checks: list[Check]) -> set[str]:
    return {check.metric for check in checks if not check.passed}


# The plan


def test_every_walk_feeds_the_whole_sequence_in_order(plan: Plan) -> None:
    for pieces in plan.walks.values():
        assert sum(pieces) == len(plan.ids)
        assert min(pieces) >= 1
    assert set(plan.walks["one by one"]) == {1}


def test_landmarks_are_the_window_and_the_wraps(plan: Plan) -> None:
    positions = plan.landmarks
    assert (positions["W−1"], positions["W"], positions["W+1"], positions["2W"]) == (11, 12, 13, 24)
    # 12 + 8 − 1 slots, rounded up to 8; and the window with its slack
    assert [positions[f"wrap {turn} of 24 slots"] for turn in (1, 2, 3)] == [24, 48, 72]
    compacting = WINDOW + COMPACTING_SLACK
    assert positions[f"wrap 2 of {compacting} slots"] == 2 * compacting
    assert positions["last"] == CONTEXT - 1


def test_a_real_shape_is_stepped_over_near_its_landmarks_only() -> None:
    config = tiny_config(sliding_window=512, max_position_embeddings=32768)
    plan = make_plan(manifest_of(config, context=32768, chunk=128))
    # four windows past the first wrap of the ring, the larger of the two
    assert len(plan.ids) == 640 + 4 * 512
    steps = plan.walks["one by one"]
    assert len(steps) < 600
    ends = {sum(steps[: count + 1]) - 1 for count in range(len(steps))}
    for position in plan.landmarks.values():
        around = range(max(0, position - 16), min(position + 17, len(plan.ids)))
        assert ends.issuperset(around)
    assert set(plan.golden_positions) <= set(plan.positions)
    assert all(before < after for before, after in pairwise(plan.positions))


def test_a_context_that_ends_early_is_covered_to_its_end() -> None:
    config = tiny_config(sliding_window=WINDOW)
    plan = make_plan(manifest_of(config, context=16, chunk=16))
    assert len(plan.ids) == 16
    assert all(sum(pieces) == 16 for pieces in plan.walks.values())


# What passes and what must not


def test_the_model_passes_against_itself(model: Gemma3, plan: Plan, reference: Reference) -> None:
    checks = check_session(session_of(model), plan, reference, "pte", FLOAT_LIMITS)
    assert not failed(checks)
    assert sum(check.limit is not None for check in checks) >= 10


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
@pytest.mark.parametrize("limits", [FLOAT_LIMITS, *INTEGER_LIMITS.values()])
def test_a_window_off_by_one_is_caught(
    model: Gemma3, plan: Plan, reference: Reference, window: int, limits: Limits
) -> None:
    other = Gemma3(replace(model.config, sliding_window=window)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check_session(session_of(other), plan, reference, "pte", limits))


def test_a_ring_too_small_for_its_chunk_is_caught(model: Gemma3, plan: Plan, reference: Reference) -> None:
    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    short = replace(layout, layers=tuple(replace(one, slots=min(one.slots, WINDOW + 2)) for one in layout.layers[:2]))
    short = replace(short, layers=(*short.layers, layout.layers[2]))
    assert failed(check_session(EagerSession(model, short), plan, reference, "pte", INTEGER_LIMITS["onnx"]))


def test_a_fault_at_one_position_does_not_drown(model: Gemma3, plan: Plan, reference: Reference) -> None:
    class OneBadPosition(EagerSession):
        def prefill(self, ids: object, images: object = ()) -> Logits:
            logits = super().prefill(ids, images)  # type: ignore[arg-type]
            return logits[::-1].copy() if self.position == 51 else logits

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    checks = check_session(OneBadPosition(model, layout), plan, reference, "onnx", INTEGER_LIMITS["onnx"])
    assert "kl_max" in failed(checks)
    worst = {check.value for check in checks if check.metric == "kl_worst_position" and "one by one" in check.name}
    assert worst == {50}


def test_a_reset_that_leaves_something_behind_is_caught(model: Gemma3, plan: Plan, reference: Reference) -> None:
    class Sticky(EagerSession):
        resets = 0

        def reset(self) -> None:
            super().reset()
            self.resets += 1

        def prefill(self, ids: object, images: object = ()) -> Logits:
            return super().prefill(ids, images) + np.float32(1e-7 * (self.resets > 1))  # type: ignore[arg-type]

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    checks = check_session(Sticky(model, layout), plan, reference, "pte", FLOAT_LIMITS)
    assert [check.name for check in checks if not check.passed] == ["odd sizes again after a reset"]


def test_not_a_number_does_not_pass(model: Gemma3, plan: Plan, reference: Reference) -> None:
    class Broken(EagerSession):
        def prefill(self, ids: object, images: object = ()) -> Logits:
            return super().prefill(ids, images) * np.float32("nan")  # type: ignore[arg-type]

    layout = cache_layout(model.config, "ring", CONTEXT, CHUNK)
    for limits in (FLOAT_LIMITS, INTEGER_LIMITS["onnx"]):
        assert failed(check_session(Broken(model, layout), plan, reference, "pte", limits))


def test_golden_positions_alone_catch_it_too(model: Gemma3, plan: Plan, reference: Reference) -> None:
    golden = reference.at(plan.golden_positions)
    assert not failed(check_session(session_of(model), plan, golden, "pte", FLOAT_LIMITS))
    other = Gemma3(replace(model.config, sliding_window=WINDOW - 1)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check_session(session_of(other), plan, golden, "onnx", INTEGER_LIMITS["onnx"]))


def test_rounded_activations_get_the_noise_that_the_reference_itself_has(model: Gemma3, plan: Plan) -> None:
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    integers = {name: round_to_nearest(model.get_parameter(name), 8, None) for name in linears if "lm_head" not in name}
    rounded = random_model(model.config)
    with_integer_weights(rounded, integers, "int8")
    reference = record(session_of(rounded), plan)
    assert with_noise_limits(INTEGER_LIMITS["pte"], reference, 1) == INTEGER_LIMITS["pte"]

    noisy = with_noise(reference, session_of(rounded), plan)
    limits = with_noise_limits(INTEGER_LIMITS["pte"], noisy, 10)
    mean, peak = float(noisy.noise_kl.mean()), float(noisy.noise_kl.max())
    assert limits.kl_mean == max(1e-5, NOISE * mean + PEAK_NOISE * peak / 10)
    assert limits.kl_max == max(1e-4, PEAK_NOISE * peak)
    assert 1e-12 < noisy.noise_kl.max() < 1e-2
    assert with_noise_limits(INTEGER_LIMITS["pte"], noisy.at([5]), 10) == limits
    checks = check_session(session_of(rounded), plan, noisy, "pte", INTEGER_LIMITS["pte"])
    assert not failed(checks)
    assert any("nudged" in check.name for check in checks)
    # The nudge is gone again, and a model that rounds nothing is told apart.
    assert (record(session_of(rounded), plan).values == reference.values).all()
    assert failed(check_session(session_of(model), plan, noisy, "pte", INTEGER_LIMITS["pte"]))


# Images


@pytest.fixture(scope="module", params=VISION_SHAPES)
def seeing(request: pytest.FixtureRequest) -> tuple[Gemma3, Plan, Reference]:
    model = random_model(tiny_vision_config(request.param))
    plan = make_plan(seeing_manifest(model.config))
    return model, plan, record(seeing_session(model), plan)


def seeing_manifest(config: ModelConfig) -> Manifest:
    return manifest_of(config, context=128, chunk=max(CHUNK, config.vision.tokens_per_image))


def seeing_session(model: Gemma3, kind: type[EagerSession] = EagerSession) -> EagerSession:
    return kind(model, cache_layout(model.config, "ring", 128, max(CHUNK, model.config.vision.tokens_per_image)))


def test_images_are_first_in_a_row_across_the_edges_and_near_the_end(seeing: tuple[Gemma3, Plan, Reference]) -> None:
    model, plan, _ = seeing
    vision = model.config.vision
    tokens = vision.tokens_per_image
    assert plan.places[0] == 2
    assert any(after - before == tokens + 2 for before, after in pairwise(plan.places))
    assert all(after - before >= tokens + 2 for before, after in pairwise(plan.places))
    artifacts = seeing_manifest(model.config).artifacts.values()
    assert plan.places[-1] > max(local_slots(artifact.cache) for artifact in artifacts)
    inside = {position for place in plan.places for position in range(place, place + tokens)}
    assert {position for position, token in enumerate(plan.ids) if token == vision.image_token_id} == inside
    for place in plan.places:
        assert plan.ids[place - 1] == vision.begin_image_token_id
        assert plan.ids[place + tokens] == vision.end_image_token_id
    edges = [model.config.sliding_window, seeing_manifest(model.config).chunk]
    assert all(position in inside or position - 1 in inside for position in edges)
    # Every image is looked at right after it, by some walk, and no walk cuts one.
    assert {place + tokens - 1 for place in plan.places} <= set(plan.golden_positions)
    cuts = {place + offset for place in plan.places for offset in range(1, tokens)}
    assert not cuts & {position + 1 for position in plan.positions}


def test_the_real_shape_has_images_across_the_window_and_past_the_wraps() -> None:
    config = parse_config(SHAPES["4b"])
    plan = make_plan(manifest_of(config, context=4096, chunk=256))
    assert len(plan.ids) == 4096
    assert plan.images.shape == (2, 896, 896, 3)
    across = [place for place in plan.places if place <= 1024 < place + 256]
    assert len(across) == 1
    assert len(plan.places) == 6
    assert plan.places[-1] > 2 * 1280


def test_probe_images_tell_their_squares_apart() -> None:
    images = make_plan(seeing_manifest(tiny_vision_config())).images
    assert images.shape == (2, 28, 28, 3)
    squares = images.reshape(2, 2, 14, 2, 14, 3).mean(axis=(2, 4)).reshape(8, 3)
    distances = np.abs(squares[:, None] - squares[None]).max(axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 10


def test_a_model_that_sees_passes_against_itself(seeing: tuple[Gemma3, Plan, Reference]) -> None:
    model, plan, reference = seeing
    checks = check_session(seeing_session(model), plan, reference, "pte", FLOAT_LIMITS)
    assert not failed(checks)
    assert [check.value for check in checks if check.metric == "soft_rms"] == [0.0, 0.0]
    assert sum("at image" in check.name for check in checks) == 2 * len(plan.places)


class CausalImages(EagerSession):
    """Feeds an image's soft tokens one by one, so that none sees those after it."""

    def forced(self, piece: Piece) -> Logits:
        if piece.image is None:
            return super().forced(piece)
        for soft_token in soft_tokens_of(self, piece.image):
            logits = self.model(
                torch.tensor([piece.ids[:1]]),
                self._cache,
                self.position,
                soft_tokens=torch.tensor(soft_token[None, None]),
            )
            self.position += 1
        return logits[0].numpy()


class SwappedImages(EagerSession):
    """Two images of one call change places."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        return super().prefill(ids, images[::-1])


class ShiftedImages(EagerSession):
    """The soft tokens come in another order."""

    def encode_image(self, image: Pixels) -> SoftTokens:
        return np.roll(super().encode_image(image), 1, axis=0)


class BgrImages(EagerSession):
    def encode_image(self, image: Pixels) -> SoftTokens:
        return super().encode_image(image[..., ::-1])


@pytest.mark.parametrize("fault", [CausalImages, SwappedImages, ShiftedImages, BgrImages])
@pytest.mark.parametrize("limits", [FLOAT_LIMITS, *INTEGER_LIMITS.values()])
@pytest.mark.parametrize("golden", [False, True])
def test_what_is_wrong_with_images_is_caught(
    seeing: tuple[Gemma3, Plan, Reference], fault: type[EagerSession], limits: Limits, golden: bool
) -> None:
    model, plan, reference = seeing
    kept = reference.at(plan.golden_positions) if golden else reference
    checks = check_session(seeing_session(model, fault), plan, kept, "pte", limits)
    assert failed(checks) - {"soft_rms"}
    assert ("soft_rms" in failed(checks)) == (fault in (ShiftedImages, BgrImages))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_is_caught_with_images_too(seeing: tuple[Gemma3, Plan, Reference], change: int) -> None:
    model, plan, reference = seeing
    other = Gemma3(replace(model.config, sliding_window=model.config.sliding_window + change)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert failed(check_session(seeing_session(other), plan, reference, "onnx", INTEGER_LIMITS["onnx"]))


def test_rounded_activations_of_the_encoder_have_their_noise(seeing: tuple[Gemma3, Plan, Reference]) -> None:
    model, plan, reference = seeing
    assert not reference.soft_noise.any()
    noisy = with_noise(reference, seeing_session(model), plan)
    assert ((noisy.soft_noise > 1e-9) & (noisy.soft_noise < 1e-5)).all()


def test_limits_follow_the_weights() -> None:
    config = tiny_config()
    assert limits_for(manifest_of(config, verdict="float32: kept by rule *"), "onnx") is FLOAT_LIMITS
    assert limits_for(manifest_of(config, verdict="int4-block32: round to nearest"), "pte") is INTEGER_LIMITS["pte"]


def test_the_table_marks_what_failed() -> None:
    checks = [Check("pte", "walk", "kl_mean", 0.5, 1e-3, False), Check("pte", "walk", "max_abs", 1, None, True)]
    assert validation_table(checks).splitlines() == [
        "| artifact | check | max_abs |    kl_mean |",
        "| -------- | ----- | ------: | ---------: |",
        "| pte      | walk  |       1 | 0.5 FAILED |",
        "",
        "pte must keep kl_mean ≤ 0.001",
    ]
