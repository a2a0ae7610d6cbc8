import json
import math
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from gemma3.chat import encode_chat
from gemma3.errors import BadInput, DoesNotFit
from gemma3.tokenizer import Tokenizer
from runtime_py.measure.questions import Question, Score, exact_match, read_questions, score_table, total
from tests.bundles import VOCABULARY
from tests.function_session import FunctionSession

QUESTIONS = [
    Question("capital", "Capital of France?", "Paris."),
    Question("sum", "2 + 2?", "4"),
    Question("capital", "Capital of Italy?", "Rome."),
]


def knowing(tokenizer: Tokenizer, answers: dict[str, str], context: int = 128) -> FunctionSession:
    """Answers a prompt as ``answers`` says and ends the turn."""
    script = {
        tuple(encode_chat(tokenizer, [{"role": "user", "content": prompt}])): [
            *tokenizer.encode(answer, bos=False),
            tokenizer.end_of_turn_id,
        ]
        for prompt, answer in answers.items()
    }

    def next_id(fed: list[int]) -> list[float]:
        (wanted,) = (
            answer[len(fed) - len(prompt)] for prompt, answer in script.items() if tuple(fed[: len(prompt)]) == prompt
        )
        return [float(token == wanted) for token in range(VOCABULARY)]

    return FunctionSession(next_id, VOCABULARY, context)


def test_exact_match_by_category(tokenizer: Tokenizer) -> None:
    answers = {"Capital of France?": " Paris.\n", "2 + 2?": "5", "Capital of Italy?": "Rome"}
    session = knowing(tokenizer, answers)
    asked: list[int] = []
    scores = exact_match(session, tokenizer, QUESTIONS, {tokenizer.end_of_turn_id}, asked.append)
    # Spaces around an answer do not matter; a missing full stop does.
    assert scores == {"capital": Score(1, 2), "sum": Score(0, 1)}
    assert total(scores) == Score(1, 3)
    assert asked == [1, 2, 3]


def test_the_error_is_that_of_a_proportion() -> None:
    share = Score(30, 40).share
    assert share.value == 0.75
    assert share.error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert str(Score(30, 40)) == "30 of 40, 75.0 ± 6.9 %"
    assert Score(1, 1).share.error == 0


def test_the_table_ends_with_the_total() -> None:
    scores = {"capital": Score(1, 2), "sum": Score(0, 1)}
    lines = score_table({"a": scores, "b": scores}).splitlines()
    assert len(lines) == 5
    assert lines[-1].count("1 of 3, 33.3 ± 33 %") == 2


def test_a_question_over_the_context(tokenizer: Tokenizer) -> None:
    with pytest.raises(DoesNotFit, match="context of 8"):
        exact_match(knowing(tokenizer, {}, context=8), tokenizer, QUESTIONS, ())


def test_lines_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    path.write_text('{"category": "c", "prompt": "a\u2028b", "answer": "x"}\n\n', encoding="utf-8")
    assert read_questions(path) == [Question("c", "a\u2028b", "x")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no text"),
        (b"\n\n", "holds no text"),
        (b"\x80\x00", "not UTF-8"),
        (b"{", "line 1: not JSON"),
        (b"[1]", r"line 1: is '\[1\]'"),
        (b'{"category": "c", "prompt": "p"}', "expected text under 'category', 'prompt' and 'answer'"),
        (b'{"category": "c", "prompt": "p", "answer": 4}', "expected text"),
        (b'{"category": "c", "prompt": "", "answer": "4"}', "expected text"),
        (b'\n{"category": "c", "prompt": "p", "answer": "4", "more": ""}', "line 2"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_files_that_hold_no_questions(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=words) as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_questions(tmp_path / "none")


# Images


def picture(path: Path) -> str:
    PillowImage.new("RGB", (8, 4), "red").save(path)
    return path.name


def line(**data: object) -> str:
    return json.dumps({"category": "colour", "prompt": "What colour?", "answer": "Red."} | data)


def test_images_are_found_from_the_files_folder(tmp_path: Path) -> None:
    name = picture(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(line(images=[name, name]) + "\n" + line())
    shown, plain = read_questions(tmp_path / "questions.jsonl")
    assert shown.images == (tmp_path / name,) * 2
    assert plain.images == ()


@pytest.mark.parametrize(
    ("images", "word"),
    [
        ("a.png", "expected a list"),
        ([1], "expected a list"),
        (["none.png"], "no such file"),
        (["q.jsonl"], "begins with"),
    ],
)
def test_images_that_cannot_be_used_are_named_with_their_line(tmp_path: Path, images: object, word: str) -> None:
    (tmp_path / "q.jsonl").write_text(line() + "\n" + line(images=images))
    with pytest.raises(BadInput, match=f"line 2: .*{word}"):
        read_questions(tmp_path / "q.jsonl")


def test_a_text_only_model_refuses_questions_about_images(tokenizer: Tokenizer, tmp_path: Path) -> None:
    question = Question("colour", "What colour?", "Red.", (tmp_path / picture(tmp_path / "a.png"),))
    with pytest.raises(BadInput, match="an image for a text-only model"):
        exact_match(knowing(tokenizer, {}), tokenizer, [question], ())
