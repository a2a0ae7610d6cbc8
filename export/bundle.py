"""From a checkpoint to a bundle: a directory that appears whole and proven, or not at all.

Everything is written into a staging directory beside the target, proven there, synced and renamed. The same
inputs give the same bytes: nothing in a bundle depends on the time, the place or the host.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from export.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    Artifact,
    Check,
    Format,
    Manifest,
    Method,
    TensorSpec,
    TokenizerInfo,
    describe_files,
)
from gemma3.cache import CacheLayout, CacheStyle, cache_layout
from gemma3.checkpoint import Checkpoint, open_checkpoint
from gemma3.errors import BadInput, DoesNotFit, VerificationFailed
from gemma3.tokenizer import Tokenizer
from quant.integers import IntegerWeight
from quant.recipe import QuantizedWeights, Recipe, Rule, quantize

log = logging.getLogger(__name__)

STYLES: dict[Format, CacheStyle] = {"pte": "ring", "onnx": "compacting"}
PACKAGES: dict[Format, tuple[str, ...]] = {
    "pte": ("executorch", "torch", "torchao"),
    "onnx": ("onnx", "onnx-ir", "onnxruntime"),
}
# Golden vectors, manifest and tokenizer together stay below this.
SMALL_FILES_BYTES = 32 << 20


@dataclass(frozen=True)
class Draft:
    """What is to be proven: the staged files, and the weights they were made of."""

    directory: Path
    manifest: Manifest
    checkpoint: Checkpoint
    weights: QuantizedWeights


# Writes the golden vectors into the draft's directory and returns what validation measured.
Prove = Callable[[Draft], Sequence[Check]]


def export_bundle(
    checkpoint: Path,
    recipe: Recipe,
    out: Path,
    *,
    formats: Sequence[Format],
    context: int | None = None,
    chunk: int | None = None,
    prove: Prove,
) -> Manifest:
    """Quantize ``checkpoint``, export it in each of ``formats``, prove the files, and let ``out`` appear.

    ``context`` defaults to the model's, at most 4096 positions; ``chunk`` to 128 tokens, at most the context.
    Raises BadInput or DoesNotFit for what cannot be exported (before any work where it can be known), and
    VerificationFailed when a check does not pass. On any error nothing is left behind.
    """
    refuse_target(out)
    source = open_checkpoint(checkpoint)
    config = source.config
    context = min(config.max_position_embeddings, 4096) if context is None else context
    chunk = min(128, context) if chunk is None else chunk
    layouts = {format: cache_layout(config, STYLES[format], context, chunk) for format in formats}
    with staging(out) as directory:
        tokenizer = copy_tokenizer(source, directory)
        log.info("quantizing %d weights: %s", len(source.names), recipe.name)
        weights = quantize(source.items(), recipe)
        _check_disk(directory, weights, formats)
        artifacts = {}
        for format, layout in layouts.items():
            log.info("exporting .%s", format)
            artifacts[format] = export_artifact(format, source, weights, layout, tokenizer.eos_ids, directory)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=config,
            recipe=recipe.name,
            rules={rule.pattern: rule.scheme for rule in recipe.rules},
            weights=weights.verdicts,
            context=context,
            chunk=chunk,
            reference_dtype="float32",
            tokenizer=tokenizer,
            artifacts=artifacts,
            files=describe_files(directory),
            validation=(),
        )
        write_manifest(directory, manifest)
        checks = tuple(prove(Draft(directory, manifest, source, weights)))
        require_passed(checks)
        manifest = replace(manifest, files=describe_files(directory), validation=checks)
        write_manifest(directory, manifest)
    return manifest


def export_artifact(
    format: Format,
    source: Checkpoint,
    weights: QuantizedWeights,
    layout: CacheLayout,
    eos_ids: Sequence[int],
    directory: Path,
) -> Artifact:
    """Write one graph into ``directory``. The exporters are imported only when asked for: each is heavy."""
    path = directory / f"model.{format}"
    report: dict[str, Any]
    if format == "onnx":
        from export.to_onnx import export_onnx, genai_config

        report = export_onnx(source.config, weights.tensors, layout, path).to_dict()
        genai = json.dumps(genai_config(source.config, layout, path.name), indent=1)
        (directory / "genai_config.json").write_text(genai + "\n", encoding="utf-8")
    else:
        from export.to_executorch import export_pte

        report = export_pte(source.config, weights.tensors, layout, path, eos_ids=eos_ids).to_dict()
    stored = sum(file.stat().st_size for file in directory.glob(f"{path.name}*"))
    quantized_in_the_runtime = format == "pte" and bool(weights.integers)
    return Artifact(
        file=path.name,
        cache=layout,
        methods=(Method("forward", _specs(report.pop("inputs")), _specs(report.pop("outputs"))),),
        reference_activations="int8" if quantized_in_the_runtime else "float",
        versions={package: version(package) for package in PACKAGES[format]},
        opsets=report.pop("opsets", {}),
        bytes=stored,
        ideal_bytes=weights.ideal_bytes,
        peak_memory_estimate=stored + layout.total_bytes,
        report=report,
    )


def _specs(shapes: dict[str, Sequence[int | str]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes.items())


def copy_tokenizer(source: Checkpoint, directory: Path) -> TokenizerInfo:
    """Put the checkpoint's tokenizer into ``directory``. Raises BadInput when it is not the model's.

    tokenizer.json and tokenizer_config.json, which stock runners read, go along where the checkpoint has them.
    """
    Tokenizer(source.path)
    shutil.copyfile(source.path / TOKENIZER, directory / TOKENIZER)
    # Read while it has no neighbours: released text-only checkpoints list an image token past their own table.
    tokenizer = Tokenizer(directory / TOKENIZER)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, directory / name)
    config = source.config
    if tokenizer.vocab_size > config.vocab_size or tokenizer.bos_id != config.bos_token_id:
        raise BadInput(
            f"{source.path}: {TOKENIZER} has {tokenizer.vocab_size} tokens and BOS {tokenizer.bos_id}, config.json "
            f"{config.vocab_size} and {config.bos_token_id}; they are not of the same model"
        )
    # Chat-tuned files end a turn with <end_of_turn>, which some configurations leave out of eos_token_id.
    stops = dict.fromkeys((*config.eos_token_ids, tokenizer.end_of_turn_id))
    return TokenizerInfo(
        sha256=tokenizer.sha256,
        bos_id=config.bos_token_id,
        eos_ids=tuple(stops),
        pad_id=config.pad_token_id,
        chat_template="gemma3",
    )


def quantize_again(manifest: Manifest, source: Checkpoint) -> QuantizedWeights:
    """The weights a bundle was made of, from the checkpoint it was made of. Raises BadInput for another one."""
    if source.config != manifest.model:
        raise BadInput(f"{source.path}: not the checkpoint of this bundle, whose manifest has another configuration")
    rules = tuple(Rule(pattern, scheme) for pattern, scheme in manifest.rules.items())
    return quantize(source.items(), Recipe(manifest.recipe, rules))


def check_integers(directory: Path, manifest: Manifest, weights: QuantizedWeights) -> list[Check]:
    """Are the codes and scales in each file those of ``weights``? The share of weights that are, one by one."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        if not weights.integers:
            continue
        stored = read_back(format, directory / artifact.file)
        equal = sum(_equal_codes(stored.get(name), weight) for name, weight in weights.integers.items())
        total = sum(weight.codes.numel() for weight in weights.integers.values())
        name = f"integers in the file are the quantizer's ({equal} of {total})"
        checks.append(Check(format, name, "equal", equal / total, 1.0, equal == total))
    return checks


