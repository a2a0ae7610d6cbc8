import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import special, stats

from gemma3.cache import cache_layout
from gemma3.data import Document
from gemma3.errors import BadInput, VerificationFailed
from gemma3.images import network_input
from runtime_py.measure.comparison import Comparison, Estimate, compare, comparison_table, stretches
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Logits, every_position
from tests.function_session import FunctionSession
from tests.shapes import random_model, random_pixels, random_tokens, tiny_config, tiny_vision_config, with_images


class Tolerance(TypedDict):
    """Options of ``pytest.approx``."""

    rel: float
    abs: float


def replaying(rows: NDArray[np.float32]) -> FunctionSession:
    """A session that gives row i of the logits [T, V] after the i-th id, whatever that id is."""
    return FunctionSession(lambda fed: list(rows[len(fed) - 1]), rows.shape[1], context=len(rows))


def compared(reference: NDArray[np.float32], model: NDArray[np.float32], tokens: Sequence[int]) -> Comparison:
    """``tokens`` [T] predicted by the rows of the two [T, V]."""
    result = compare(replaying(model), {"r": replaying(reference)}, [Document([0, *tokens], [])])
    return result["r"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
    length, vocabulary = draw(st.integers(2, 12)), draw(st.integers(2, 9))
    logits = hnp.arrays(np.float32, (length, vocabulary), elements=st.floats(-60, 60, width=32))
    tokens = st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length)
    return draw(logits), draw(logits), draw(tokens)


@given(cases())
def test_direct_formulas(case: tuple[NDArray[np.float32], NDArray[np.float32], list[int]]) -> None:
    """Computed with scipy on whole arrays, with no code in common."""
    reference, model, tokens = case
    figures = compared(reference, model, tokens)
    count = len(tokens)
    log_p = special.log_softmax(reference.astype(np.float64), axis=1)
    log_q = special.log_softmax(model.astype(np.float64), axis=1)
    nll_p, nll_q = -log_p[range(count), tokens], -log_q[range(count), tokens]
    kl = special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=1)
    change = (np.exp(-nll_q) - np.exp(-nll_p)) ** 2
    near: Tolerance = {"rel": 1e-9, "abs": 1e-12}
    assert figures.tokens == count
    assert figures.perplexity.value == pytest.approx(stats.gmean(np.exp(nll_q)), rel=1e-9)
    assert figures.perplexity.error == pytest.approx(math.exp(nll_q.mean()) * stats.sem(nll_q), **near)
    assert figures.reference_perplexity.value == pytest.approx(math.exp(nll_p.mean()), rel=1e-9)
    assert figures.delta_nll.value == pytest.approx(nll_q.mean() - nll_p.mean(), **near)
    assert figures.delta_nll.error == pytest.approx(stats.sem(nll_q - nll_p), **near)
    assert figures.perplexity_ratio.value == pytest.approx(math.exp(nll_q.mean()) / math.exp(nll_p.mean()), rel=1e-9)
    assert figures.kl.value == pytest.approx(kl.mean(), rel=1e-9, abs=1e-9)
    assert figures.kl.error == pytest.approx(stats.sem(kl), rel=1e-9, abs=1e-9)
    assert figures.kl_median == pytest.approx(np.median(kl), rel=1e-9, abs=1e-9)
    assert figures.kl_max == pytest.approx(kl.max(), rel=1e-9, abs=1e-9)
    assert figures.same_top.value == (reference.argmax(1) == model.argmax(1)).mean()
    assert figures.rms_delta_p.value == pytest.approx(math.sqrt(change.mean()), **near)


