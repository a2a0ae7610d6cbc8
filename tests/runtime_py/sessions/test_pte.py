"""The session over a .pte: what it refuses, that reset and threads change nothing, and the stock runner's answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

from gemma3.errors import BadInput, DoesNotFit
from runtime_py.sessions.pte import PteSession
from tests.pte_models import CHUNK, TinyPte, tiny_pte
from tests.rewinding import (
    assert_a_rewound_session_equals_one_that_never_went_on,
    assert_rows_are_those_of_single_steps,
)
from tests.shapes import random_tokens, tiny_config

DEMO = Path(__file__).parents[3] / "gemma3" / "demo"

pytestmark = pytest.mark.slow  # all of them need an exported file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    """One sliding and one global layer, int4."""
    config = tiny_config(num_hidden_layers=2, sliding_window_pattern=2)
    return tiny_pte(config, tmp_path_factory.mktemp("session"), "int4-block32", "int4")


def walk(session: PteSession, ids: list[int]) -> np.ndarray:
    """Logits after each of two prompts and after each further id."""
    found = [session.prefill(ids[:11]), session.prefill(ids[11:20])]
    return np.stack(found + [session.step(token) for token in ids[20:]])


def test_reset_gives_what_a_new_session_gives(tiny: TinyPte) -> None:
    """Bit for bit, though the rings are full of the last sequence's keys and values."""
    ids = random_tokens(tiny.config, 60)
    fresh = walk(tiny.session(), ids)
    session = tiny.session()
    session.prefill(random_tokens(tiny.config, 120, seed=7))
    session.reset()
    assert session.position == 0
    assert np.array_equal(walk(session, ids), fresh)


def test_a_call_gives_the_logits_of_its_last_positions(tiny: TinyPte) -> None:
    """Where roundings of activations may fall out otherwise; by a sixth of the logits' spread."""
    ids = random_tokens(tiny.config, 100)
    assert_rows_are_those_of_single_steps(tiny.session, ids, 0.1)


def test_a_rewound_session_equals_one_that_never_went_on(tiny: TinyPte) -> None:
    assert_a_rewound_session_equals_one_that_never_went_on(tiny.session, random_tokens(tiny.config, 120), 8)


def test_two_sessions_have_caches_of_their_own(tiny: TinyPte) -> None:
    first, second = tiny.session(), tiny.session()
    ids = random_tokens(tiny.config, 30)
    for token in ids:
        first.step(token)
        second.step((token + 1) % tiny.config.vocab_size)
    assert np.array_equal(first.step(3), np.asarray(walk_one_by_one(tiny.session(), [*ids, 3])))


def walk_one_by_one(session: PteSession, ids: list[int]) -> np.ndarray:
    for token in ids:
        session.step(token)
    return session.logits


def test_logits_are_the_callers_to_keep(tiny: TinyPte) -> None:
    session = tiny.session()
    first = session.prefill([1, 2, 3])
    kept = first.copy()
    assert first.shape == (tiny.config.vocab_size,)
    assert first.dtype == np.float32
    session.step(4)
    assert np.array_equal(first, kept)
    assert not np.array_equal(session.logits, kept)


def test_threads_change_nothing_but_time(tiny: TinyPte) -> None:
    ids = random_tokens(tiny.config, 40)
    one, two = walk(tiny.session(threads=1), ids), walk(tiny.session(threads=2), ids)
    assert np.abs(one - two).max() <= 1e-5


def test_the_whole_context_and_no_more(tiny: TinyPte) -> None:
    session = tiny.session()
    ids = random_tokens(tiny.config, tiny.layout.context)
    session.prefill(ids[:-1])
    with pytest.raises(DoesNotFit, match="2 tokens after position 127 are over the context of 128"):
        session.prefill([1, 2])
    assert session.position == 127
    last = session.step(ids[-1])
    assert np.isfinite(last).all()
    with pytest.raises(DoesNotFit, match="over the context"):
        session.step(1)


def test_ids_are_checked_before_any_is_fed(tiny: TinyPte) -> None:
    session = tiny.session()
    with pytest.raises(BadInput, match="empty"):
        session.prefill([])
    with pytest.raises(BadInput, match="token id 160 at index 1 is outside the vocabulary of 160"):
        session.prefill([0, 160])
    assert session.position == 0


def test_a_file_of_another_layout(tiny: TinyPte) -> None:
    with pytest.raises(BadInput, match="get_max_context_len is 128, expected 256"):
        PteSession(tiny.path, replace(tiny.layout, context=256), tiny.config)
    with pytest.raises(BadInput, match=f"get_max_seq_len is {CHUNK}, expected 4"):
        PteSession(tiny.path, replace(tiny.layout, chunk=4), tiny.config)
    with pytest.raises(BadInput, match="get_vocab_size is 160, expected 161"):
        PteSession(tiny.path, tiny.layout, replace(tiny.config, vocab_size=161))


def test_damaged_files_say_why(tiny: TinyPte, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    data = tiny.path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"does not load it .*File size is too small"):
        PteSession(path, tiny.layout, tiny.config)
    path.write_bytes(b"not a program" * 100)
    with pytest.raises(BadInput, match=r"does not load it .*identifier"):
        PteSession(path, tiny.layout, tiny.config)
    with pytest.raises(BadInput, match=r"does not load it .*No such file"):
        PteSession(tmp_path / "missing.pte", tiny.layout, tiny.config)


def test_nothing_is_written_to_stderr(tiny: TinyPte, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.session(threads=2).prefill([1, 2, 3])
    assert capfd.readouterr().err == ""


def test_the_stock_runner_gives_the_same_text(tmp_path: Path) -> None:
    """ExecuTorch's own C++ runner, which Android's uses too, with the demo's tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    config = tiny_config(vocab_size=4096, num_hidden_layers=2, sliding_window_pattern=2)
    tiny = tiny_pte(config, tmp_path, "int4-block32", "int8")
    prompt, count = "the quick brown fox and what came of it", 24

    session = tiny.session()
    ids = [config.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    assert len(ids) > CHUNK  # several calls of the method
    logits, tokens = session.prefill(ids), []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = session.step(tokens[-1])

    pieces: list[str] = []
    runner = TextLLMRunner(str(tiny.path), str(DEMO / "tokenizer.json"))
    settings = GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False, num_bos=1)
    runner.generate(prompt, settings, token_callback=pieces.append)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=False)