def read_back(format: Format, path: Path) -> dict[str, IntegerWeight]:
    """The integer weights that the file holds, by checkpoint name."""
    if format == "onnx":
        from export.to_onnx import read_back_onnx

        return read_back_onnx(path)
    from export.to_executorch import read_back_pte

    return read_back_pte(path)


def _equal_codes(stored: IntegerWeight | None, weight: IntegerWeight) -> int:
    """How many weights have the same code under the same scale."""
    if stored is None or stored.codes.shape != weight.codes.shape or stored.scales.shape != weight.scales.shape:
        return 0
    same = (stored.scales == weight.scales).repeat_interleave(weight.group_size, dim=1)
    return int((same & (stored.codes == weight.codes)).sum())


def require_passed(checks: Sequence[Check]) -> None:
    """Raises VerificationFailed naming the first check that did not pass."""
    failed = [check for check in checks if not check.passed]
    if failed:
        first, more = failed[0], f" (and {len(failed) - 1} checks more)" if len(failed) > 1 else ""
        raise VerificationFailed(
            f".{first.artifact}, {first.name}: {first.metric} is {first.value:.3g}, the limit is "
            f"{first.limit:.3g}{more}; do not use this file"
        )


def refuse_target(out: Path) -> None:
    """Raises BadInput unless ``out`` can be created: it must not exist, its parent must be writable."""
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out}: exists; remove it or choose another -o")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent}: no such directory; create it or choose another -o")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{out.parent}: not writable; choose another -o")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that becomes ``out`` if the block ends, and vanishes if it raises."""
    directory = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        directory.mkdir()
    except OSError as error:
        raise BadInput(f"{out.parent}: cannot write there ({error.strerror}); choose another -o") from None
    try:
        yield directory
        for path in directory.iterdir():
            _sync(path)
        _sync(directory)
        refuse_target(out)  # rename would silently replace an empty directory
        directory.rename(out)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    _sync(out.parent)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _check_disk(directory: Path, weights: QuantizedWeights, formats: Sequence[Format]) -> None:
    """Raises DoesNotFit when the files cannot have room. A .pte holds the embedding table a second time."""
    table = weights.tensors["model.embed_tokens.weight"]
    table_bytes = 4 * table.numel() if isinstance(table, Tensor) else table.ideal_bytes
    needed = SMALL_FILES_BYTES + len(formats) * weights.ideal_bytes + (table_bytes if "pte" in formats else 0)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DoesNotFit(
            f"{directory.parent}: {free >> 20} MiB free, the bundle needs {needed >> 20} MiB; "
            "make room or choose another -o"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
