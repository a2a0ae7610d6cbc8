"""The network compared with transformers, an independent implementation, on random weights of many shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma3.cache import cache_layout
from gemma3.config import FULL, SLIDING, parse_config
from gemma3.model import Gemma3, attention_mask, new_cache, ring_positions
from tests.shapes import SHAPES, random_model, random_tokens

TOLERANCE = 1e-4
LENGTH = 70  # more than eight windows of 8


def transformers_logits(shape: str, model: Gemma3, tokens: torch.Tensor) -> torch.Tensor:
    config = Gemma3TextConfig(**SHAPES[shape] | {"attn_implementation": "eager"})
    oracle = Gemma3ForCausalLM(config).train(False)
    missing, unexpected = oracle.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        return oracle(tokens, use_cache=False).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape: str) -> None:
    config = parse_config(SHAPES[shape])
    model = random_model(config)
    ids = random_tokens(config, LENGTH)
    tokens = torch.tensor([ids])
    expected = transformers_logits(shape, model, tokens)
    assert expected.std() > 0.1
    assert (model(tokens) - expected).abs().max() <= TOLERANCE

    # Decode one token at a time, then in uneven chunks, through bounded caches.
    for lengths in ([1] * LENGTH, [3, 1, 8, 7, 1, 1, 5, 8, 8, 8, 8, 8, 4]):
        cache = new_cache(cache_layout(config, "ring", context=128, chunk=8))
        start = 0
        for length in lengths:
            logits = model(tokens[:, start : start + length], cache, start)
            assert (logits - expected[:, start : start + length]).abs().max() <= TOLERANCE
            start += length
        assert start == LENGTH


@pytest.mark.parametrize("shape", ["like-4b", "untied"])
def test_saved_config_reads_back_the_same(shape: str) -> None:
    """transformers writes the newer nested spelling; it must mean the same network."""
    saved = Gemma3TextConfig(**SHAPES[shape]).to_dict()
    assert "rope_parameters" in saved
    assert parse_config(saved) == parse_config(SHAPES[shape])


def test_small_masks_literally() -> None:
    positions = torch.arange(5)
    assert attention_mask(positions, positions, 3).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert attention_mask(positions[3:], positions, None).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@given(slots=st.integers(1, 40), end=st.integers(1, 200))
def test_ring_positions_are_the_last_written(slots: int, end: int) -> None:
    written: dict[int, int] = {}
    for position in range(end):
        written[position % slots] = position
    assert ring_positions(end, slots).tolist() == [written[slot] for slot in range(min(end, slots))]


@settings(max_examples=15)
@given(window=st.integers(1, 12), chunk=st.integers(1, 12), data=st.data())
def test_any_chunking_gives_the_same_logits(window: int, chunk: int, data: st.DataObject) -> None:
    config = parse_config(SHAPES["untied"] | {"sliding_window": window, "layer_types": [SLIDING, FULL, SLIDING]})
    model = random_model(config)
    tokens = torch.tensor([random_tokens(config, 50)])
    expected = model(tokens)
    cache = new_cache(cache_layout(config, "ring", context=64, chunk=chunk))
    start = 0
    while start < 50:
        length = min(data.draw(st.integers(1, chunk)), 50 - start)
        last = model(tokens[:, start : start + length], cache, start, last_only=True)
        start += length
        assert (last - expected[:, start - 1 : start]).abs().max() <= TOLERANCE


def test_wrong_window_would_be_caught() -> None:
    """The tolerance separates right from wrong: a window one too long is far outside it."""
    config = parse_config(SHAPES["like-270m"])
    model = random_model(config)
    tokens = torch.tensor([random_tokens(config, 30)])
    wrong = Gemma3(parse_config(SHAPES["like-270m"] | {"sliding_window": 9}))
    wrong.load_state_dict(model.state_dict())
    difference = (model(tokens) - wrong(tokens)).abs().amax((0, 2))
    assert difference[:8].max() <= TOLERANCE
    assert difference[8:].max() > 100 * TOLERANCE
