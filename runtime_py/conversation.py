"""A chat whose earlier turns stay in the session's KV cache, so that only new tokens are fed."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gemma3.chat import GEMMA, ChatFormat, Message
from gemma3.config import VisionConfig
from gemma3.images import Pixels
from gemma3.tokenizer import Tokenizer
from runtime_py.generate import Sampler, StopReason, generate
from runtime_py.pictures import Picture, content_of, views
from runtime_py.prefix import NO_PREFIX, Prefix, common
from runtime_py.sessions.protocol import Rewindable, Session, check_ids


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
    """The conversation up to a user's turn, and the ids to be in the caches.

    The first ``kept`` of them need not be fed. They are those of the prefix's snapshot if the session begins ``anew``.
    """

    messages: list[Message]
    pictures: list[Picture]
    encoded: list[int]
    ids: list[int]
    kept: int
    anew: bool


class Conversation:
    """Turns of a user and the model over one session, which nothing else may feed meanwhile.

    ``chat`` is the form of the conversation, and ``prefix`` its beginning. ``stop_ids`` end a turn of the model, and
    ``max_new_tokens`` bounds it (None: no bound). ``reason`` says why the last one ended.

    Before each turn the whole conversation is encoded. The caches keep as much of its beginning as they hold: all of
    it, or what a session that can go back keeps, or the prefix in a snapshot. Only the rest is fed.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        chat: ChatFormat = GEMMA,
        prefix: Prefix = NO_PREFIX,
        stop_ids: Collection[int],
        max_new_tokens: int | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._chat = chat
        self._prefix = prefix
        self._stop_ids = stop_ids
        self._limit = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all turns. The prefix stays. Raises as ``Prefix.restore`` does."""
        self._messages: list[Message] = []
        self._pictures: list[Picture] = list(self._prefix.pictures)
        self._encoded: list[int] = []  # the conversation up to the model's last turn
        self._unfed: list[int] = []
        self.reason: StopReason | None = None
        self._restore()

    def turn_ids(self, text: str, pictures: Sequence[Picture] = ()) -> list[int]:
        """The ids to feed for the next user turn. After the first turn they begin with the end of the model's turn.

        The ids that the caches keep and these ids are the encoded conversation. The model's own ids are kept, because
        encoding its text again could split it into other tokens. When the chat format shows earlier turns in another
        way than before, these ids begin where the caches cannot be used any more, at worst with the whole conversation.
        Raises BadInput as ``placed`` and ``ChatFormat.encode`` do.
        """
        turn = self._turn(text, pictures)
        return turn.ids[turn.kept :]

    def say(self, text: str, pictures: Sequence[Picture] = ()) -> Iterator[str]:
        """The model's answer to ``text``, piece by piece as it is generated. Afterwards ``reason`` says why it ended.

        ``placed`` decides where the pictures go. Raises BadInput as ``turn_ids`` does, and DoesNotFit when the turn
        does not fit the context. After such an error the conversation is unchanged.
        """
        session, turn = self._session, self._turn(text, pictures)
        new = turn.ids[turn.kept :]
        shown = views(turn.pictures)
        images = shown[len(_image_places(turn.ids[: turn.kept], session.vision)) :]
        check_ids(new, vocab_size=session.vocab_size, position=turn.kept, context=session.context, images=len(images))
        self._go_back(turn)
        generation = generate(
            session, new, self._sampler, images=images, stop_ids=self._stop_ids, max_new_tokens=self._limit
        )
        self._messages, self._pictures, self._encoded = turn.messages, turn.pictures, turn.encoded
        self._images = shown
        said: list[int] = []
        try:
            yield from stream_text(_recorded(generation, said), self._tokenizer)
        finally:  # also when the caller stops iterating before the answer ends
            self._messages.append({"role": "assistant", "content": self._tokenizer.decode(said)})
            self._fed = [*turn.ids, *said][: session.position]
            self._unfed = generation.unfed
            self.reason = generation.reason

    def _turn(self, text: str, pictures: Sequence[Picture]) -> _Turn:
        vision = self._session.vision
        if self._messages:
            messages: list[Message] = [*self._messages, {"role": "user", "content": content_of(text, pictures, vision)}]
        else:
            messages = self._prefix.first_turn(text, pictures, vision)
        encoded = self._chat.encode(
            self._tokenizer, messages, tokens_per_image=None if vision is None else vision.tokens_per_image
        )
        shown, ids = [*self._pictures, *pictures], self._with_own_words(encoded)
        return _Turn(messages, shown, encoded, ids, *self._kept(ids, views(shown)))

    def _with_own_words(self, encoded: list[int]) -> list[int]:
        """``encoded``, with the model's last turn in the ids that it drew, if the chat format shows its words."""
        if self._messages:
            answer = self._messages[-1]["content"]
            assert isinstance(answer, str)
            for seen in (answer, answer.strip()):  # many formats trim the model's words
                before = [*self._encoded, *self._tokenizer.encode(seen, bos=False)]
                if encoded[: len(before)] == before:
                    words = [token for token in self._unfed if token not in self._stop_ids]
                    return [*self._fed, *words, *encoded[len(before) :]]
        return encoded

    def _kept(self, ids: list[int], images: Sequence[Pixels]) -> tuple[int, bool]:
        """How many of ``ids`` need not be fed, and whether the session must begin anew for that.

        At least the last id is fed, because its logits are needed.
        """
        session = self._session
        same = common(self._fed, ids[:-1]) if len(self._fed) == session.position else 0
        for place, before, now in zip(_image_places(ids, session.vision), self._images, images, strict=False):
            assert session.vision is not None
            if place < same and (place + session.vision.tokens_per_image > same or not np.array_equal(before, now)):
                same = place
        reachable = same == session.position or (
            isinstance(session, Rewindable) and session.can_rewind(session.position, same)
        )
        held = self._prefix.held(ids)
        return (same, False) if reachable and same >= held else (held, True)

    def _go_back(self, turn: _Turn) -> None:
        """Make the caches hold the ids that ``turn`` keeps."""
        session = self._session
        if turn.anew and turn.kept:
            self._restore()
        elif turn.anew:
            session.reset()
        elif turn.kept < session.position:
            assert isinstance(session, Rewindable)
            session.rewind(turn.kept)

    def _restore(self) -> None:
        self._prefix.restore(self._session)
        self._fed = [] if self._prefix.snapshot is None else list(self._prefix.snapshot.ids)
        self._images = [] if self._prefix.snapshot is None else views(self._prefix.pictures)


def _image_places(ids: Sequence[int], vision: VisionConfig | None) -> list[int]:
    """The position of the first token of each image in ``ids``. A marker is between two images."""
    if vision is None:
        return []
    image = [False, *(token == vision.image_token_id for token in ids)]
    return [place for place, (before, here) in enumerate(pairwise(image)) if here and not before]


def _recorded(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    for token in tokens:
        record.append(token)
        yield token
