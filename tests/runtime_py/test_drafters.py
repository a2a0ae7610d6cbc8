"""The guesses against brute force, and how a draft model keeps up with its caller."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.drafters import LONGEST_MATCH, SHORTEST_MATCH, DraftModel, PromptLookup, match
from runtime_py.sessions.speculative import Ids
from tests.function_session import FunctionSession, counting


def array(ids: list[int]) -> Ids:
    return np.array(ids, np.int64)


def slowly(ids: list[int]) -> int | None:
    """``match`` by its definition."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[len(ids) - length :]:
                return end
    return None


# Few different ids, so that they repeat; copies of a stretch, so that matches get long.
sequences = st.lists(st.integers(0, 3), max_size=40).flatmap(
    lambda ids: st.integers(0, 3).map(lambda copies: ids + ids[len(ids) // 2 :] * copies)
)


@given(sequences)
def test_the_match_is_the_longest_and_of_equal_ones_the_latest(ids: list[int]) -> None:
    assert match(array(ids)) == slowly(ids)


@given(sequences, st.integers(1, 9))
def test_a_draft_is_what_followed_the_match_and_goes_on_in_its_rhythm(ids: list[int], most: int) -> None:
    draft, found = PromptLookup().draft(array(ids), most), slowly(ids)
    if found is None:
        assert draft == []
    else:
        text = list(ids)
        for _ in range(most):
            text.append(text[found])
            found += 1
        assert draft == text[len(ids) :]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(2, 9))
def test_a_draft_model_says_what_a_new_one_would_say(pieces: list[list[int]], page: int) -> None:
    """Whatever its caller took of the earlier drafts, and however far the session can go back."""

    def after(fed: list[int]) -> list[float]:
        return [float((token * 7 + sum(fed) * 3) % 10) for token in range(10)]

    session = FunctionSession(after, 10, context=200)
    session.page = page
    drafter = DraftModel(session, 0.5)
    ids: list[int] = []
    for piece in pieces:
        taken = drafter.draft(array(ids), 3)[: piece[0] % 3] if ids else []
        ids += [*taken, *piece]
        draft, text = drafter.draft(array(ids), 3), list(ids)
        assert draft
        for guess in draft:
            scores = after(text)
            assert guess == scores.index(max(scores))
            text.append(guess)


def test_a_draft_model_leaves_out_ids_that_it_does_not_have() -> None:
    session = counting(10)
    assert DraftModel(session, 0.5).draft(array([3, 12, 12, 4]), 2) == [5, 6]
    assert session.fed == [3, 4, 5]


def test_a_draft_model_whose_context_is_full_has_no_guess() -> None:
    drafter = DraftModel(counting(10, context=4), 0.5)
    assert drafter.draft(array([1, 2, 3]), 3) == [4]
    assert drafter.draft(array([1, 2, 3, 4, 5]), 3) == []
