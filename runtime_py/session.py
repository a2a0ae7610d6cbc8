"""One protocol over every way to run a model: eager PyTorch, .pte and .onnx.

A session holds the cache of one sequence. Ids are fed at ``position``; the logits are those of the last id fed.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.manifest import Format, read_manifest
from gemma3.cache import CacheLayout
from gemma3.errors import BadInput, DoesNotFit

Logits = NDArray[np.float32]


class Session(Protocol):
    """All ids are checked before any is fed (see ``check_ids`` for what is raised)."""

    @property
    def context(self) -> int:
        """Positions the cache can hold."""

    @property
    def chunk(self) -> int:
        """Largest number of ids in one call of the graph; ``prefill`` splits at it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def position(self) -> int:
        """Ids fed since the last reset."""

    @property
    def logits(self) -> Logits:
        """float32 [V] of the last id fed; defined once something was fed."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Feed one or more ids; the logits of the last."""

    def step(self, token: int) -> Logits:
        """Feed one id."""

    def reset(self) -> None:
        """Back to position 0: the next sequence gets the logits a new session would give."""


def check_ids(ids: Sequence[int], *, vocab_size: int, position: int, context: int) -> None:
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
        raise DoesNotFit(
            f"{len(ids)} tokens after position {position} are over the context of {context}; "
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
    return import_runtime(format)(bundle / artifact.file, artifact.cache, manifest.model.vocab_size, threads)


def import_runtime(format: Format) -> Callable[[Path, CacheLayout, int, int | None], Session]:
    """The session class of ``format``, called with the file, its layout, the vocabulary size and the threads."""
    if format == "onnx":
        from runtime_py.onnx_session import OnnxSession

        return OnnxSession
    from runtime_py.pte_session import PteSession

    return PteSession
