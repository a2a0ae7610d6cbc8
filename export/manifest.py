"""The bundle's manifest: frozen dataclasses that are JSON. Reads without torch.

Every key of the file is a field here; an unknown or missing key, or a value of another type, is refused.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, VerificationFailed

Format = Literal["pte", "onnx"]
FORMATS: tuple[Format, ...] = ("pte", "onnx")
Activations = Literal["float", "int8"]

SCHEMA_VERSION = 2  # 2: model.vision, and a graph's methods may be several
# What a graph's methods are called: one of a text-only model, three of one that sees. ExecuTorch's stock runners know
# those of a .pte by these names.
FORWARD = "forward"
VISION_ENCODER, TOKEN_EMBEDDING, TEXT_DECODER = "vision_encoder", "token_embedding", "text_decoder"
MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class FileEntry:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. A string in ``shape`` is a dynamic dimension's name."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Method:
    """A callable of a graph: ``forward`` (a text-only model), or one of the three that a model that sees is made of.

    ``vision_encoder`` turns pixels into soft tokens: in a .onnx a graph of its own beside the file, ``vision.onnx``.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Artifact:
    """One exported graph and how to run it."""

    file: str
    cache: CacheLayout
    methods: tuple[Method, ...]
    # What the eager model does to the inputs of quantized linears when it stands for this file.
    reference_activations: Activations
    versions: dict[str, str]  # the packages it was exported and checked with
    opsets: dict[str, int]  # ONNX operator sets by domain; empty for .pte
    bytes: int  # the graph and its external data
    ideal_bytes: int  # the weights at their bits plus two bytes a scale, each stored once
    peak_memory_estimate: int  # bytes: weights as stored, the cache, and what encoding an image takes
    # SFP8 weights that the file holds as 8-bit integers: how far those are from the SFP8 values, in dB.
    stand_ins: dict[str, float]
    report: dict[str, Any]  # what the exporter says about the file: delegates, undelegated operations, copies


@dataclass(frozen=True)
class TokenizerInfo:
    sha256: str
    bos_id: int
    eos_ids: tuple[int, ...]  # generation stops at any of these
    pad_id: int
    chat_template: str


@dataclass(frozen=True)
class Check:
    """One figure that validation measured. Without a limit it is information and always passes."""

    artifact: str
    name: str
    metric: str
    value: float
    limit: float | None
    passed: bool


@dataclass(frozen=True)
class Manifest:
    schema_version: int
    model: ModelConfig
    recipe: str
    rules: dict[str, str]  # the recipe's: pattern → scheme, the first match wins
    method: str  # how the weights came to their integers: "rtn", "gptq", "qat", …
    weights: dict[str, str]  # each weight's verdict: its scheme, or why it was left alone
    context: int
    chunk: int  # the most tokens a call takes: of a text, or the soft tokens of one image
    reference_dtype: str
    tokenizer: TokenizerInfo
    artifacts: dict[Format, Artifact]
    files: dict[str, FileEntry]  # every file of the bundle but the manifest
    validation: tuple[Check, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Raises BadInput for JSON that is not a manifest of this schema version."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"not JSON ({error}); export the bundle again") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BadInput(
                f"schema_version is {version!r}, this program reads {SCHEMA_VERSION}; export the bundle again"
            )
        manifest = _decode(Manifest, data, "manifest")
        assert isinstance(manifest, Manifest)
        return manifest


def _decode(kind: Any, data: Any, where: str) -> Any:
    """``data`` (parsed JSON) as the annotated type ``kind``. Raises BadInput naming the place."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _expect(isinstance(data, dict), data, "an object", where)
        for problem, keys in (("unknown", data.keys() - hints.keys()), ("missing", hints.keys() - data.keys())):
            if keys:
                raise BadInput(f"{problem} key {where}.{min(keys)}; export the bundle again")
        return kind(**{name: _decode(hint, data[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is tuple:
        _expect(isinstance(data, list), data, "a list", where)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), data, "an object", where)
        return {
            _decode(arguments[0], key, where): _decode(arguments[1], value, f"{where}.{key}")
            for key, value in data.items()
        }
    if origin is Literal:
        _expect(data in arguments, data, f"one of {arguments}", where)
        return data
    if origin is types.UnionType and types.NoneType in arguments:
        rest = [argument for argument in arguments if argument is not types.NoneType]
        assert len(rest) == 1
        return None if data is None else _decode(rest[0], data, where)
    allowed = arguments if origin is types.UnionType else (kind,)
    if float in allowed:  # JSON writes 1.0 and 1 as it likes
        allowed = (*allowed, int)
    # bool is a subclass of int in Python, not in JSON.
    _expect(isinstance(data, allowed) and (bool in allowed or not isinstance(data, bool)), data, str(kind), where)
    return data


def _expect(ok: bool, seen: Any, wanted: str, where: str) -> None:
    if not ok:
        raise BadInput(f"{where} is {str(seen)[:60]!r}, expected {wanted}; export the bundle again")


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of ``bundle``, each file it lists being there with its size (contents: ``check_hashes``).

    Raises BadInput when ``bundle`` is not a bundle of this version, VerificationFailed when a file is missing,
    not a plain file inside the bundle, or of another size.
    """
    path = bundle / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a directory that gemma-edge export wrote") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; export the bundle again") from None
    try:
        manifest = Manifest.from_json(text)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    for name in (*(artifact.file for artifact in manifest.artifacts.values()), TOKENIZER):
        if name not in manifest.files:
            raise BadInput(f"{path}: {name} is not among its files; export the bundle again")
    for name, entry in manifest.files.items():
        file = bundle / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise VerificationFailed(f"{file}: missing or not a plain file of the bundle; export the bundle again")
        if file.stat().st_size != entry.size:
            raise VerificationFailed(
                f"{file}: {file.stat().st_size} bytes, its manifest says {entry.size}; copy or export it again"
            )
    return manifest


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file in ``directory`` but the manifest, sorted by name."""
    return {
        path.name: FileEntry(path.stat().st_size, sha256_of(path))
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }


def changed_files(bundle: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Names of the files whose bytes are not what the manifest says."""
    return [name for name, entry in files.items() if sha256_of(bundle / name) != entry.sha256]
