"""Text generation with a bundle. With an .onnx it works without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.manifest import TOKENIZER, chat_format, read_manifest
from gemma3.chat import ChatFormat, encode_prompt
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from runtime_py.backends import open_session
from runtime_py.conversation import stream_text
from runtime_py.generate import Generation, Sampler, StopReason
from runtime_py.generate import generate as generate_ids
from runtime_py.pictures import content_of, placed, read_pictures, views
from runtime_py.sessions.protocol import Session


@dataclass(frozen=True)
class OpenBundle:
    """A session over one graph of a bundle, its tokenizer, its chat format, and the ids that end a generation."""

    session: Session
    tokenizer: Tokenizer
    chat: ChatFormat
    eos_ids: tuple[int, ...]


def open_bundle(bundle: Path, format: str | None = None, threads: int | None = None) -> OpenBundle:
    """Open one graph of ``bundle``, and its tokenizer. Raises as ``runtime_py.backends.open_session`` does."""
    manifest = read_manifest(bundle)
    session = open_session(bundle, format, threads)
    return OpenBundle(session, Tokenizer(bundle / TOKENIZER), chat_format(manifest), manifest.tokenizer.eos_ids)


class TextStream:
    """Generated text, as a stream of pieces. Iterate over it once; afterwards ``reason`` says why it ended."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self._generation, self._tokenizer = generation, tokenizer

    def __iter__(self) -> Iterator[str]:
        return stream_text(self._generation, self._tokenizer)

    @property
    def reason(self) -> StopReason | None:
        return self._generation.reason


def generate(
    bundle: OpenBundle,
    prompt: str,
    *,
    chat: bool = False,
    images: Sequence[Path] = (),
    pan_and_scan: bool = False,
    sampler: Sampler | None = None,
    max_new_tokens: int | None = None,
) -> TextStream:
    """Continue ``prompt``, or with ``chat`` answer it as a user's turn.

    The images go at the markers ``<image>`` in the prompt, in order, or before the prompt if it has none. ``sampler``
    None is greedy. Raises BadInput for an empty prompt, for images that cannot be used, and for a ``max_new_tokens``
    below 1, and DoesNotFit when the prompt does not fit the context.
    """
    if not prompt:
        raise BadInput("the prompt is empty; give at least one character")
    session, tokenizer, vision = bundle.session, bundle.tokenizer, bundle.session.vision
    pictures = read_pictures(images, vision, pan_and_scan)
    size = None if vision is None else vision.tokens_per_image
    if chat:
        content = content_of(prompt, pictures, vision)
        ids = bundle.chat.encode(tokenizer, [{"role": "user", "content": content}], tokens_per_image=size)
    else:
        ids = encode_prompt(tokenizer, placed(prompt, pictures, vision), size)
    generation = generate_ids(
        session,
        ids,
        sampler or Sampler(),
        images=views(pictures),
        stop_ids=bundle.eos_ids,
        max_new_tokens=max_new_tokens,
    )
    return TextStream(generation, tokenizer)
