import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from gemma3.chat import Message, encode_chat
from gemma3.chat_template import TemplateFormat
from gemma3.errors import BadInput, DoesNotFit
from gemma3.tokenizer import Tokenizer
from tests.bundles import VOCABULARY
from tests.function_session import FunctionSession

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install '.[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from runtime_py.measure.lm_eval_adapter import SessionLM

CONTEXT = 48
BOS = 2


def rows(fed: list[int]) -> list[float]:
    """Logits that depend on the first, the last and the number of ids."""
    random = np.random.default_rng((fed[0], fed[-1], len(fed)))
    return list(random.normal(0, 3, VOCABULARY))


class Watched(FunctionSession):
    """Remembers every sequence that it was fed."""

    def __init__(self, function: Any = rows, context: int = CONTEXT) -> None:
        super().__init__(function, VOCABULARY, context)
        self.sequences: list[list[int]] = []

    def reset(self) -> None:
        super().reset()
        self.sequences.append(self.fed)


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def log_probability(fed: list[int], token: int) -> float:
    return float(log_softmax(np.array(rows(fed), np.float32).astype(np.float64))[token])


def test_loglikelihood_is_the_sum_over_the_continuation(tokenizer: Tokenizer) -> None:
    session = Watched()
    lm = SessionLM(session, tokenizer, ())
    context, continuation = tokenizer.encode("The sky is", bos=True), tokenizer.encode(" blue", bos=False)
    assert tokenizer.encode("The sky is blue", bos=True) == context + continuation
    ((total, greedy),) = lm.loglikelihood([request("The sky is", " blue")], disable_tqdm=True)
    ids = context + continuation
    expected = [log_probability(ids[:end], ids[end]) for end in range(len(context), len(ids))]
    assert total == pytest.approx(math.fsum(expected))
    assert greedy is False
    assert session.sequences == [ids[:-1]]


def test_an_empty_context_is_bos(tokenizer: Tokenizer) -> None:
    lm = SessionLM(Watched(), tokenizer, ())
    (token,) = tokenizer.encode("a", bos=False)
    ((total, _),) = lm.loglikelihood([request("", "a")], disable_tqdm=True)
    assert total == pytest.approx(log_probability([BOS], token))


def test_greedy_means_that_every_token_was_the_likeliest(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("yes", bos=False)
    script = dict(zip([BOS, *ids], [*ids, ids[0]], strict=False))
    session = Watched(lambda fed: [float(token == script[fed[-1]]) for token in range(VOCABULARY)])
    lm = SessionLM(session, tokenizer, ())
    assert lm.loglikelihood([request("", "yes")], disable_tqdm=True)[0][1] is True
    assert lm.loglikelihood([request("", "yet")], disable_tqdm=True)[0][1] is False


def test_choices_of_one_token_are_fed_once(tokenizer: Tokenizer) -> None:
    session = Watched()
    lm = SessionLM(session, tokenizer, ())
    lm.loglikelihood([request("Answer:", choice) for choice in "ABCD"], disable_tqdm=True)
    assert session.sequences == [tokenizer.encode("Answer:", bos=True)]


def test_a_context_that_is_too_long_is_cut_after_its_bos(tokenizer: Tokenizer) -> None:
    session = Watched()
    lm = SessionLM(session, tokenizer, ())
    lm.loglikelihood([request("x " * 80, "ab")], disable_tqdm=True)
    (fed,) = session.sequences
    whole = tokenizer.encode("x " * 79 + "x ab", bos=True)
    assert fed == [BOS, *whole[: len(whole) - 1][-(CONTEXT - 1) :]]
    with pytest.raises(DoesNotFit, match=f"context of {CONTEXT}"):
        lm.loglikelihood([request("x", "y " * 80)], disable_tqdm=True)


def test_rolling_predicts_every_token_once_after_bos(tokenizer: Tokenizer) -> None:
    session = Watched()
    lm = SessionLM(session, tokenizer, ())
    text = "abcdefghij" * 7
    ids = tokenizer.encode(text, bos=False)
    count = len(ids)
    assert 48 < count < 95
    (total,) = lm.loglikelihood_rolling([request(text)])
    # The last window is as long as the context too, and predicts only what the first did not.
    windows = [([BOS, *ids[:47]], ids[:48]), ([BOS, *ids[count - 48 : count - 1]], ids[48:])]
    assert session.sequences == [fed for fed, _ in windows]
    expected = [
        log_probability(fed[: len(fed) - len(predicted) + 1 + index], token)
        for fed, predicted in windows
        for index, token in enumerate(predicted)
    ]
    assert len(expected) == count
    assert total == pytest.approx(math.fsum(expected))


def saying(tokenizer: Tokenizer, text: str, end: int) -> Watched:
    """Continues any prompt of one token (after BOS) with ``text``, then ``end``."""
    script = [*tokenizer.encode(text, bos=False), end]
    return Watched(lambda fed: [float(token == script[len(fed) - 2]) for token in range(VOCABULARY)])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"until": ["\n\n", "."]}, "one"),
        ({"until": "three"}, "one. two "),
        ({"until": []}, "one. two three"),
        ({"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}, None),
    ],
)
def test_generation_ends_before_a_stop_string(
    tokenizer: Tokenizer, settings: dict[str, Any], expected: str | None
) -> None:
    text = "one. two three"
    lm = SessionLM(saying(tokenizer, text, tokenizer.end_of_turn_id), tokenizer, {tokenizer.end_of_turn_id})
    settings = {"max_gen_toks": 32} | settings
    (answer,) = lm.generate_until([request("Q", settings)])
    assert answer == (tokenizer.decode(tokenizer.encode(text, bos=False)[:3]) if expected is None else expected)


