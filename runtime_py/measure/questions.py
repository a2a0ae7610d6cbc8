"""Asks any session short questions with one right answer each. Scores the answers by exact match, per category."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.chat import GEMMA, ChatFormat
from gemma3.errors import BadInput
from gemma3.images import read_image
from gemma3.rows import read_data
from gemma3.tokenizer import Tokenizer
from runtime_py.conversation import Conversation
from runtime_py.generate import Sampler
from runtime_py.measure.comparison import Estimate
from runtime_py.pictures import read_pictures
from runtime_py.report import table
from runtime_py.sessions.protocol import Session

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A question, with the one answer that is right and the image files that it shows."""

    category: str
    prompt: str
    answer: str
    images: tuple[Path, ...] = ()


def read_questions(path: Path) -> list[Question]:
    """The questions in a file of rows (docs/quantization.md). A row has the fields of ``Question`` as text.

    ``images`` is optional: a list of paths relative to the file's folder. Raises BadInput for anything else, for a file
    without questions, and for images that cannot be read.
    """
    rows = read_data(path)
    if isinstance(rows, str):
        raise BadInput(f"{path}: holds no questions but text; give one JSON object a line")
    return [_question(row.value, path.parent, f"{path}: {row.place}") for row in rows]


def _question(row: Any, folder: Path, where: str) -> Question:
    data = dict(row) if isinstance(row, dict) else {}
    names = data.pop("images", [])
    if not (
        data.keys() == {"category", "prompt", "answer"}
        and all(isinstance(value, str) and value for value in data.values())
    ):
        raise BadInput(f"{where}: is {ascii(row)[:60]!r}, expected text under 'category', 'prompt' and 'answer'")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadInput(f"{where}: 'images' is {str(names)[:60]!r}, expected a list of paths")
    try:
        for name in names:
            read_image(folder / name)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return Question(**data, images=tuple(folder / name for name in names))


@dataclass(frozen=True)
class Score:
    """How many of the questions asked were answered right."""

    right: int
    asked: int

    @property
    def share(self) -> Estimate:
        """The share of right answers, with the standard error of a proportion. Questions count as independent."""
        share = self.right / self.asked
        return Estimate(share, math.sqrt(share * (1 - share) / max(1, self.asked - 1)))

    def __str__(self) -> str:
        return f"{self.right} of {self.asked}, {self.share.show('.1f', 100)} %"


def answer(
    session: Session,
    tokenizer: Tokenizer,
    question: Question,
    stop_ids: Collection[int],
    pan_and_scan: bool = False,
    chat: ChatFormat = GEMMA,
) -> str:
    """The greedy answer to ``question``, asked as the first turn of a chat, without surrounding whitespace.

    Raises what ``read_pictures`` and ``Conversation.say`` raise.
    """
    pictures = read_pictures(question.images, session.vision, pan_and_scan)
    conversation = Conversation(
        session, tokenizer, Sampler(), chat=chat, stop_ids=stop_ids, max_new_tokens=MAX_NEW_TOKENS
    )
    return "".join(conversation.say(question.prompt, pictures)).strip()


def exact_match(
    session: Session,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    stop_ids: Collection[int],
    progress: Callable[[int], None] = lambda asked: None,
    *,
    pan_and_scan: bool = False,
    chat: ChatFormat = GEMMA,
) -> dict[str, Score]:
    """The scores by category. An answer is right if it equals the expected one exactly.

    ``progress`` is called with the number of questions asked so far. Raises what ``answer`` raises.
    """
    right: dict[str, list[bool]] = {}
    for asked, question in enumerate(questions, 1):
        correct = answer(session, tokenizer, question, stop_ids, pan_and_scan, chat) == question.answer
        right.setdefault(question.category, []).append(correct)
        progress(asked)
    return {category: Score(sum(ones), len(ones)) for category, ones in right.items()}


def total(scores: Mapping[str, Score]) -> Score:
    return Score(sum(one.right for one in scores.values()), sum(one.asked for one in scores.values()))


def score_table(models: Mapping[str, Mapping[str, Score]]) -> str:
    """A table with one column for each model and one row for each category."""
    categories = next(iter(models.values()))
    rows = [(category, *(str(scores[category]) for scores in models.values())) for category in categories]
    return table(("right answers", *models), [*rows, ("all", *(str(total(scores)) for scores in models.values()))])
