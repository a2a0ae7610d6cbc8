from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3.errors import BadInput, DoesNotFit
from runtime_py.generate import Sampler, generate
from tests.function_session import FunctionSession, counting
from tests.shapes import tiny_vision_config

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        # p^2, renormalised
        (Sampler(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampler(temperature=1e-310), [0, 1, 0, 0]),
        (Sampler(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampler(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (Sampler(temperature=1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampler(temperature=1.0, top_p=0.39), [0, 1, 0, 0]),
        (Sampler(temperature=1.0, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampler(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        # top-p counts the probability that top-k left: 4/7 alone is below 0.6
        (Sampler(temperature=1.0, top_k=2, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampler(temperature=1.0, top_k=2, top_p=0.5), [0, 1, 0, 0]),
        (Sampler(), [0, 1, 0, 0]),
    ],
)
def test_the_distribution_is_the_analytic_one(sampler: Sampler, expected: list[float]) -> None:
    assert sampler.distribution(LOGITS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-310, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(temperature, top_k=3, top_p=0.9)
    for scale in (1, 1e30):
        logits = np.array([-np.inf, *(LOGITS * scale)], np.float32)
        assert sampler.distribution(logits).tolist() == [0, 0, 1, 0, 0]
        assert sampler.sample(logits) == 2


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(temperature=1.0, seed=3)
    draws = np.bincount([sampler.sample(LOGITS) for _ in range(20_000)], minlength=4) / 20_000
    # Three standard deviations of a share near 0.4 over 20 000 draws are 0.0104.
    assert draws == pytest.approx(np.exp(LOGITS), abs=0.0104)


def test_the_seed_decides_the_draws() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@given(
    logits=st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=12),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
)
def test_whatever_is_cut_the_likeliest_stays_and_the_probabilities_sum_to_one(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    array = np.array(logits, np.float32)
    kept = Sampler(temperature, top_k, top_p).distribution(array)
    assert kept.sum() == pytest.approx(1)
    assert kept[np.argmax(array)] == kept.max() > 0
    assert not top_k or np.count_nonzero(kept) <= top_k


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=str(next(iter(settings.values())))):
        Sampler(**settings)


def test_generation_ends_at_a_stop_token_which_is_not_yielded() -> None:
    session = counting(20)
    generation = generate(session, [3], Sampler(), stop_ids={7, 9})
    assert list(generation) == [4, 5, 6]
    assert generation.reason == "stop token"
    assert generation.unfed == [7]
    assert session.fed == [3, 4, 5, 6]


def test_generation_ends_at_the_length() -> None:
    session = counting(20)
    generation = generate(session, [3], Sampler(), stop_ids={}, max_new_tokens=2)
    assert list(generation) == [4, 5]
    assert generation.reason == "length"
    assert [*session.fed, *generation.unfed] == [3, 4, 5]


def test_generation_ends_when_the_context_is_full() -> None:
    session = counting(20, context=5)
    generation = generate(session, [1, 2, 3], Sampler(), stop_ids={})
    # Position 5 has no room, but what the fifth token predicts is still returned.
    assert list(generation) == [4, 5, 6]
    assert generation.reason == "context"
    assert session.position == 5


def test_tokens_are_streamed() -> None:
    session = counting(20)
    stream = iter(generate(session, [3], Sampler(), stop_ids={}))
    assert [next(stream), next(stream)] == [4, 5]
    assert session.fed == [3, 4]


def test_a_prompt_over_the_context_feeds_nothing() -> None:
    session = counting(20, context=4)
    with pytest.raises(DoesNotFit, match="context of 4"):
        generate(session, [1] * 5, Sampler(), stop_ids={})
    assert session.fed == []


def test_no_new_tokens_are_refused() -> None:
    with pytest.raises(BadInput, match="is 0"):
        generate(FunctionSession(lambda _: [0.0], 1), [0], Sampler(), stop_ids={}, max_new_tokens=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_image_token_is_never_drawn(temperature: float) -> None:
    session = FunctionSession(lambda _: [9.0 * (token == 153) + 5.0 * (token == 7) for token in range(160)], 160)
    session.vision = tiny_vision_config().vision
    drawn = list(generate(session, [5], Sampler(temperature), stop_ids=(), max_new_tokens=50))
    assert len(drawn) == 50
    assert 153 not in drawn
    assert 7 in drawn
