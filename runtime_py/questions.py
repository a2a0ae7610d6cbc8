"""Short questions with one right answer each, asked through any session."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma3.chat import encode_chat
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from runtime_py.conversation import stream_text
from runtime_py.generate import Sampler, generate
from runtime_py.session import Session

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Question:
    category: str
    prompt: str
    answer: str


def read_questions(path: Path) -> list[Question]:
    """One JSON object a line with the fields of Question. Raises BadInput for anything else."""
    try:
        return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not questions, one JSON object a line ({error})") from None


def answer(session: Session, tokenizer: Tokenizer, prompt: str, stop_ids: Collection[int]) -> str:
    """The greedy answer to ``prompt`` as the first turn of a chat, without the space around it."""
    session.reset()
    ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    generation = generate(session, ids, Sampler(), stop_ids=stop_ids, max_new_tokens=MAX_NEW_TOKENS)
    return "".join(stream_text(generation, tokenizer)).strip()


def count_right(
    session: Session, tokenizer: Tokenizer, questions: Sequence[Question], stop_ids: Collection[int]
) -> int:
    """How many answers are the expected ones to the letter."""
    return sum(answer(session, tokenizer, one.prompt, stop_ids) == one.answer for one in questions)
