"""Speculation changes no id: against the same session without drafts, over ids, and counted by distribution."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3.errors import BadInput
from runtime_py.drafters import PromptLookup
from runtime_py.generate import Sampler, generate
from runtime_py.sessions.speculative import Ids, SpeculativeSession
from tests.function_session import FunctionSession, counting

V = 5


def scores(fed: list[int]) -> list[float]:
    """Logits that depend on the last three ids, and often repeat."""
    seed = sum((place + 1) * token for place, token in enumerate(fed[-3:]))
    return [2.0 * ((token * 3 + seed) % V == 0) + 0.3 * ((token + seed) % 3) for token in range(V)]


class Oracle:
    """Guesses right or wrong as told."""

    cost = 0.0

    def __init__(self, right: list[bool]) -> None:
        self._right = right
        self._made = 0

    def draft(self, ids: Ids, most: int) -> list[int]:
        text = ids.tolist()
        for _ in range(most):
            best = int(np.argmax(scores(text)))
            right = self._right[self._made % len(self._right)]
            self._made += 1
            text.append(best if right else (best + 1) % V)
        return text[len(ids) :]


def plain(context: int = 200) -> FunctionSession:
    return FunctionSession(scores, V, context)


@given(
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.integers(1, 60),
    st.integers(3, 30),
    st.sampled_from([0.0, 0.7, 2.0]),
)
def test_the_ids_are_those_of_plain_decoding(right: list[bool], count: int, page: int, temperature: float) -> None:
    """The same seed draws the same ids, also when the context ends the generation, and turn after turn."""
    inner = plain(70)
    inner.page = page
    ahead, alone = SpeculativeSession(inner, Oracle(right), (0.0, 0.3)), plain(70)
    texts = []
    for session in (ahead, alone):
        sampler = Sampler(temperature, top_k=4, seed=3)
        text = []
        for turn in ([1, 2, 3], [4], [0, 1]):
            if session.position + len(turn) > session.context:
                break
            generation = generate(session, turn, sampler, stop_ids={4}, max_new_tokens=count)
            text.append([*generation, generation.reason, session.position])
        texts.append(text)
    assert texts[0] == texts[1]
    assert ahead.counts.calls <= ahead.counts.steps


def test_right_drafts_save_calls_and_wrong_ones_are_given_up() -> None:
    right, wrong = (SpeculativeSession(plain(), Oracle([answer]), (0.0, 0.3)) for answer in (True, False))
    for session in (right, wrong):
        list(generate(session, [1], Sampler(), stop_ids=(), max_new_tokens=161))
        assert session.counts.steps == 160
    assert right.counts.accepted == 160 - right.counts.calls
    assert right.counts.drafted - right.counts.accepted <= 3  # the last draft
    assert right.counts.calls <= 42  # four ids in a call
    assert wrong.counts.accepted == 0
    assert wrong.counts.calls == 160
    assert wrong.counts.drafted <= 12  # a few at first, then one in 32


def test_a_lookup_finds_what_repeats() -> None:
    session = SpeculativeSession(counting(6, context=200), PromptLookup(), (0.0, 0.3))
    text = list(generate(session, [0], Sampler(), stop_ids=(), max_new_tokens=100))
    assert text == [(1 + index) % 6 for index in range(100)]
    assert session.counts.calls < 40


def test_sampled_ids_follow_the_distribution_of_plain_sampling() -> None:
    """Every text of three ids, against its exact probability: chi-square, with drafts that are wrong now and then."""
    sampler = Sampler(0.9, top_k=4, top_p=0.95)
    expected = {}
    for text in product(range(V), repeat=3):
        probability = 1.0
        for place in range(3):
            logits = np.array(scores([2, *text[:place]]), np.float32)
            probability *= sampler.distribution(logits)[text[place]]
        expected[text] = probability
    assert sum(expected.values()) == pytest.approx(1)

    drawn: Counter[tuple[int, ...]] = Counter()
    inner, accepted, runs = plain(), 0, 6000
    for seed in range(runs):
        inner.reset()
        session = SpeculativeSession(inner, Oracle([True, seed % 3 > 0]), (0.0, 0.3))
        draw = Sampler(0.9, top_k=4, top_p=0.95, seed=seed)
        drawn[tuple(generate(session, [2], draw, stop_ids=(), max_new_tokens=3))] += 1
        accepted += session.counts.accepted
    assert accepted > runs // 4
    assert all(expected[text] > 0 for text in drawn)
    common = [text for text in expected if expected[text] * runs >= 5]
    rare = sum(expected[text] for text in expected if text not in common) * runs
    rare_drawn = runs - sum(drawn[text] for text in common)
    pairs = [(drawn[text], expected[text] * runs) for text in common] + [(rare_drawn, rare)]
    square = sum((found - wanted) ** 2 / wanted for found, wanted in pairs if wanted)
    # The mean of the statistic is the degrees of freedom n, and its standard deviation is √(2n).
    freedom = len(pairs) - 1
    assert abs(square - freedom) < 4 * (2 * freedom) ** 0.5


def test_going_back_forgets_ids_and_guesses() -> None:
    inner = plain()
    session, alone = SpeculativeSession(inner, Oracle([True]), (0.0, 0.3)), plain()
    session.prefill([1, 2, 3])
    session.step(4)
    assert inner.position > session.position == 4
    assert session.can_rewind(session.position, 2)
    session.rewind(2)
    assert inner.position == session.position == 2
    assert np.array_equal(session.step(0), alone.prefill([1, 2, 0]))


def test_a_bad_id_is_refused_and_nothing_is_fed() -> None:
    session = SpeculativeSession(counting(6), PromptLookup(), (0.0, 0.3))
    session.prefill([0, 1, 0, 1])
    with pytest.raises(BadInput, match="token id 6"):
        session.step(6)
    assert session.position == 4
    assert session.step(2)[3] == 10
