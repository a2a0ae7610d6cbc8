"""The beginning that chats have in common: a system text, and pictures that open the user's first turn.

``save_prefix`` prefills it once and writes the session's state to a file. A chat that begins from the file is fed only
what follows.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma3.chat import ChatFormat, Image, Message
from gemma3.config import ModelConfig, VisionConfig
from gemma3.errors import BadInput, counted
from gemma3.tokenizer import Tokenizer
from runtime_py.pictures import Picture, content_of, placed, views
from runtime_py.sessions.protocol import Resumable, Session, check_ids
from runtime_py.snapshot import Origin, Snapshot, open_snapshot, write_snapshot

# The prefix ends where conversations with these first words begin to differ. A tokenizer may join the words with what
# is before them, so they begin in different ways; with a picture in front, they begin with two newlines.
FIRST_WORDS = ("a", "The", "7", "'", "é")


@dataclass(frozen=True)
class Prefix:
    """A system text (None: there is none), and the pictures at the beginning of the user's first turn.

    ``snapshot`` is the state of a session that was fed this prefix, if there is one.
    """

    system: str | None = None
    pictures: tuple[Picture, ...] = ()
    snapshot: Snapshot | None = None

    def first_turn(self, text: str, pictures: Sequence[Picture], vision: VisionConfig | None) -> list[Message]:
        """The conversation up to the user's first turn, which has ``pictures`` of its own where ``placed`` puts them.

        Raises BadInput as ``placed`` does.
        """
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        content = content_of(text, pictures, vision)
        if self.pictures:
            opening = [Image(crops=len(picture.pixels) - 1) for picture in self.pictures]
            content = [*opening, *placed(text, pictures, vision)]
        return [*system, {"role": "user", "content": content}]

    def held(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` the snapshot holds: all of its own, if ``ids`` begin with them and go on; else 0."""
        own = () if self.snapshot is None else self.snapshot.ids
        return len(own) if len(ids) > len(own) and tuple(ids[: len(own)]) == own else 0

    def restore(self, session: Session) -> None:
        """Put ``session`` at the end of the prefix if there is a snapshot, and at position 0 if not."""
        session.reset()
        if self.snapshot is not None:
            self.snapshot.restore(session)


NO_PREFIX = Prefix()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    differing = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))


def prefix_ids(prefix: Prefix, tokenizer: Tokenizer, chat: ChatFormat, vision: VisionConfig | None) -> list[int]:
    """The ids with which every chat begins that has this prefix.

    Raises BadInput when the chat format has no place for the system text, or puts the pictures after the user's words.
    """
    size = None if vision is None else vision.tokens_per_image

    def encode(words: str, pictures: Sequence[Picture] = ()) -> list[int]:
        return chat.encode(tokenizer, prefix.first_turn(words, pictures, vision), tokens_per_image=size)

    encoded = [encode(words) for words in FIRST_WORDS]
    if vision is not None:
        with suppress(BadInput):  # a template that has no place for pictures
            encoded.append(encode(FIRST_WORDS[0], [Picture((np.empty((0, 0, 3), np.uint8),))]))
    ids = encoded[0][: min(common(encoded[0], other) for other in encoded[1:])]
    if vision is not None and ids.count(vision.image_token_id) != len(views(prefix.pictures)) * vision.tokens_per_image:
        raise BadInput("the chat template puts pictures after the user's words, so they cannot be in a prefix")
    if not ids:
        raise BadInput("the chat template begins with the user's words, so there is no prefix to prefill")
    return ids


def save_prefix(
    out: Path, prefix: Prefix, session: Session, origin: Origin, tokenizer: Tokenizer, chat: ChatFormat
) -> list[int]:
    """Feed ``prefix`` to ``session`` from position 0, and write its state to the new file ``out``. Returns the ids fed.

    Raises as ``prefix_ids``, ``Session.prefill`` and ``write_snapshot`` do.
    """
    ids, images = prefix_ids(prefix, tokenizer, chat, session.vision), views(prefix.pictures)
    session.reset()
    check_ids(ids, vocab_size=session.vocab_size, position=0, context=session.context, images=len(images))
    if isinstance(session, Resumable):
        for live in session.live(0).values():  # the keys of an earlier chat must not get into the file
            live[...] = 0
    session.prefill(ids, images)
    crops = [len(picture.pixels) - 1 for picture in prefix.pictures]
    write_snapshot(out, session, origin, ids, images, system=prefix.system, crops=crops)
    return ids


def open_prefix(path: Path, origin: Origin, config: ModelConfig, tokenizer: Tokenizer, chat: ChatFormat) -> Prefix:
    """The prefix in a file, for sessions of ``origin``.

    Raises BadInput as ``open_snapshot`` does, and when the file's ids are not those of its own text and pictures.
    """
    snapshot = open_snapshot(path, origin, config)
    remaining = iter(snapshot.images)
    pictures = [Picture(tuple(next(remaining) for _ in range(1 + crops))) for crops in snapshot.header.crops]
    prefix = Prefix(snapshot.header.system, tuple(pictures), snapshot)
    ids = tuple(prefix_ids(prefix, tokenizer, chat, config.vision))
    if ids != snapshot.ids:
        same = common(ids, snapshot.ids)
        raise BadInput(
            f"{path}: holds {counted(len(snapshot.ids), 'id')}, which differ at index {same} from the {len(ids)} of "
            "its text and pictures; make it again: gemma-edge prefill BUNDLE -o FILE"
        )
    return prefix
