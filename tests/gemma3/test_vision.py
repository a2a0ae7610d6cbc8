"""The vision model, the projector and the attention within images compared with transformers, on random weights."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from gemma3 import typed_json
from gemma3.cache import cache_layout
from gemma3.config import parse_config
from gemma3.errors import BadInput
from gemma3.model import Gemma3, attention_mask, image_numbers, new_cache, same_image
from tests.shapes import VISION_SHAPES, random_model, random_pixels, tiny_vision_config, with_images

TOLERANCE = 1e-4


def transformers_model(shape: str, model: Gemma3) -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(**VISION_SHAPES[shape] | {"attn_implementation": "eager"})
    oracle = Gemma3ForConditionalGeneration(config).train(False)
    names = {
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "model.": "model.language_model.",
        "lm_head.": "lm_head.",
    }
    state = {
        next(theirs + name.removeprefix(ours) for ours, theirs in names.items() if name.startswith(ours)): tensor
        for name, tensor in model.state_dict().items()
    }
    oracle.load_state_dict(state)
    return oracle


@pytest.mark.parametrize("shape", VISION_SHAPES)
@pytest.mark.parametrize(
    "pieces",
    [
        [None, 3],
        [5, None, 20],
        # Text before, between and after; images beside each other; images across a window of 8 and of 5.
        [3, None, 2, None, 7, None, None, 12],
    ],
)
@torch.no_grad()
def test_equals_transformers(shape: str, pieces: list[int | None]) -> None:
    config = tiny_vision_config(shape)
    vision = config.vision
    assert vision is not None
    model = random_model(config)
    ids, images = with_images(config, pieces), pieces.count(None)
    tokens, pixels = torch.tensor([ids]), random_pixels(config, images)
    is_image = (tokens == vision.image_token_id).long()
    expected = transformers_model(shape, model)(
        input_ids=tokens, pixel_values=pixels * 2 - 1, token_type_ids=is_image, use_cache=False
    ).logits
    assert expected.std() > 0.1
    soft_tokens = model.encode_images(pixels)
    assert (model(tokens, soft_tokens=soft_tokens) - expected).abs().max() <= TOLERANCE
    # Without the attention within images, this test would fail by far.
    assert (model.lm_head(causal(model, tokens, soft_tokens)) - expected).abs().max() > 100 * TOLERANCE

    # Through bounded caches: text one by one or in chunks of 8, each image whole.
    for chunk in (1, 8):
        layout = cache_layout(config, "ring", 128, max(8, vision.tokens_per_image))
        cache, start, fed = new_cache(layout), 0, 0
        while start < len(ids):
            if is_image[0, start]:
                end, soft = start + vision.tokens_per_image, soft_tokens[fed : fed + 1]
                fed += 1
            else:
                run = [int(flag) for flag in is_image[0, start : start + chunk]]
                end, soft = start + (run.index(1) if 1 in run else len(run)), None
            logits = model(tokens[:, start:end], cache, start, soft_tokens=soft)
            assert (logits - expected[:, start:end]).abs().max() <= TOLERANCE
            start = end
        assert fed == images


def causal(model: Gemma3, tokens: torch.Tensor, soft_tokens: torch.Tensor) -> torch.Tensor:
    """What ``hidden`` gives when every image is fed token by token: causal attention."""
    vision = model.config.vision
    assert vision is not None
    soft = soft_tokens.flatten(0, 1)
    cache, fed, rows = new_cache(cache_layout(model.config, "ring", 128, 8)), 0, []
    for start, token in enumerate(tokens[0].tolist()):
        image = token == vision.image_token_id
        rows.append(
            model.hidden(tokens[:, start : start + 1], cache, start, soft[None, fed : fed + 1] if image else None)
        )
        fed += image
    return torch.cat(rows, dim=1)


@torch.no_grad()
def test_a_batch_of_rows_with_different_images() -> None:
    config = tiny_vision_config()
    model = random_model(config)
    rows = [with_images(config, [3, None, 9], seed=1), with_images(config, [1, None, 11], seed=5)]
    soft_tokens = model.encode_images(random_pixels(config, 2))
    together = model(torch.tensor(rows), soft_tokens=soft_tokens)
    for row, ids in enumerate(rows):
        alone = model(torch.tensor([ids]), soft_tokens=soft_tokens[row : row + 1])
        assert (together[row] - alone[0]).abs().max() <= 1e-5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 8))
def test_the_mask_follows_its_definition(image: list[bool], window: int) -> None:
    numbers = image_numbers(torch.tensor([image]))
    positions = torch.arange(len(image))
    mask = attention_mask(positions, positions, window, same_image(numbers, positions))[0]
    for query in range(len(image)):
        for key in range(len(image)):
            low, high = sorted((query, key))
            together = all(image[low : high + 1])
            assert mask[query, key] == ((key <= query or together) and key > query - window)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_tokens_per_image": 5}, "cannot be pooled"),
        ({"image_token_index": 160}, "image_token_id 160 is outside the vocabulary of 160"),
        ({"vision_config": {"hidden_size": 10, "num_attention_heads": 3}}, "not a multiple of its num_attention_heads"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act is 'gelu'"),
        ({"vision_config": 3}, "vision_config is 3, expected an object"),
        ({"vision_config": {"image_size": -1}}, "image_size is -1, expected a positive integer"),
    ],
)
def test_bad_configurations(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_config(VISION_SHAPES["like-4b"] | change)


def test_the_configuration_to_json_and_back_is_the_identity() -> None:
    config = tiny_vision_config()
    assert typed_json.decode(type(config), json.loads(typed_json.encode(config)), "config") == config
