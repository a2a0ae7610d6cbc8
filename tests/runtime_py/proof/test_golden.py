from pathlib import Path

import numpy as np
import pytest

from gemma3.errors import VerificationFailed
from runtime_py.proof.golden import COLUMNS, TOP, Recorder, load_golden, relative_rms, save_golden

LARGE = 50_000


def exact_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        return wide - np.log(np.exp(wide).sum())

    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def random_logits(vocab_size: int, seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, vocab_size).astype(np.float32)


def test_small_vocabulary_is_compared_whole() -> None:
    expected, noise = random_logits(300, 0), random_logits(300, 1, 0.01)
    recorder = Recorder([5, 6], 300)
    recorder.add(1, expected)
    difference = recorder.reference().compare(1, expected + noise)
    assert difference is not None
    assert difference.count == 300
    assert difference.max_abs == pytest.approx(np.abs(noise).max(), rel=1e-3)
    assert difference.kl == pytest.approx(exact_kl(expected, expected + noise), rel=1e-4)
    assert difference.same_top


def test_equal_logits_have_no_difference() -> None:
    expected = random_logits(LARGE, 0)
    recorder = Recorder([5], LARGE)
    recorder.add(0, expected)
    difference = recorder.reference().compare(0, expected)
    assert difference is not None
    assert difference.max_abs == 0
    assert difference.kl == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])  # flat to peaked
@pytest.mark.parametrize("noise", [0.003, 0.1])
def test_the_divergence_over_a_large_vocabulary_is_estimated_from_a_part(scale: float, noise: float) -> None:
    recorder, exact, logits = Recorder(range(8), LARGE), [], []
    for position in range(8):
        expected = random_logits(LARGE, position, scale)
        logits.append(expected + random_logits(LARGE, 100 + position, noise))
        exact.append(exact_kl(expected, logits[-1]))
        recorder.add(position, expected)
    reference = recorder.reference()
    assert reference.values.shape == (8, COLUMNS)
    assert reference.top_values.shape == (8, TOP)
    differences = [reference.compare(position, logits[position]) for position in range(8)]
    assert sum(one.kl for one in differences if one) == pytest.approx(sum(exact), rel=0.1)


def test_a_changed_top_token_is_noticed() -> None:
    expected = random_logits(LARGE, 0)
    recorder = Recorder([5], LARGE)
    recorder.add(0, expected)
    logits = expected.copy()
    logits[np.argsort(expected)[-2]] = expected.max() + 1
    difference = recorder.reference().compare(0, logits)
    assert difference is not None
    assert not difference.same_top


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    recorder = Recorder([5, 6, 7], LARGE)
    for position in (0, 2):
        recorder.add(position, random_logits(LARGE, position))
    reference = recorder.reference()
    save_golden(tmp_path / "golden", {"float": reference, "int8": reference.at([2])})
    loaded = load_golden(tmp_path / "golden")
    assert loaded["float"].positions.tolist() == [0, 2]
    assert loaded["int8"].positions.tolist() == [2]
    assert (loaded["float"].values == reference.values).all()
    assert (loaded["int8"].top_values == reference.top_values[1:]).all()
    assert loaded["int8"].compare(0, random_logits(LARGE, 0)) is None


def test_images_and_their_soft_tokens_are_saved_once_and_for_each_reference(tmp_path: Path) -> None:
    recorder = Recorder([5, 6, 7], 10)
    recorder.add(2, random_logits(10, 0))
    images = np.random.default_rng(0).integers(256, size=(2, 4, 4, 3)).astype(np.uint8)
    soft_tokens = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    references = {name: recorder.reference(images, soft_tokens * scale) for name, scale in (("float", 1), ("int8", 2))}
    save_golden(tmp_path / "golden", references)
    loaded = load_golden(tmp_path / "golden")
    for name, reference in references.items():
        assert (loaded[name].images == images).all()
        assert loaded[name].images.dtype == np.uint8
        assert (loaded[name].soft_tokens == reference.soft_tokens).all()
    assert relative_rms(loaded["int8"].soft_tokens, soft_tokens) == pytest.approx(1.0)


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "golden").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(VerificationFailed, match="golden"):
        load_golden(tmp_path / "golden")
