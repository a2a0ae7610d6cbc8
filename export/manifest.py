"""The bundle's manifest: frozen dataclasses, stored as JSON. Works without torch.

docs/manifest.schema.json describes the file. docs/bundle.md shows an example and says what a version means.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from export.checks import Check
from export.target import Method, StandIn
from gemma3 import typed_json
from gemma3.cache import CacheLayout
from gemma3.chat import GEMMA, ChatFormat
from gemma3.chat_template import TemplateFormat
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, UserError, VerificationFailed
from gemma3.generation_config import Sampling
from gemma3.host.files import parse_json, read_text
from quant.recipe import Verdict

# MAJOR.MINOR. A new MINOR only adds keys: a reader ignores keys that it does not know in a file of a newer MINOR.
# 4.0: the references of an artifact by name, the weights whose inputs stay in floating point, the form and variables of
# the chat template, sampling. 4.1: caches of dtype int8.
MAJOR, MINOR = 4, 1
SCHEMA_VERSION = f"{MAJOR}.{MINOR}"
MANIFEST = "manifest.json"
PROOF = "proof"
PLAN, GOLDEN = f"{PROOF}/plan.json", f"{PROOF}/golden.safetensors"
TOKENIZER = "tokenizer.model"
MAX_SIZE = 2**31  # of anything that the manifest counts in a model or a cache
AGAIN = "make the bundle again: gemma-edge export CHECKPOINT -o BUNDLE"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes and the sha256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """One exported graph and how to run it.

    ``files`` lists the graphs and their external data; ``file`` is the first of them. ``references`` names the ways in
    which kernels that may run the file round the inputs of linear layers with integer weights ("float": they do not);
    the proof has a reference for each. ``float_activations`` lists the weights whose inputs stay in floating point
    although other inputs are rounded.

    ``bytes`` counts ``files``; ``ideal_bytes`` counts the weights at their bits plus two bytes a scale, each stored
    once. ``peak_memory_estimate`` is in bytes: the weights as stored, the caches, and what encoding an image takes.
    ``stand_ins`` lists the weights that the file holds in another scheme than the checkpoint (SFP8 as 8-bit integers).
    ``details`` is what only this kind of artifact has.
    """

    file: str
    files: tuple[str, ...]
    cache: CacheLayout
    methods: tuple[Method, ...]
    references: tuple[str, ...]
    float_activations: tuple[str, ...]
    versions: dict[str, str]  # of the packages it was exported and checked with
    opsets: dict[str, int]  # ONNX operator sets by domain; empty for .pte
    bytes: int
    ideal_bytes: int
    peak_memory_estimate: int
    stand_ins: dict[str, StandIn]
    details: dict[str, Any]


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer: the sha256 of ``tokenizer.model``, special ids, and the chat template as Jinja text.

    Generation stops at any of ``eos_ids``. ``special_ids`` has the markers of turns and, for a multimodal model, of
    images, by their text. ``chat_format`` "gemma" says that prompts have Gemma's form, which takes no Jinja to make;
    otherwise the template is the checkpoint's own, rendered with ``template_variables``.
    """

    sha256: str
    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str
    special_ids: dict[str, int]
    chat_format: Literal["gemma", "template"] = "gemma"
    template_variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its proof. ``artifacts`` is by format: "pte", "onnx".

    ``rules`` are the recipe's, pattern to scheme; the first match wins. ``method`` says how the integers were chosen:
    "mse", "rtn", "gptq", "qat"; in older files also "hqq". ``weights`` has the verdict on each weight. ``chunk`` is the
    most tokens that one call takes: of text, or the soft tokens of one image. ``files`` lists every file but the
    manifest by its path from the bundle. ``validation`` is what the proof measured. ``sampling`` is what the checkpoint
    proposes; generation is greedy unless a user asks for it.
    """

    schema_version: str
    gemma_edge: str  # the version of the program that wrote it
    model: ModelConfig
    recipe: str
    rules: dict[str, str]
    method: str
    weights: dict[str, Verdict]
    context: int
    chunk: int
    reference_dtype: str
    tokenizer: TokenizerInfo
    artifacts: dict[str, Artifact]
    files: dict[str, FileEntry]
    validation: tuple[Check, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def to_json(self) -> str:
        return typed_json.encode(self)

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Raises BadInput for JSON that is not a manifest of this major version."""
        try:
            data = parse_json(text)
        except BadInput as error:
            raise BadInput(f"{error}; {AGAIN}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        minor = _minor(version)
        if minor is None:
            raise BadInput(f"schema_version is {ascii(version)[:60]}, this program reads {MAJOR}.x; {AGAIN}")
        try:
            manifest = typed_json.decode(Manifest, data, "manifest", ignore_unknown=minor > MINOR)
            _check_sizes(manifest)
            return manifest
        except BadInput as error:
            raise BadInput(f"{error}; {AGAIN}") from None


def _check_sizes(manifest: Manifest) -> None:
    """Raises BadInput for a number that is no size, and for a cache layout that is not the model's."""
    config = manifest.model
    sizes = {"context": manifest.context, "chunk": manifest.chunk}
    for place, value in (("model", config), ("model.vision", config.vision)):
        fields = dataclasses.asdict(value) if value else {}
        sizes |= {
            f"{place}.{key}": size
            for key, size in fields.items()
            if isinstance(size, int) and not isinstance(size, bool) and not key.endswith("_token_id")
        }
    for format, artifact in manifest.artifacts.items():
        cache = artifact.cache
        if [layer.kind for layer in cache.layers] != list(config.layer_types):
            raise BadInput(f"manifest.artifacts.{format}.cache.layers are not the layers of manifest.model")
        if (cache.context, cache.chunk) != (manifest.context, manifest.chunk):
            raise BadInput(f"manifest.artifacts.{format}.cache has another context or chunk than the manifest")
        for index, layer in enumerate(cache.layers):
            place = f"artifacts.{format}.cache.layers[{index}]"
            sizes |= {
                f"{place}.slots": layer.slots,
                f"{place}.num_key_value_heads": layer.num_key_value_heads,
                f"{place}.head_dim": layer.head_dim,
            }
    for place, size in sizes.items():
        if not 0 < size < MAX_SIZE:
            raise BadInput(f"manifest.{place} is {str(size)[:60]}, expected a positive size below {MAX_SIZE}")


def _minor(version: Any) -> int | None:
    """The MINOR of a version whose MAJOR is that of this program; None for any other value."""
    if not isinstance(version, str):
        return None
    major, _, minor = version.partition(".")
    known = major == str(MAJOR) and minor.isdecimal() and minor.isascii() and len(minor) < 5
    return int(minor) if known else None


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of ``bundle``. Checks that the files it lists exist with their sizes, but not their contents.

    A file may be a link to a plain file, as in a hub cache. Raises BadInput when ``bundle`` is not a bundle of this
    version, and VerificationFailed when a file is missing, is not a plain file of the bundle, or has another size.
    """
    path = bundle / MANIFEST
    text = read_text(path, "give a directory that gemma-edge export wrote")
    try:
        manifest = Manifest.from_json(text)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    artifacts = manifest.artifacts.values()
    if not artifacts:
        raise BadInput(f"{path}: has no artifacts; {AGAIN}")
    for name in (*(name for one in artifacts for name in (one.file, *one.files)), TOKENIZER):
        if name not in manifest.files:
            raise BadInput(f"{path}: {name} is not among its files; {AGAIN}")
    if manifest.files[TOKENIZER].sha256 != manifest.tokenizer.sha256:
        raise BadInput(f"{path}: {TOKENIZER} has two different sha256; {AGAIN}")
    for name, entry in manifest.files.items():
        file = bundle / name
        if not _is_inside(bundle, name) or not file.is_file():
            raise VerificationFailed(f"{file}: missing or not a plain file of the bundle; {AGAIN}")
        if file.stat().st_size != entry.size:
            raise VerificationFailed(
                f"{file}: {file.stat().st_size} bytes, its manifest says {entry.size}; copy or export it again"
            )
    return manifest


def _is_inside(bundle: Path, name: str) -> bool:
    """Is ``name`` a path to a file in the bundle or in its folder ``proof/``, which is not a link?"""
    folder, _, base = name.rpartition("/")
    if folder not in ("", PROOF) or base in ("", ".", "..") or "\\" in base:
        return False
    return not (folder and (bundle / folder).is_symlink())


def chat_format(manifest: Manifest) -> ChatFormat:
    """The form of a bundle's conversations. Raises BadInput when its chat template is too long."""
    tokenizer = manifest.tokenizer
    if tokenizer.chat_format == "gemma":
        return GEMMA
    return TemplateFormat(tokenizer.chat_template, tokenizer.template_variables)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_link(link: Path) -> None:
    """Follow a link that is a file of a bundle only if its content is what the manifest beside it says.

    Raises VerificationFailed when the content differs, and BadInput when there is no manifest that lists the file.
    """
    try:
        entry = read_manifest(link.parent).files.get(link.name)
    except UserError:
        entry = None
    if entry is None:
        raise BadInput(
            f"{link.parent}: {link.name} is a link or not a plain file, and no manifest vouches for it; not opened"
        )
    status = link.stat()
    if _sha256_of(link.resolve(), status.st_size, status.st_mtime_ns) != entry.sha256:
        raise VerificationFailed(f"{link}: is a link to a file that the manifest does not describe; copy it again")


@cache  # a session opens its graph more than once
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file below ``directory`` except the manifest, by path, in the order of paths."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {
        name: FileEntry(path.stat().st_size, sha256_of(path))
        for name, path in sorted(found.items())
        if name != MANIFEST
    }


def changed_files(bundle: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """The names of those of ``files`` whose content in ``bundle`` does not have the given sha256."""
    return [name for name, entry in files.items() if sha256_of(bundle / name) != entry.sha256]
