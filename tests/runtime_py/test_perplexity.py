import math

import numpy as np
import pytest

from runtime_py.perplexity import measure_perplexity
from tests.runtime_py.sessions import FunctionSession

PROBABILITIES = np.array([0.5, 0.25, 0.125, 0.125])


def test_it_is_the_mean_negative_log_probability() -> None:
    session = FunctionSession(lambda _: list(np.log(PROBABILITIES)), 4)
    result = measure_perplexity(session, [0, 1, 1, 2], bos_id=3)
    bits = [1, 2, 2, 3]
    assert result.mean_nll == pytest.approx(2 * math.log(2))
    assert result.perplexity == pytest.approx(4)
    assert result.tokens == 4
    # standard error of the mean of 1, 2, 2, 3 (sample variance 2/3)
    assert result.standard_error == pytest.approx(math.sqrt(2 / 3 / len(bits)) * math.log(2))


def test_each_stretch_of_a_long_text_begins_with_bos() -> None:
    seen: list[list[int]] = []

    def remember(fed: list[int]) -> list[float]:
        seen.append(list(fed))
        return [0.0] * 9

    result = measure_perplexity(FunctionSession(remember, 9, context=4), [0, 1, 2, 3, 4], bos_id=8)
    assert result.tokens == 5
    assert seen[3] == [8, 0, 1, 2]
    assert seen[4] == [8]
    assert seen[-1] == [8, 3, 4]
