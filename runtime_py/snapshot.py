"""Snapshots: the state of a session in a file, so that a long prefix is prefilled once. Works without torch.

The file is safetensors. Its tensors are ``ids`` (int64 [N]), ``logits`` (float32 [V], those after the last id),
``image.0`` and so on (uint8 [S, S, 3], what the vision model saw), and under ``cache.`` what ``Resumable.live`` gives
at position N, in the dtypes of the session's own buffers. Its metadata has one key, with a ``Header`` as JSON.

A file may come from anywhere: all that it says is checked against the bundle and the session before it is used.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from export.manifest import TOKENIZER, Manifest
from gemma3 import typed_json
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, DoesNotFit
from gemma3.host.atomic import staged_file
from gemma3.host.files import check_plain, parse_json, reason
from gemma3.images import Pixels
from runtime_py.backends import BACKENDS, backend_of
from runtime_py.sessions.protocol import Resumable, Session

VERSION = 1
METADATA = "gemma-edge"
IDS, LOGITS, IMAGE, CACHE = "ids", "logits", "image.", "cache."
AGAIN = "make it again: gemma-edge prefill BUNDLE -o FILE"
# What safetensors calls the dtypes that a session's buffers and an image may have.
DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "I8": "int8", "U8": "uint8", "I64": "int64"}


@dataclass(frozen=True)
class Origin:
    """What the caches of a session depend on: a graph, the layout of its caches, and what runs it.

    ``files`` has the sha256 of the graph's files and of the tokenizer, as the manifest gives them. ``versions`` are of
    the packages installed.
    """

    format: str
    files: dict[str, str]
    cache: CacheLayout
    versions: dict[str, str]


def origin_of(manifest: Manifest, format: str) -> Origin:
    """The origin of a session over the graph of ``format``, which the bundle must have."""
    artifact = manifest.artifacts[format]
    return Origin(
        format,
        {name: manifest.files[name].sha256 for name in (*artifact.files, TOKENIZER)},
        artifact.cache,
        {package: version(package) for package in backend_of(format).target.packages},
    )


@dataclass(frozen=True)
class Header:
    """What a snapshot is of. ``system`` and ``crops`` are those of a chat's prefix (``runtime_py.prefix``).

    ``sha256`` is of this header with an empty ``sha256``, and of every tensor's name, dtype, shape and bytes, in the
    order of names.
    """

    snapshot: int
    origin: Origin
    system: str | None
    crops: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was opened: its header, the ids that were fed, and the images among them."""

    path: Path
    header: Header
    ids: tuple[int, ...]
    images: tuple[Pixels, ...]

    def restore(self, session: Session) -> None:
        """Put ``session`` where the one that made the snapshot was. Its next logits will be the same to the bit.

        Raises BadInput when the file does not have the tensors of ``session``, and when it is damaged. Then the session
        is as it was.
        """
        if not isinstance(session, Resumable):
            raise BadInput(f"{self.path}: sessions of a .{self.header.origin.format} cannot be restored")
        caches = session.live(len(self.ids))
        with _opened(self.path) as file:
            expected: dict[str, NDArray[Any]]
            expected = {IDS: np.empty(len(self.ids), np.int64), LOGITS: np.empty(session.vocab_size, np.float32)}
            expected |= {f"{IMAGE}{index}": image for index, image in enumerate(self.images)}
            expected |= {CACHE + name: live for name, live in caches.items()}
            for name, like in expected.items():
                _check_tensor(self.path, file, name, str(like.dtype), like.shape)
            if extra := set(file.keys()) - expected.keys():
                raise BadInput(f"{self.path}: holds {_short(min(extra))}, which no session of this bundle has; {AGAIN}")
            found = _digest(self.header, ((name, _tensor(self.path, file, name)) for name in sorted(expected)))
            if found != self.header.sha256:
                raise BadInput(
                    f"{self.path}: its content has sha256 {_short(found)}, its header says "
                    f"{_short(self.header.sha256)}; the file is damaged; {AGAIN}"
                )
            for name, live in caches.items():
                live[...] = _tensor(self.path, file, CACHE + name)
            session.resume(self.ids, _tensor(self.path, file, LOGITS))


def write_snapshot(
    out: Path,
    session: Session,
    origin: Origin,
    ids: Sequence[int],
    images: Sequence[Pixels] = (),
    *,
    system: str | None = None,
    crops: Sequence[int] = (),
) -> None:
    """Write what ``session`` holds to the new file ``out``, which appears whole.

    ``ids`` and ``images`` are all that it was fed since its last reset. ``system`` and ``crops`` go into the header.
    Raises BadInput when ``out`` cannot be created or the session cannot give its caches, and DoesNotFit when the disk
    is full.
    """
    assert session.position == len(ids)
    if not isinstance(session, Resumable):
        raise BadInput(f"sessions of a .{origin.format} cannot give their caches")
    tensors: dict[str, NDArray[Any]] = {IDS: np.array(ids, np.int64), LOGITS: session.logits}
    tensors |= {f"{IMAGE}{index}": image for index, image in enumerate(images)}
    tensors |= {CACHE + name: live for name, live in session.live(len(ids)).items()}
    tensors = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    header = Header(VERSION, origin, system, tuple(crops), "")
    header = replace(header, sha256=_digest(header, tensors.items()))
    with staged_file(out) as path:
        try:
            save_file(tensors, path, {METADATA: typed_json.encode(header, indent=None)})
        except SafetensorError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise DoesNotFit(f"{out}: {size / 1e6:.1f} MB could not be written ({error}); make room") from None


