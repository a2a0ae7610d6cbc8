"""A chat whose earlier turns stay in the session's KV cache, so that only new tokens are fed."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gemma3.chat import GEMMA, ChatFormat, Message
from gemma3.tokenizer import Tokenizer
from runtime_py.generate import Sampler, StopReason, generate
from runtime_py.pictures import Picture, content_of, views
from runtime_py.sessions.protocol import Session, check_ids


def stream_text(generation: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The generated text as it arrives, never cut inside a character."""
    decoder = tokenizer.decoder()
    for token in generation:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.flush():
        yield rest


@dataclass(frozen=True)
class _Turn:
    """The conversation up to a user's turn: all of it, and the part of it to feed, from position 0 if ``anew``."""

    messages: list[Message]
    pictures: list[Picture]
    encoded: list[int]
    fed_ids: list[int]
    fed_pictures: list[Picture]
    anew: bool


class Conversation:
    """Turns of a user and the model over one session, which nothing else may feed meanwhile.

    ``chat`` is the form of the conversation. ``stop_ids`` end a turn of the model, and ``max_new_tokens`` bounds it
    (None: no bound). ``reason`` says why the last one ended.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        chat: ChatFormat = GEMMA,
        stop_ids: Collection[int],
        max_new_tokens: int | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._chat = chat
        self._stop_ids = stop_ids
        self._limit = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._session.reset()
        self._messages: list[Message] = []
        self._pictures: list[Picture] = []
        self._encoded: list[int] = []  # the conversation up to the model's last turn
        self._unfed: list[int] = []
        self.reason: StopReason | None = None

    def turn_ids(self, text: str, pictures: Sequence[Picture] = ()) -> list[int]:
        """The ids to feed for the next user turn. After the first turn they begin with the end of the model's turn.

        The ids fed before and these ids are the encoded conversation. The model's own ids are kept, because encoding
        its text again could split it into other tokens. When the chat format shows earlier turns in another way than
        before, these ids are the whole conversation. Raises BadInput as ``placed`` and ``ChatFormat.encode`` do.
        """
        return self._turn(text, pictures).fed_ids

    def say(self, text: str, pictures: Sequence[Picture] = ()) -> Iterator[str]:
        """The model's answer to ``text``, piece by piece as it is generated. Afterwards ``reason`` says why it ended.

        ``placed`` decides where the pictures go. Raises BadInput as ``turn_ids`` does, and DoesNotFit when the turn
        does not fit the context. After such an error the conversation is unchanged.
        """
        session, turn = self._session, self._turn(text, pictures)
        images = views(turn.fed_pictures)
        if turn.anew:
            size, context = session.vocab_size, session.context
            check_ids(turn.fed_ids, vocab_size=size, position=0, context=context, images=len(images))
            session.reset()
        generation = generate(
            session,
            turn.fed_ids,
            self._sampler,
            images=images,
            stop_ids=self._stop_ids,
            max_new_tokens=self._limit,
        )
        self._messages, self._pictures, self._encoded = turn.messages, turn.pictures, turn.encoded
        said: list[int] = []
        try:
            yield from stream_text(_recorded(generation, said), self._tokenizer)
        finally:  # also when the caller stops iterating before the answer ends
            self._messages.append({"role": "assistant", "content": self._tokenizer.decode(said)})
            self._unfed = generation.unfed
            self.reason = generation.reason

    def _turn(self, text: str, pictures: Sequence[Picture]) -> _Turn:
        vision = self._session.vision
        messages: list[Message] = [*self._messages, {"role": "user", "content": content_of(text, pictures, vision)}]
        encoded = self._chat.encode(
            self._tokenizer, messages, tokens_per_image=None if vision is None else vision.tokens_per_image
        )
        shown = [*self._pictures, *pictures]
        if not self._messages:
            return _Turn(messages, shown, encoded, encoded, shown, anew=False)
        answer = self._messages[-1]["content"]
        assert isinstance(answer, str)
        for seen in (answer, answer.strip()):  # many formats trim the model's words
            before = [*self._encoded, *self._tokenizer.encode(seen, bos=False)]
            if encoded[: len(before)] == before:
                words = [token for token in self._unfed if token not in self._stop_ids]
                return _Turn(messages, shown, encoded, words + encoded[len(before) :], list(pictures), anew=False)
        return _Turn(messages, shown, encoded, encoded, shown, anew=True)


def _recorded(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    for token in tokens:
        record.append(token)
        yield token