def test_sampling_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="do_sample: false"):
        SessionLM(Watched(), tokenizer, ()).generate_until([request("Q", {"do_sample": True})])


def test_chat_text_becomes_the_ids_of_the_chat(tokenizer: Tokenizer) -> None:
    lm = SessionLM(Watched(), tokenizer, ())
    history: list[Message] = [
        {"role": "user", "content": "Hi <b>there</b>\nfriend"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
    ]
    assert lm.tok_encode(lm.apply_chat_template(history)) == encode_chat(tokenizer, history)
    opened = lm.tok_encode(lm.apply_chat_template(history[:2], add_generation_prompt=False))
    closing = [tokenizer.end_of_turn_id, *tokenizer.encode("\n", bos=False)]
    assert [*opened, *closing] == encode_chat(tokenizer, history[:2], add_generation_prompt=False)


def test_marker_names_in_other_text_are_text(tokenizer: Tokenizer) -> None:
    ids = SessionLM(Watched(), tokenizer, ()).tok_encode("a<end_of_turn>")
    assert tokenizer.end_of_turn_id not in ids
    assert tokenizer.decode(ids) == "a<end_of_turn>"


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_runs_a_local_task(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    documents = [
        {"question": "1+1=", "choices": ["2", "3"], "answer": 0, "text": "two"},
        {"question": "2+1=", "choices": ["2", "3"], "answer": 0, "text": "2"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "tiny_choice.yaml").write_text(
        f"""task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{common}"""
    )
    (tmp_path / "tiny_generate.yaml").write_text(
        f"""task: tiny_generate
output_type: generate_until
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
{common}"""
    )
    two, stop = tokenizer.encode("2.", bos=False)
    session = Watched(lambda fed: [float(token == (stop if fed[-1] == two else two)) for token in range(VOCABULARY)])
    results = simple_evaluate(
        model=SessionLM(session, tokenizer, ()),
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )["results"]
    assert results["tiny_choice"]["acc,none"] == 1.0
    assert results["tiny_generate"]["exact_match,none"] == 0.5


def test_a_chat_template_of_its_own_is_refused(tokenizer: Tokenizer) -> None:
    lm = SessionLM(Watched(), tokenizer, (), TemplateFormat("{{ messages[0].content }}", {}))
    with pytest.raises(BadInput, match="a chat template of its own"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