def format_of(path: Path) -> str:
    """The format of the session that made a snapshot. Raises BadInput as ``open_snapshot`` does."""
    with _opened(path) as file:
        format = _header(path, file).origin.format
    if format not in BACKENDS:
        raise BadInput(f"{path}: made with a .{_short(format)}, which this program does not know; {AGAIN}")
    return format


def open_snapshot(path: Path, origin: Origin, config: ModelConfig) -> Snapshot:
    """Open a snapshot of a session whose origin is ``origin``. Reads its ids and images, and none of the caches.

    Raises BadInput for a file that is no snapshot of this version, was made with something else than ``origin``, or
    holds ids or images that the model does not take, or more of them than the context.
    """
    with _opened(path) as file:
        header = _header(path, file)
        _check_origin(path, header.origin, origin)
        ids = _read_ids(path, file, origin.cache.context)
        if not all(0 <= token < config.vocab_size for token in ids):
            raise BadInput(f"{path}: holds ids outside the vocabulary of {config.vocab_size}; {AGAIN}")
        vision, count = config.vision, sum(1 + crops for crops in header.crops)
        size, tokens_per_image = (0, 0) if vision is None else (vision.image_size, vision.tokens_per_image)
        tokens = 0 if vision is None else ids.count(vision.image_token_id)
        if min(header.crops, default=0) < 0 or tokens != count * tokens_per_image or (count and vision is None):
            raise BadInput(f"{path}: has {tokens} image tokens for {_short(count)} images; {AGAIN}")
        names = [f"{IMAGE}{index}" for index in range(count)]
        for name in names:
            _check_tensor(path, file, name, "uint8", (size, size, 3))
        return Snapshot(path, header, ids, tuple(_tensor(path, file, name) for name in names))


def _read_ids(path: Path, file: Any, context: int) -> tuple[int, ...]:
    dtype, shape = _declared(path, file, IDS)
    if dtype != "int64" or len(shape) != 1 or not 0 < shape[0] <= context:
        raise BadInput(
            f"{path}: {IDS} is {dtype} {list(shape)}, expected int64 [N] with N from 1 to {context}; {AGAIN}"
        )
    return tuple(int(token) for token in _tensor(path, file, IDS))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped. Raises BadInput when it is not safetensors; that library checks every offset in its table."""
    check_plain(path, "give a file that gemma-edge prefill wrote")
    try:
        file = safe_open(str(path), framework="numpy")
    except OSError as error:
        raise BadInput(f"{path}: {reason(error)}") from None
    except SafetensorError as error:
        raise BadInput(f"{path}: cut short, damaged or no snapshot ({_printable(error)}); {AGAIN}") from None
    with file as opened:
        yield opened


def _header(path: Path, file: Any) -> Header:
    text = (file.metadata() or {}).get(METADATA)
    if text is None:
        raise BadInput(f"{path}: is safetensors, but no snapshot: it has no metadata {METADATA}; {AGAIN}")
    try:
        data = parse_json(text)
        found = data.get("snapshot") if isinstance(data, dict) else None
        if found != VERSION:
            raise BadInput(f"is a snapshot of version {ascii(found)[:40]}, this program reads {VERSION}")
        return typed_json.decode(Header, data, "header")
    except BadInput as error:
        raise BadInput(f"{path}: {_printable(error)}; {AGAIN}") from None


def _check_origin(path: Path, found: Origin, wanted: Origin) -> None:
    """Raises BadInput for the first thing in which ``found`` differs from ``wanted``."""
    if found.format != wanted.format:
        raise BadInput(
            f"{path}: made with a .{_short(found.format)}, this session is of the .{wanted.format}; "
            "choose its --format, or leave that out"
        )
    for kind, ours, theirs in (
        ("sha256 of", wanted.files, found.files),
        ("version of", wanted.versions, found.versions),
    ):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                place = "this bundle" if kind == "sha256 of" else "this machine"
                raise BadInput(
                    f"{path}: {kind} {_short(name)} is {_short(theirs.get(name))}, that of {place} is "
                    f"{_short(ours.get(name))}; {AGAIN}"
                )
    if found.cache != wanted.cache:
        layouts = zip(vars(wanted.cache).items(), vars(found.cache).values(), strict=True)
        key, ours, theirs = next((key, ours, theirs) for (key, ours), theirs in layouts if ours != theirs)
        raise BadInput(f"{path}: its caches have {key} {_short(theirs)}, those of this bundle {_short(ours)}; {AGAIN}")


def _printable(value: object) -> str:
    """``value`` as text that is safe in a terminal, for what comes from a file."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _short(value: object) -> str:
    text = _printable(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _declared(path: Path, file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and the shape of a tensor in the file. Raises BadInput when there is no such tensor."""
    try:
        tensor = file.get_slice(name)
    except SafetensorError:
        raise BadInput(f"{path}: holds no {name}; {AGAIN}") from None
    return DTYPES.get(tensor.get_dtype(), tensor.get_dtype()), tuple(tensor.get_shape())


def _check_tensor(path: Path, file: Any, name: str, dtype: str, shape: Sequence[int]) -> None:
    found = _declared(path, file, name)
    if found != (dtype, tuple(shape)):
        raise BadInput(
            f"{path}: {name} is {found[0]} {_short(list(found[1]))}, expected {dtype} {list(shape)}; {AGAIN}"
        )


def _tensor(path: Path, file: Any, name: str) -> NDArray[Any]:
    """A copy of one tensor, whose dtype and shape must have been checked."""
    try:
        tensor: NDArray[Any] = file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: {name} cannot be read ({_printable(error)}); {AGAIN}") from None
    return tensor


def _digest(header: Header, tensors: Iterable[tuple[str, NDArray[Any]]]) -> str:
    digest = hashlib.sha256(typed_json.encode(replace(header, sha256="")).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()