@given(cases())
def test_the_definitions_of_llama_cpp(case: tuple[NDArray[np.float32], NDArray[np.float32], list[int]]) -> None:
    """The sums of tools/perplexity/perplexity.cpp, one token after another."""
    reference, model, tokens = case
    figures = compared(reference, model, tokens)
    count = len(tokens)
    nll = [-float(special.log_softmax(row.astype(np.float64))[t]) for row, t in zip(model, tokens, strict=True)]
    base = [-float(special.log_softmax(row.astype(np.float64))[t]) for row, t in zip(reference, tokens, strict=True)]

    def mean_and_uncertainty(values: list[float]) -> tuple[float, float]:
        mean = math.fsum(values) / count
        variance = math.fsum(value * value for value in values) / count - mean * mean
        return mean, math.sqrt(max(0.0, variance) / (count - 1))

    def percentile(values: list[float], fraction: float) -> float:
        place = fraction * (count - 1)
        index = int(place)
        above = values[min(index + 1, count - 1)]
        return (1 - (place - index)) * values[index] + (place - index) * above

    (log_ppl, error), (log_base, base_error) = mean_and_uncertainty(nll), mean_and_uncertainty(base)
    covariance = math.fsum(a * b for a, b in zip(nll, base, strict=True)) / count - log_ppl * log_base
    ratio_variance = error**2 + base_error**2 - 2 * covariance / (count - 1)
    ratio = math.exp(log_ppl - log_base)
    # Their difference of squares loses half the digits.
    loose: Tolerance = {"rel": 1e-5, "abs": 1e-5 * max(1.0, *nll, *base)}
    assert figures.perplexity.value == pytest.approx(math.exp(log_ppl), rel=1e-9)
    assert figures.perplexity.error / figures.perplexity.value == pytest.approx(error, **loose)
    assert figures.perplexity_ratio.value == pytest.approx(ratio, rel=1e-9)
    assert figures.perplexity_ratio.error / ratio == pytest.approx(math.sqrt(max(0.0, ratio_variance)), **loose)

    changes = [(math.exp(-mine) - math.exp(-theirs)) ** 2 for mine, theirs in zip(nll, base, strict=True)]
    mse, mse_error = mean_and_uncertainty(changes)
    assert figures.rms_delta_p.value == pytest.approx(math.sqrt(mse), abs=1e-9)
    if mse > 1e-6:
        assert figures.rms_delta_p.error == pytest.approx(0.5 / math.sqrt(mse) * mse_error, rel=1e-5, abs=1e-5)

    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(reference, model, strict=True)) / count
    assert figures.same_top.error == pytest.approx(math.sqrt(same * (1 - same) / (count - 1)))

    kl = []
    for p_row, q_row in zip(reference, model, strict=True):
        log_p, log_q = (special.log_softmax(row.astype(np.float64)) for row in (p_row, q_row))
        kl.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    kl.sort()
    assert figures.kl_99 == pytest.approx(percentile(kl, 0.99), rel=1e-9, abs=1e-9)
    assert figures.kl_99_9 == pytest.approx(percentile(kl, 0.999), rel=1e-9, abs=1e-9)


def test_by_hand() -> None:
    """Two tokens, two models whose probabilities are powers of two."""
    reference = np.log2(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])).astype(np.float32) * np.float32(math.log(2))
    model = np.log2(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])).astype(np.float32) * np.float32(math.log(2))
    figures = compared(reference, model, [0, 0])
    assert figures.delta_nll.value == pytest.approx(math.log(2) / 2)
    assert figures.delta_nll.error == pytest.approx(math.log(2) / 2)
    assert figures.perplexity.value == pytest.approx(math.sqrt(8))
    assert figures.reference_perplexity.value == pytest.approx(2)
    assert figures.perplexity_ratio.value == pytest.approx(math.sqrt(2))
    assert figures.kl.value == pytest.approx(math.log(2) / 8)  # (0.5 ln 2 − 0.25 ln 2) / 2
    assert figures.kl_max == pytest.approx(math.log(2) / 4)
    assert figures.same_top.value == 0.5
    assert figures.rms_delta_p.value == pytest.approx(math.sqrt(0.25**2 / 2))


def test_a_model_against_itself_is_zero_everywhere() -> None:
    rows = np.random.default_rng(0).normal(0, 5, (9, 7)).astype(np.float32)
    figures = compared(rows, rows, [1, 2, 3, 4, 5, 6, 0, 1, 2])
    nothing = Estimate(0.0, 0.0)
    assert (figures.delta_nll, figures.kl, figures.rms_delta_p) == (nothing, nothing, nothing)
    assert (figures.perplexity_ratio, figures.same_top) == (Estimate(1.0, 0.0), Estimate(1.0, 0.0))


def test_the_paired_error_is_that_of_the_difference() -> None:
    """Both models find the same tokens hard: the loss varies a hundred times as much as its difference."""
    random = np.random.default_rng(1)
    reference = random.normal(0, 5, (400, 5)).astype(np.float32)
    model = reference + random.normal(0, 0.05, reference.shape).astype(np.float32)
    figures = compared(reference, model, random.integers(5, size=400).tolist())
    assert figures.perplexity.error / figures.perplexity.value > 20 * figures.delta_nll.error


def test_several_references_run_the_model_once() -> None:
    rows = np.random.default_rng(2).normal(0, 1, (6, 4)).astype(np.float32)
    fed = []

    def model(ids: list[int]) -> list[float]:
        fed.append(ids[-1])
        return list(rows[len(ids) - 1])

    references = {"a": replaying(rows), "b": replaying(rows[::-1].copy())}
    result = compare(FunctionSession(model, 4), references, [Document([0, 1, 2, 3, 1, 2, 3], [])])
    assert fed == [0, 1, 2, 3, 1, 2]
    assert result["a"].kl.value == 0
    assert result["b"] == compared(rows[::-1].copy(), rows, [1, 2, 3, 1, 2, 3])


