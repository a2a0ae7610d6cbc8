"""One protocol over every way to run a model: eager PyTorch, .pte, .onnx, and backends to come.

A session holds the KV cache of one sequence. Token ids are fed at ``position``; ``logits`` are those after the last id.
An image is given as ``Pixels`` of the model's own size, or as soft tokens that the same session has encoded. Its T soft
tokens replace T image tokens in the ids.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemma3.config import VisionConfig
from gemma3.errors import BadInput, DoesNotFit, counted
from gemma3.images import Pixels

Logits = NDArray[np.float32]
SoftTokens = NDArray[np.float32]  # [T, E]
Image = Pixels | SoftTokens

# For a vocabulary of 262 144, the logits of one position take a megabyte.
ROWS_AT_ONCE = 32


class Session(Protocol):
    """A model with the KV cache of one sequence.

    ``prefill`` and ``step`` check their whole input before they feed any of it, and raise what ``calls`` raises.
    """

    @property
    def context(self) -> int:
        """The number of positions that the cache can hold."""

    @property
    def chunk(self) -> int:
        """The most ids in one call: ``prefill`` splits text into chunks. An image never has more ids than this."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def vision(self) -> VisionConfig | None:
        """The configuration of the vision model; None for a text-only model."""

    @property
    def position(self) -> int:
        """The number of ids fed since the last reset."""

    @property
    def logits(self) -> Logits:
        """The logits after the last id fed, float32 [V]; empty before anything is fed."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        """Feed one or more ids, with ``images`` for their image tokens. Returns the logits after the last id."""

    def step(self, token: int) -> Logits:
        """Feed one id. Returns the logits after it."""

    def reset(self) -> None:
        """Go back to position 0. The next sequence gets the logits that a new session would give."""

    def encode_image(self, image: Pixels) -> SoftTokens:
        """The soft tokens of ``image``, float32 [T, E]. Only for multimodal models."""


@dataclass(frozen=True)
class Call:
    """The input of one call of a graph: at most a chunk of text, or the T image tokens of ``image``."""

    ids: Sequence[int]
    image: Image | None = None


def calls(
    session: Session, ids: Sequence[int], images: Sequence[Image] = (), text_chunk: int | None = None
) -> list[Call]:
    """The calls that feed ``ids``, in order: text in chunks of ``text_chunk`` (None: the session's), each image whole.

    Raises BadInput when there are images for a text-only model, when the number of images is not that of the runs of
    image tokens, when such a run is not as long as an image, and when an image does not have the model's size. Raises
    what ``check_ids`` raises too.
    """
    text_chunk = text_chunk or session.chunk
    vision = session.vision
    if vision is None:
        if images:
            raise BadInput(
                f"{counted(len(images), 'image')} for a text-only model; leave images out, or export a multimodal "
                "checkpoint"
            )
        _check(session, ids, images)
        return [Call(chunk) for chunk in chunks(ids, text_chunk)]
    runs = [(is_image, list(run)) for is_image, run in groupby(ids, lambda token: token == vision.image_token_id)]
    places = [run for is_image, run in runs if is_image]
    if len(places) != len(images):
        raise BadInput(
            f"the prompt has image tokens for {counted(len(places), 'image')}, but {len(images)} given; "
            "give one image for each run of image tokens"
        )
    for place in places:
        if len(place) != vision.tokens_per_image:
            raise BadInput(
                f"{len(place)} image tokens in a row, but an image has {vision.tokens_per_image}; "
                "encode the prompt with the bundle's own tokenizer"
            )
    for image in images:
        check_image(image, vision)
    _check(session, ids, images)
    split: list[Call] = []
    remaining = iter(images)
    for is_image, run in runs:
        split += [Call(run, next(remaining))] if is_image else [Call(chunk) for chunk in chunks(run, text_chunk)]
    return split


def soft_tokens_of(session: Session, image: Image) -> SoftTokens:
    """The soft tokens [T, E] of an image. Pixels are encoded, soft tokens are returned as they are."""
    return session.encode_image(image) if is_pixels(image) else cast(SoftTokens, image)


def is_pixels(image: Image) -> TypeGuard[Pixels]:
    return image.ndim == 3


def check_image(image: Image, vision: VisionConfig) -> None:
    """Raises BadInput when ``image`` is neither uint8 [S, S, 3] of the vision model's size nor T soft tokens."""
    if image.dtype == np.float32 and image.ndim == 2 and len(image) == vision.tokens_per_image:
        return
    shape = (vision.image_size, vision.image_size, 3)
    if image.dtype != np.uint8 or image.shape != shape:
        raise BadInput(
            f"an image is {image.dtype} {list(image.shape)}, expected uint8 {list(shape)}; "
            "prepare it with gemma3.images.prepare"
        )


def _check(session: Session, ids: Sequence[int], images: Sequence[Image]) -> None:
    check_ids(
        ids, vocab_size=session.vocab_size, position=session.position, context=session.context, images=len(images)
    )


def check_ids(ids: Sequence[int], *, vocab_size: int, position: int, context: int, images: int = 0) -> None:
    """Refuse ids that must not reach a graph. ``images`` is the number of images among them, for the message.

    Raises BadInput when there are no ids and for an id outside the vocabulary, and DoesNotFit when
    ``position + len(ids)`` is over the context.
    """
    if len(ids) == 0:
        raise BadInput("the prompt is empty; give at least one token")
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise BadInput(
                f"token id {token} at index {index} is outside the vocabulary of {vocab_size}; "
                "encode the text with the bundle's own tokenizer"
            )
    if position + len(ids) > context:
        among = f" ({counted(images, 'image')} among them)" if images else ""
        raise DoesNotFit(
            f"{len(ids)} tokens{among} after position {position} are over the context of {context}; "
            "shorten the prompt, reset the conversation or export with a larger --context"
        )


def chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``ids``, in order, in chunks of ``size``. The last chunk may be shorter."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


@runtime_checkable
class Resumable(Protocol):
    """A session whose caches can be copied out, and put back later or into another session of the same graph."""

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        """The parts of the caches that decide what follows ``position``, by name.

        They are writable views of the session's own memory: the first ``position`` rows of full-attention layers, and
        the whole buffers of sliding-window layers, whose inner order is the graph's own business. Their dtypes and
        shapes follow from the graph and from ``position`` alone.
        """

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        """Go on after ``ids``, once the live parts at position ``len(ids)`` are written. ``logits`` [V] follow them."""


@runtime_checkable
class EveryLogit(Protocol):
    """A session that can give the logits after every id of a call. Exported graphs give those of a few last ids."""

    def call(self, call: Call, wanted: Collection[int] | None = None) -> list[tuple[int, Logits]]:
        """Feed ``call``. Returns (position, logits [V]) after each id of text, or after an image.

        Only the logits at the positions ``wanted`` are computed (None: all).
        """


@runtime_checkable
class Rewindable(Resumable, Session, Protocol):
    """A session that gives the logits of several positions in one call, and that can go back some positions."""

    @property
    def most_logits(self) -> int:
        """The most ids that ``verify`` takes: 1 for a file that gives the logits of the last position only."""

    def verify(self, ids: Sequence[int]) -> Logits:
        """Feed 1 to ``most_logits`` ids of text in one call. Returns the logits after each of them, [len(ids), V].

        A call of other ids may overwrite them. Raises what ``calls`` raises, before any id is fed.
        """

    def can_rewind(self, written: int, position: int) -> bool:
        """Can the session go back to ``position`` once it holds ``written`` positions?"""

    def rewind(self, position: int) -> None:
        """Go back to ``position``, which must not be inside an image. ``logits`` are empty until the next call.

        The next call gives the logits that it would give if the later ids had not been fed. ``can_rewind`` must allow
        it.
        """


def every_position(
    session: Session, ids: Sequence[int], images: Sequence[Image] = (), wanted: Collection[int] | None = None
) -> Iterator[tuple[int, Logits]]:
    """Feed ``ids`` after what ``session`` holds. Yields (position, logits [V]) after each id of text and each image.

    With ``wanted`` only at these positions, which can save time. The logits of at most ROWS_AT_ONCE positions are in
    memory at a time. Raises what ``calls`` raises.
    """
    if isinstance(session, EveryLogit):
        for call in calls(session, ids, images, text_chunk=min(session.chunk, ROWS_AT_ONCE)):
            yield from session.call(call, wanted)
    else:
        for call in calls(session, ids, images, text_chunk=1):
            logits = session.prefill(call.ids, () if call.image is None else (call.image,))
            if wanted is None or session.position - 1 in wanted:
                yield session.position - 1, logits
