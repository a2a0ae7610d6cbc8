"""One protocol over every way to run a model: eager PyTorch, .pte and .onnx.

A session holds the cache of one sequence. Ids are fed at ``position``; the logits are those of the last id fed.
An image is uint8 [S, S, 3], RGB, of the model's own size S, or already encoded: float32 [T, E]. Its T soft tokens go
where the ids hold T image tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from export.manifest import Format, read_manifest
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig, VisionConfig
from gemma3.errors import BadInput, DoesNotFit

Logits = NDArray[np.float32]
SoftTokens = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Image = Pixels | SoftTokens  # of the same session


class Session(Protocol):
    """Everything is checked before any of it is fed (see ``pieces`` for what is raised)."""

    @property
    def context(self) -> int:
        """Positions the cache can hold."""

    @property
    def chunk(self) -> int:
        """Largest number of ids in one call of the graph; ``prefill`` splits text at it. No image is larger."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def vision(self) -> VisionConfig | None:
        """None: a text-only model."""

    @property
    def position(self) -> int:
        """Ids fed since the last reset."""

    @property
    def logits(self) -> Logits:
        """float32 [V] of the last id fed; defined once something was fed."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        """Feed one or more ids, and ``images`` where these hold image tokens; the logits of the last."""

    def step(self, token: int) -> Logits:
        """Feed one id."""

    def reset(self) -> None:
        """Back to position 0: the next sequence gets the logits a new session would give."""

    def encode_image(self, image: Pixels) -> SoftTokens:
        """float32 [T, E]: what the text model is fed for ``image``. For models that see."""


@dataclass(frozen=True)
class Piece:
    """What goes into a graph at once: at most a chunk of text, or the T image tokens of ``image``."""

    ids: Sequence[int]
    image: Image | None = None


def pieces(
    session: Session, ids: Sequence[int], images: Sequence[Image] = (), text_chunk: int | None = None
) -> list[Piece]:
    """What ``session`` is fed, in order: text in pieces of ``text_chunk`` (None: its chunk), each image whole.

    Raises BadInput for images that are not as many as the runs of image tokens, not of the model's size or for a
    text-only model, and for a run of another length than an image's; and what ``check_ids`` raises.
    """
    text_chunk = text_chunk or session.chunk
    vision = session.vision
    if vision is None:
        if images:
            raise BadInput(
                f"{len(images)} images for a text-only model; leave them out, or export a checkpoint that sees"
            )
        _check(session, ids, images)
        return [Piece(piece) for piece in chunks(ids, text_chunk)]
    runs = [(is_image, list(run)) for is_image, run in groupby(ids, lambda token: token == vision.image_token_id)]
    places = [run for is_image, run in runs if is_image]
    if len(places) != len(images):
        raise BadInput(f"the prompt has places for {len(places)} images, {len(images)} are given; make them as many")
    for place in places:
        if len(place) != vision.tokens_per_image:
            raise BadInput(
                f"{len(place)} image tokens in a row, an image has {vision.tokens_per_image}; "
                "encode the prompt with the bundle's own tokenizer"
            )
    for image in images:
        check_image(image, vision)
    _check(session, ids, images)
    split: list[Piece] = []
    shown = iter(images)
    for is_image, run in runs:
        split += [Piece(run, next(shown))] if is_image else [Piece(piece) for piece in chunks(run, text_chunk)]
    return split


def soft_tokens_of(session: Session, image: Image) -> SoftTokens:
    """float32 [T, E] of an image in either form."""
    return session.encode_image(image) if is_pixels(image) else cast(SoftTokens, image)


def is_pixels(image: Image) -> TypeGuard[Pixels]:
    return image.ndim == 3


def check_image(image: Image, vision: VisionConfig) -> None:
    """Raises BadInput when ``image`` is neither uint8 [S, S, 3] of the encoder's size nor T soft tokens."""
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
    """Refuse what must not reach a graph.

    Raises BadInput for no ids or an id outside the vocabulary, DoesNotFit when ``position + len(ids)`` is over
    the context.
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
        among = f" ({images} images among them)" if images else ""
        raise DoesNotFit(
            f"{len(ids)} tokens{among} after position {position} are over the context of {context}; "
            "shorten the prompt, reset the conversation or export with a larger --context"
        )


def chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``ids`` in order, in pieces of ``size``; the last may be shorter."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def open_session(bundle: Path, format: Format, threads: int | None = None) -> Session:
    """A session over one graph of ``bundle``. Each runtime is imported only when it is asked for.

    Raises BadInput when the bundle has no such graph, and what ``read_manifest`` raises.
    """
    manifest = read_manifest(bundle)
    artifact = manifest.artifacts.get(format)
    if artifact is None:
        held = ", ".join(manifest.artifacts)
        raise BadInput(f"{bundle}: holds no .{format}, only {held}; pass --format {held.split(', ')[0]}")
    return import_runtime(format)(bundle / artifact.file, artifact.cache, manifest.model, threads)


def import_runtime(format: Format) -> Callable[[Path, CacheLayout, ModelConfig, int | None], Session]:
    """The session class of ``format``, called with the file, its layout, the model and the threads."""
    if format == "onnx":
        from runtime_py.onnx_session import OnnxSession

        return OnnxSession
    from runtime_py.pte_session import PteSession

    return PteSession
