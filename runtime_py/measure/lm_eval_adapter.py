"""Runs sessions as models of EleutherAI's lm-evaluation-harness. After ``pip install '.[lm-eval]'``:

    from lm_eval import simple_evaluate
    from runtime_py.measure.lm_eval_adapter import SessionLM

    simple_evaluate(model=SessionLM(session, tokenizer, stop_ids, chat), tasks=["arc_easy"])

``session`` is any session of this project: eager, .pte or .onnx. Every sequence begins with BOS, without which Gemma's
predictions are worthless, even a sequence that was cut on the left to fit the context.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from gemma3.chat import GEMMA, ChatFormat, Message, render_chat
from gemma3.errors import BadInput, DoesNotFit
from gemma3.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from runtime_py.conversation import stream_text
from runtime_py.generate import Sampler, generate
from runtime_py.measure.comparison import Prediction
from runtime_py.sessions.protocol import Session

BOS = "<bos>"
MARKERS = re.compile(f"({BOS}|{START_OF_TURN}|{END_OF_TURN})")
MAX_NEW_TOKENS = 256  # the harness's own default


class SessionLM(TemplateLM):
    """A session as a model of the harness. Requests run one by one.

    A generation ends at one of ``stop_ids`` or at a stop string that the task names. ``chat`` is the model's form of
    conversations.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, stop_ids: Collection[int], chat: ChatFormat = GEMMA
    ) -> None:
        super().__init__()
        self._session = session
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._chat = chat

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return self._tokenizer.sha256

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without the generation prompt, the last message stays open and can be continued.

        Raises BadInput for another form than Gemma's: its text could not be told from ordinary text in ``tok_encode``.
        """
        if self._chat.name != "gemma":
            raise BadInput(
                "the checkpoint has a chat template of its own, and the harness can ask in Gemma's form only"
            )
        text = render_chat(chat_history, add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(f"{END_OF_TURN}\n")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of ``string``, with BOS in front unless ``add_special_tokens`` is False.

        Turn markers become special tokens only in text that begins with "<bos>", as ``apply_chat_template`` makes it.
        Such text gets no second BOS.
        """
        if not string.startswith(BOS):
            return self._tokenizer.encode(string, bos=add_special_tokens is not False)
        ids: list[int] = []
        for part in MARKERS.split(string):
            marker = MARKERS.fullmatch(part)
            ids += [self._tokenizer.special_id(part)] if marker else self._tokenizer.encode(part, bos=False)
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, summed over windows of the context's length."""
        return [self._text_likelihood(*request.args) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop string.

        Raises BadInput when a task asks for sampling, and DoesNotFit when the context has no room for the new tokens.
        """
        answers = []
        for request in requests:
            context, settings = request.args
            answers.append(self._continue(context, **settings))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation, its log-probability and whether greedy decoding would give it."""
        answers = []
        fed: tuple[list[int], int] = [], 0
        predictions: list[Prediction] = []
        for strings, context, continuation in requests:
            if not continuation:
                raise BadInput(f"continuation {strings[1]!r} has no token of its own; lengthen it in the task")
            ids = self._fitted([*context, *continuation[:-1]], keep=len(continuation) - 1)
            if (ids, len(continuation)) != fed:  # answers of one token each share their context
                fed = ids, len(continuation)
                predictions = list(self._predictions(*fed))
            answers.append(_score(predictions, continuation))
            self.cache_hook.add_partial("loglikelihood", strings, answers[-1])
        return answers

    def _text_likelihood(self, text: str) -> float:
        ids = self._tokenizer.encode(text, bos=False)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self._session.context, context_len=1)
        return sum(
            _score(self._predictions([self.prefix_token_id, *fed[1:]], len(predicted)), predicted)[0]
            for fed, predicted in windows
        )

    def _continue(
        self,
        context: str,
        until: str | Sequence[str] = (),
        max_gen_toks: int = MAX_NEW_TOKENS,
        do_sample: bool = False,
        **_: Any,
    ) -> str:
        if do_sample:
            raise BadInput("the task samples; set do_sample: false in its generation_kwargs")
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = self._fitted(self.tok_encode(context), room=max_gen_toks)
        self._session.reset()
        text = ""
        generation = generate(self._session, ids, Sampler(), stop_ids=self._stop_ids, max_new_tokens=max_gen_toks)
        for piece in stream_text(generation, self._tokenizer):
            text += piece
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _predictions(self, ids: Sequence[int], count: int) -> Iterator[Prediction]:
        """The prediction after each of the last ``count`` of ``ids``. The ids are fed from an empty cache."""
        self._session.reset()
        split = len(ids) - count + 1
        yield Prediction(self._session.prefill(ids[:split]))
        for token in ids[split:]:
            yield Prediction(self._session.step(token))

    def _fitted(self, ids: list[int], *, keep: int = 1, room: int = 0) -> list[int]:
        """``ids``, cut after their BOS on the left, so that ``room`` more ids fit the context.

        Raises DoesNotFit when fewer than the last ``keep`` ids would be left.
        """
        size = self._session.context - room
        if len(ids) <= size:
            return ids
        if size < keep + 1:
            raise DoesNotFit(
                f"{keep} prompt tokens and {room} new tokens do not fit the context of {self._session.context}; "
                "export with a larger --context"
            )
        return [ids[0], *ids[len(ids) - size + 1 :]]


def _score(predictions: Iterable[Prediction], ids: Sequence[int]) -> tuple[float, bool]:
    pairs = list(zip(predictions, ids, strict=True))
    total = sum(float(prediction.log_probabilities[token]) for prediction, token in pairs)
    return total, all(prediction.top == token for prediction, token in pairs)
