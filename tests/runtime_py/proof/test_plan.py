from itertools import pairwise

import numpy as np
import pytest

from gemma3.cache import COMPACTING_SLACK
from gemma3.config import parse_config
from runtime_py.proof.plan import MEASURED, Plan, local_slots, make_plan, plan_images
from scripts.random_checkpoint import SHAPES
from tests.manifests import CONTEXT, manifest_of, seeing_manifest
from tests.shapes import VISION_SHAPES, tiny_config, tiny_vision_config

WINDOW = 12


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = tiny_config(sliding_window=WINDOW, num_hidden_layers=3, sliding_window_pattern=3)
    return make_plan(manifest_of(config))


def test_every_walk_feeds_the_whole_sequence_in_order(plan: Plan) -> None:
    for pieces in plan.walks.values():
        assert sum(pieces) == len(plan.ids)
        assert min(pieces) >= 1
    assert set(plan.walks["one-by-one"]) == {1}


def test_landmarks_are_the_window_and_the_wraps(plan: Plan) -> None:
    positions = plan.landmarks
    assert (positions["W-1"], positions["W"], positions["W+1"], positions["2W"]) == (11, 12, 13, 24)
    # 12 + 8 − 1 slots, rounded up to a multiple of 8; and the window plus its slack
    assert [positions[f"wrap-{turn}-of-24-slots"] for turn in (1, 2, 3)] == [24, 48, 72]
    compacting = WINDOW + COMPACTING_SLACK
    assert positions[f"wrap-2-of-{compacting}-slots"] == 2 * compacting
    assert positions["last"] == CONTEXT - 1


def test_a_real_shape_is_fed_one_by_one_only_near_its_landmarks() -> None:
    config = tiny_config(sliding_window=512, max_position_embeddings=32768)
    plan = make_plan(manifest_of(config, context=32768, chunk=128))
    # two turns of the ring, which is the larger of the two buffers
    assert len(plan.ids) == 2 * 640 + 16
    # as in bundles up to version 0.4.0: four windows past the first wrap
    assert len(make_plan(manifest_of(config, context=32768, chunk=128), longer=True).ids) == 640 + 4 * 512
    steps = plan.walks["one-by-one"]
    assert len(steps) < 300
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


@pytest.mark.parametrize("shape", VISION_SHAPES)
def test_images_are_at_the_start_side_by_side_across_the_edges_and_near_the_end(shape: str) -> None:
    config = tiny_vision_config(shape)
    manifest, vision = seeing_manifest(config), config.vision
    assert vision is not None
    plan = make_plan(manifest)
    tokens = vision.tokens_per_image
    assert plan.image_places[0] == 2
    assert any(after - before == tokens + 2 for before, after in pairwise(plan.image_places))
    assert all(after - before >= tokens + 2 for before, after in pairwise(plan.image_places))
    artifacts = manifest.artifacts.values()
    assert plan.image_places[-1] > max(local_slots(artifact.cache) for artifact in artifacts)
    inside = {position for place in plan.image_places for position in range(place, place + tokens)}
    assert {position for position, token in enumerate(plan.ids) if token == vision.image_token_id} == inside
    for place in plan.image_places:
        assert plan.ids[place - 1] == vision.begin_image_token_id
        assert plan.ids[place + tokens] == vision.end_image_token_id
    edges = [config.sliding_window, manifest.chunk]
    assert all(position in inside or position - 1 in inside for position in edges)
    # Some walk compares the logits right after each image, and no walk splits an image.
    assert {place + tokens - 1 for place in plan.image_places} <= set(plan.golden_positions)
    cuts = {place + offset for place in plan.image_places for offset in range(1, tokens)}
    assert not cuts & {position + 1 for position in plan.positions}


def test_the_real_shape_has_images_across_the_window_and_past_the_wraps() -> None:
    config = parse_config(SHAPES["4b"])
    manifest = manifest_of(config, context=4096, chunk=256)
    plan = make_plan(manifest)
    assert len(plan.ids) == 2 * 1280 + 16 + 2 * 256
    assert plan_images(manifest).shape == (2, 896, 896, 3)
    across = [place for place in plan.image_places if place <= 1024 < place + 256]
    assert len(across) == 1
    assert len(plan.image_places) == 6
    assert plan.image_places[-1] > 2 * 1280


def test_the_squares_of_the_probe_images_differ() -> None:
    images = plan_images(seeing_manifest(tiny_vision_config()))
    assert images.shape == (2, 28, 28, 3)
    squares = images.reshape(2, 2, 14, 2, 14, 3).mean(axis=(2, 4)).reshape(8, 3)
    distances = np.abs(squares[:, None] - squares[None]).max(axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 10


def test_limits_are_measured_up_to_an_image_that_would_be_cut() -> None:
    plan = make_plan(manifest_of(parse_config(SHAPES["4b"]), context=4096, chunk=256))
    assert plan.image_places[1] < MEASURED < plan.image_places[1] + 256
    assert plan.measured(256) == plan.image_places[1]
    text = make_plan(manifest_of(tiny_config()))
    assert text.measured(0) == len(text.ids)