def test_stretches_predict_every_id_once_within_the_context() -> None:
    pieces = stretches([10, 11, 12, 13, 14], bos_id=2, context=3)
    assert [piece.ids for piece in pieces] == [[2, 10, 11, 12], [2, 13, 14]]
    seen: list[list[int]] = []

    def remember(fed: list[int]) -> list[float]:
        seen.append(list(fed))
        return [0.0] * 15

    session = FunctionSession(remember, 15, context=3)
    result = compare(session, {"r": FunctionSession(lambda _: [0.0] * 15, 15, context=3)}, pieces)
    assert result["r"].tokens == 5
    assert result["r"].perplexity.value == pytest.approx(15)
    assert seen == [[2], [2, 10], [2, 10, 11], [2], [2, 13]]


def test_chunks_and_single_steps_agree_past_the_window() -> None:
    config = tiny_config()  # window 8
    model, layout = random_model(config), cache_layout(config, "ring", 48, 5)
    ids = random_tokens(config, 48)
    session = EagerSession(model, layout)

    class OneByOne:
        """Like the session of a file, it gives the logits of the last id only."""

        def __init__(self) -> None:
            self._inner = EagerSession(model, layout)
            self.vocab_size, self.context, self.chunk, self.vision = self._inner.vocab_size, 48, 5, None
            self.reset, self.step, self.prefill = self._inner.reset, self._inner.step, self._inner.prefill
            self.encode_image = self._inner.encode_image

        @property
        def position(self) -> int:
            return self._inner.position

        @property
        def logits(self) -> Logits:
            return self._inner.logits

    in_chunks = np.stack([row.copy() for _, row in every_position(session, ids)])
    stepped = np.stack([row.copy() for _, row in every_position(OneByOne(), ids)])
    assert in_chunks.shape == (48, config.vocab_size)
    np.testing.assert_allclose(in_chunks, stepped, atol=1e-4)
    figures = compare(OneByOne(), {"r": session}, stretches(ids * 2, 2, 48))["r"]
    assert figures.tokens == 96
    assert figures.kl_max < 1e-8
    assert figures.same_top.value == 1.0


def test_images_are_fed_and_their_tokens_are_not_predicted() -> None:
    config = tiny_vision_config("image-over-window")
    model, layout = random_model(config), cache_layout(config, "ring", 96, 16)
    vision = config.vision
    assert vision is not None
    ids = with_images(config, [5, None, 3, None, 9])
    pixels = random_pixels(config, 2)
    images = list((pixels.permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8))
    document = Document(ids, images)
    exact = torch.from_numpy(np.stack([network_input(image)[0] for image in images]))
    logits = model(torch.tensor([ids]), soft_tokens=model.encode_images(exact))[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    text = torch.tensor(ids[1:]) != vision.image_token_id
    figures = compare(EagerSession(model, layout), {"r": EagerSession(model, layout)}, [document])["r"]
    assert figures.tokens == int(text.sum()) == len(ids) - 1 - 2 * vision.tokens_per_image
    assert figures.perplexity.value == pytest.approx(math.exp(losses[text].mean()), rel=1e-4)
    assert figures.kl_max < 1e-12
    blind = [np.zeros_like(image) for image in images]
    other = compare(EagerSession(model, layout), {"r": EagerSession(model, layout)}, [Document(ids, blind)])["r"]
    assert abs(other.perplexity.value - figures.perplexity.value) > 1e-3


def test_a_reference_of_another_vocabulary() -> None:
    five, four = FunctionSession(lambda _: [0.0] * 5, 5), FunctionSession(lambda _: [0.0] * 4, 4)
    with pytest.raises(BadInput, match="the original has 4 tokens, the model 5"):
        compare(five, {"the original": four}, [Document([0, 1, 2], [])])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    rows = np.zeros((4, 3), np.float32)
    broken = rows.copy()
    broken[2, 1] = bad
    with pytest.raises(VerificationFailed, match="the model gives NaN or infinite logits at position 2"):
        compared(rows, broken, [0, 1, 2, 0])
    with pytest.raises(VerificationFailed, match="r gives NaN"):
        compared(broken, rows, [0, 1, 2, 0])


@pytest.mark.parametrize("pieces", [[], [[2]], [[2, 1]]])
def test_too_few_tokens(pieces: list[list[int]]) -> None:
    session = FunctionSession(lambda _: [0.0] * 3, 3)
    with pytest.raises(BadInput, match="fewer than 2 tokens"):
        compare(session, {"r": FunctionSession(lambda _: [0.0] * 3, 3)}, [Document(ids, []) for ids in pieces])


def test_the_table_has_a_column_per_model() -> None:
    rows = np.random.default_rng(3).normal(0, 1, (6, 4)).astype(np.float32)
    figures = compared(rows, rows + rows**2, [1, 2, 3, 1, 2, 3])
    text = comparison_table({"one": figures, "two": figures})
    header, _, *body = text.splitlines()
    assert header.split("|")[2:4] == [header.split("|")[2], header.split("|")[2].replace("one", "two")]
    (line,) = (line for line in body if line.startswith("| KL divergence, nats"))
    assert line.count(f"{figures.kl.value:.3g} ± {figures.kl.error:.2g}") == 2
