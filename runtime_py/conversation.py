"""A chat whose earlier turns stay in the session's KV cache, so that only new tokens are fed."""

from collections.abc import Collection, Iterator, Sequence

from gemma3.chat import encode_chat
from gemma3.tokenizer import Tokenizer
from runtime_py.generate import Generation, Sampler, StopReason, generate
from runtime_py.pictures import Picture, all_pixels, placed
from runtime_py.sessions.protocol import Session


def stream_text(generation: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """The generated text as it arrives, never cut inside a character."""
    decoder = tokenizer.decoder()
    for token in generation:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.flush():
        yield rest


class Conversation:
    """Turns of a user and the model over one session, which nothing else may feed meanwhile.

    ``stop_ids`` end a turn of the model, and ``max_new_tokens`` bounds it (None: no bound). ``reason`` says why the
    last one ended.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        stop_ids: Collection[int],
        max_new_tokens: int | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._stop_ids = stop_ids
        self._limit = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._session.reset()
        self._unfed: list[int] = []
        self.reason: StopReason | None = None

    def turn_ids(self, text: str, pictures: Sequence[Picture] = ()) -> list[int]:
        """The ids to feed for the next user turn. After the first turn they begin with the end of the model's turn.

        The ids fed before and these ids are the encoded conversation. The model's own ids are kept, because encoding
        its text again could split it into other tokens. Raises BadInput as ``placed`` does.
        """
        vision = self._session.vision
        content = placed(text, pictures, vision)
        turn = encode_chat(
            self._tokenizer,
            [{"role": "user", "content": content}],
            tokens_per_image=None if vision is None else vision.tokens_per_image,
        )
        if self._session.position == 0:
            return turn
        words = [token for token in self._unfed if token not in self._stop_ids]
        newline = self._tokenizer.encode("\n", bos=False)
        return [*words, self._tokenizer.end_of_turn_id, *newline, *turn[1:]]

    def say(self, text: str, pictures: Sequence[Picture] = ()) -> Iterator[str]:
        """The model's answer to ``text``, piece by piece as it is generated. Afterwards ``reason`` says why it ended.

        ``placed`` decides where the pictures go. Raises BadInput as ``placed`` does, and DoesNotFit when the turn does
        not fit the context. After such an error the conversation is unchanged.
        """
        generation = generate(
            self._session,
            self.turn_ids(text, pictures),
            self._sampler,
            images=all_pixels(pictures),
            stop_ids=self._stop_ids,
            max_new_tokens=self._limit,
        )
        try:
            yield from stream_text(generation, self._tokenizer)
        finally:  # also when the caller stops iterating before the answer ends
            self._unfed = generation.unfed
            self.reason = generation.reason
