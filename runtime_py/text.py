"""Text generation with a bundle. With an .onnx it works without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.manifest import TOKENIZER, chat_format, read_manifest
from gemma3.chat import ChatFormat, encode_prompt
from gemma3.errors import BadInput
from gemma3.host.atomic import refuse_target
from gemma3.tokenizer import Tokenizer
from runtime_py.backends import formats_of, open_session
from runtime_py.conversation import stream_text
from runtime_py.generate import Generation, Sampler, StopReason
from runtime_py.generate import generate as generate_ids
from runtime_py.pictures import placed, read_pictures, views
from runtime_py.prefix import NO_PREFIX, Prefix, open_prefix, save_prefix
from runtime_py.sessions.protocol import Session
from runtime_py.snapshot import Origin, format_of, origin_of
from runtime_py.speculation import open_speculative


@dataclass(frozen=True)
class OpenBundle:
    """A session over one graph of a bundle, its tokenizer, its chat format, and the ids that end a generation.

    ``origin`` is the session's, for snapshots. Chats begin with ``prefix``.
    """

    session: Session
    tokenizer: Tokenizer
    chat: ChatFormat
    eos_ids: tuple[int, ...]
    origin: Origin
    prefix: Prefix = NO_PREFIX


def open_bundle(
    bundle: Path,
    format: str | None = None,
    threads: int | None = None,
    *,
    prefix: Path | None = None,
    lookup: bool = False,
    draft: Path | None = None,
) -> OpenBundle:
    """Open one graph of ``bundle``, and its tokenizer. Chats begin with ``prefix``, a file that ``prefill`` wrote.

    ``format`` None is that of ``prefix``, or the bundle's first. With ``lookup`` the session guesses ahead by what
    repeats in the text, with ``draft`` by the smaller model of that bundle (see ``runtime_py.sessions.speculative``).
    Raises as ``runtime_py.backends.open_session``, ``runtime_py.prefix.open_prefix`` and ``open_speculative`` do, and
    BadInput for both ways to guess at once.
    """
    if lookup and draft is not None:
        raise BadInput(f"--lookup and --draft {draft} are two ways to guess; choose one of them")
    manifest = read_manifest(bundle)
    format, *_ = formats_of(bundle, manifest, format or (format_of(prefix) if prefix else None))
    origin, tokenizer, chat = origin_of(manifest, format), Tokenizer(bundle / TOKENIZER), chat_format(manifest)
    # Before the session, which takes time to open.
    opening = open_prefix(prefix, origin, manifest.model, tokenizer, chat) if prefix else NO_PREFIX
    session: Session
    if lookup or draft is not None:
        session = open_speculative(bundle, format, draft, threads)
    else:
        session = open_session(bundle, format, threads)
    return OpenBundle(session, tokenizer, chat, manifest.tokenizer.eos_ids, origin, opening)


def prefill(
    bundle: OpenBundle,
    out: str | Path,
    *,
    system: str | None = None,
    images: Sequence[Path] = (),
    pan_and_scan: bool = False,
) -> int:
    """Feed the beginning of a chat, and write the session's state to the new file ``out``. Returns the number of ids.

    The beginning is the text ``system`` and the pictures ``images``, which come first in the user's first turn. Raises
    BadInput when there is neither or ``out`` cannot be created, DoesNotFit when it does not fit the context, and as
    ``runtime_py.prefix.save_prefix`` does.
    """
    out = Path(out)
    refuse_target(out)
    if not system and not images:
        raise BadInput("there is nothing to prefill; give a system text or an image")
    pictures = read_pictures(images, bundle.session.vision, pan_and_scan)
    prefix = Prefix(system or None, tuple(pictures))
    return len(save_prefix(out, prefix, bundle.session, bundle.origin, bundle.tokenizer, bundle.chat))


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
    None is greedy. A bundle that was opened with a prefix answers only chats: each begins with the prefix. Raises
    BadInput for an empty prompt, for images that cannot be used, for a prefix without ``chat``, and for a
    ``max_new_tokens`` below 1, and DoesNotFit when the prompt does not fit the context.
    """
    if not prompt:
        raise BadInput("the prompt is empty; give at least one character")
    session, tokenizer, prefix, vision = bundle.session, bundle.tokenizer, bundle.prefix, bundle.session.vision
    pictures = read_pictures(images, vision, pan_and_scan)
    size = None if vision is None else vision.tokens_per_image
    shown = views(pictures)
    if chat:
        messages = prefix.first_turn(prompt, pictures, vision)
        ids, shown = bundle.chat.encode(tokenizer, messages, tokens_per_image=size), [*views(prefix.pictures), *shown]
        if held := prefix.held(ids):
            prefix.restore(session)
            ids, shown = ids[held:], views(pictures)
        elif prefix is not NO_PREFIX:
            session.reset()
    elif prefix is not NO_PREFIX:
        raise BadInput("a prefix is the beginning of a chat; pass chat as well (--chat)")
    else:
        ids = encode_prompt(tokenizer, placed(prompt, pictures, vision), size)
    generation = generate_ids(
        session,
        ids,
        sampler or Sampler(),
        images=shown,
        stop_ids=bundle.eos_ids,
        max_new_tokens=max_new_tokens,
    )
    return TextStream(generation, tokenizer)
