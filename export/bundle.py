"""From a checkpoint to a bundle: a directory that appears whole and proven, or not at all.

Everything is written into a staging directory beside the target, proven there, synced and renamed. The same
inputs give the same bytes: nothing in a bundle depends on the time, the place or the host.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
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
from export.reexpress import STAND_INS, reexpressed
from export.source import open_source
from gemma3.cache import CacheLayout, CacheStyle, cache_layout
from gemma3.config import ModelConfig, VisionConfig, read_config
from gemma3.errors import BadInput, DoesNotFit, VerificationFailed
from gemma3.tokenizer import END_OF_IMAGE, IMAGE_SOFT_TOKEN, START_OF_IMAGE, Tokenizer
from quant.atomic import refuse_target, staging
from quant.integers import IntegerWeight, equal_codes
from quant.recipe import Quantized, QuantizedWeights, Recipe, Rule
from quant.sfp8 import Sfp8Weight
from quant.stored import CONFIG, is_quantized

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
    weights: dict[Format, QuantizedWeights]


# Writes the golden vectors into the draft's directory and returns what validation measured.
Prove = Callable[[Draft], Sequence[Check]]


def export_bundle(
    checkpoint: Path,
    recipe: Recipe | None,
    out: Path,
    *,
    formats: Sequence[Format],
    context: int | None = None,
    chunk: int | None = None,
    exact_sfp8: bool = False,
    prove: Prove,
) -> Manifest:
    """Export ``checkpoint`` in each of ``formats``, prove the files, and let ``out`` appear.

    A float checkpoint is rounded to nearest in ``recipe``; a quantized one keeps the integers it has (see
    ``open_source``). SFP8 weights become 8-bit integers, unless ``exact_sfp8`` keeps their codes, which only .onnx
    can. ``context`` defaults to the model's, at most 4096 positions; ``chunk`` to 128 tokens, at most the context
    and at least an image's.
    Raises BadInput or DoesNotFit for what cannot be exported (before any work where it can be known), and
    VerificationFailed when a check does not pass. On any error nothing is left behind.
    """
    refuse_target(out)
    config = read_config(checkpoint / CONFIG)
    context = min(config.max_position_embeddings, 4096) if context is None else context
    chunk = largest_piece(config, context, min(128, context) if chunk is None else chunk)
    layouts = {format: cache_layout(config, STYLES[format], context, chunk) for format in formats}
    with staging(out) as directory:
        tokenizer = copy_tokenizer(checkpoint, config, directory)
        source = open_source(checkpoint, recipe)
        weights, stand_ins = as_the_files_hold_them(source.weights, formats, exact_sfp8)
        _check_disk(directory, weights)
        artifacts = {}
        for format, layout in layouts.items():
            log.info("exporting .%s", format)
            artifact = export_artifact(format, config, weights[format], layout, tokenizer.eos_ids, directory)
            artifacts[format] = replace(artifact, stand_ins=stand_ins[format])
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=config,
            recipe=source.recipe.name,
            rules={rule.pattern: rule.scheme for rule in source.recipe.rules},
            method=source.method,
            weights=source.weights.verdicts,
            context=context,
            chunk=chunk,
            reference_dtype="float32",
            tokenizer=tokenizer,
            artifacts=artifacts,
            files=describe_files(directory),
            validation=(),
        )
        write_manifest(directory, manifest)
        checks = (*stand_in_checks(manifest), *prove(Draft(directory, manifest, weights)))
        require_passed(checks)
        manifest = replace(manifest, files=describe_files(directory), validation=checks)
        write_manifest(directory, manifest)
    return manifest


def export_artifact(
    format: Format,
    config: ModelConfig,
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

        report = export_onnx(config, weights.tensors, layout, path).to_dict()
        genai = json.dumps(genai_config(config, layout, path.name), indent=1)
        (directory / "genai_config.json").write_text(genai + "\n", encoding="utf-8")
    else:
        from export.to_executorch import export_pte

        report = export_pte(config, without_sfp8(weights), layout, path, eos_ids=eos_ids).to_dict()
    stored = sum(file.stat().st_size for file in directory.glob(f"*.{format}*"))
    quantized_in_the_runtime = format == "pte" and bool(weights.integers)
    return Artifact(
        file=path.name,
        cache=layout,
        methods=tuple(
            Method(name, _specs(method["inputs"]), _specs(method["outputs"]))
            for name, method in report.pop("methods").items()
        ),
        reference_activations="int8" if quantized_in_the_runtime else "float",
        versions={package: version(package) for package in PACKAGES[format]},
        opsets=report.pop("opsets", {}),
        bytes=stored,
        ideal_bytes=weights.ideal_bytes,
        peak_memory_estimate=stored + layout.total_bytes + image_bytes(config),
        stand_ins={},
        report=report,
    )


def largest_piece(config: ModelConfig, context: int, chunk: int) -> int:
    """``chunk``, or the soft tokens of an image where these are more: an image goes through the model whole.

    Raises DoesNotFit when one is over the context.
    """
    if config.vision is None:
        return chunk
    tokens = config.vision.tokens_per_image
    needed = tokens + 4  # BOS, a mark on either side, and something about it
    if needed > context:
        raise DoesNotFit(
            f"an image's {tokens} tokens and those around it are over the context of {context}; "
            f"use --context {needed} or more"
        )
    return max(chunk, tokens)


def image_bytes(config: ModelConfig) -> int:
    """What encoding an image takes at its peak beside the weights: about eleven values of the encoder's width a patch.

    Five between the parts of a layer and six within one; an MLP's hidden values, of 1024 patches at a time, are fewer.
    """
    vision = config.vision
    if vision is None:
        return 0
    return vision.patches_per_side**2 * 11 * vision.hidden_size * 4


def _specs(shapes: dict[str, Sequence[int | str]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes.items())


def as_the_files_hold_them(
    weights: QuantizedWeights, formats: Iterable[Format], exact_sfp8: bool
) -> tuple[dict[Format, QuantizedWeights], dict[Format, dict[str, float]]]:
    """What each format's file is made of, and which of it stands in for SFP8 (see ``export.reexpress``)."""
    ready: dict[Format, QuantizedWeights] = {}
    stand_ins: dict[Format, dict[str, float]] = {}
    for format in formats:
        ready[format], stand_ins[format] = (weights, {}) if exact_sfp8 else reexpressed(weights, format)
    return ready, stand_ins


def stand_in_checks(manifest: Manifest) -> list[Check]:
    """How far the worst of the integers that stand in for SFP8 are from it: a figure, not a limit."""
    return [
        Check(
            format,
            f"{len(artifact.stand_ins)} SFP8 weights as {STAND_INS[format]}: the farthest from its values",
            "decibels",
            min(artifact.stand_ins.values()),
            None,
            True,
        )
        for format, artifact in manifest.artifacts.items()
        if artifact.stand_ins
    ]


def without_sfp8(weights: QuantizedWeights) -> dict[str, Tensor | IntegerWeight]:
    """Raises BadInput where SFP8's codes were to be kept, for a runtime that cannot."""
    found = {}
    for name, weight in weights.tensors.items():
        if isinstance(weight, Sfp8Weight):
            raise BadInput(f"{name}: only .onnx can hold SFP8's own codes; leave out --exact-sfp8, or --format onnx")
        found[name] = weight
    return found


def copy_tokenizer(checkpoint: Path, config: ModelConfig, directory: Path) -> TokenizerInfo:
    """Put the checkpoint's tokenizer into ``directory``. Raises BadInput when it is not the model's.

    What goes with it, for images and for stock runners, goes along where the checkpoint has it.
    """
    complete = Tokenizer(checkpoint)
    shutil.copyfile(checkpoint / TOKENIZER, directory / TOKENIZER)
    # Read while it has no neighbours: released text-only checkpoints list an image token past their own table.
    tokenizer = complete if config.vision else Tokenizer(directory / TOKENIZER)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, directory / name)
    if config.vision is not None:
        _check_image_ids(checkpoint, config.vision, tokenizer)
    if tokenizer.vocab_size > config.vocab_size or tokenizer.bos_id != config.bos_token_id:
        raise BadInput(
            f"{checkpoint}: {TOKENIZER} has {tokenizer.vocab_size} tokens and BOS {tokenizer.bos_id}, config.json "
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


def _check_image_ids(checkpoint: Path, vision: VisionConfig, tokenizer: Tokenizer) -> None:
    for piece, expected in (
        (START_OF_IMAGE, vision.begin_image_token_id),
        (IMAGE_SOFT_TOKEN, vision.image_token_id),
        (END_OF_IMAGE, vision.end_image_token_id),
    ):
        if tokenizer.special_id(piece) != expected:
            raise BadInput(
                f"{checkpoint}: {piece} is token {tokenizer.special_id(piece)} of the tokenizer, {expected} in "
                "config.json; they are not of the same model"
            )


def weights_behind(manifest: Manifest, checkpoint: Path) -> dict[Format, QuantizedWeights]:
    """What each file of a bundle was made of, from the checkpoint that the bundle was made of.

    Raises BadInput for a checkpoint that cannot be that one.
    """
    if read_config(checkpoint / CONFIG) != manifest.model:
        raise BadInput(f"{checkpoint}: not the checkpoint of this bundle, whose manifest has another configuration")
    if manifest.method != "rtn" and not is_quantized(checkpoint):
        raise BadInput(
            f"{checkpoint}: is not quantized; give the checkpoint that the bundle's {manifest.method} integers are of"
        )
    rules = tuple(Rule(pattern, scheme) for pattern, scheme in manifest.rules.items())
    weights = open_source(checkpoint, Recipe(manifest.recipe, rules)).weights
    exact_sfp8 = not any(artifact.stand_ins for artifact in manifest.artifacts.values())
    return as_the_files_hold_them(weights, manifest.artifacts, exact_sfp8)[0]


def check_integers(directory: Path, manifest: Manifest, weights: Mapping[Format, QuantizedWeights]) -> list[Check]:
    """Are the codes and scales in each file those of ``weights``? The share of weights that are, one by one."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        quantized = weights[format].quantized
        if not quantized:
            continue
        stored = read_back(format, directory / artifact.file)
        equal = sum(_equal(stored[name], weight) for name, weight in quantized.items() if name in stored)
        total = sum(weight.codes.numel() for weight in quantized.values())
        name = f"integers in the file are the quantizer's ({equal} of {total})"
        checks.append(Check(format, name, "equal", equal / total, 1.0, equal == total))
    return checks


def _equal(stored: Quantized, weight: Quantized) -> int:
    """How many codes are the same under the same scale."""
    if isinstance(weight, IntegerWeight):
        return equal_codes(stored, weight) if isinstance(stored, IntegerWeight) else 0
    same = isinstance(stored, Sfp8Weight) and torch.equal(stored.scale, weight.scale)
    return int((stored.codes == weight.codes).sum()) if same else 0


def read_back(format: Format, path: Path) -> Mapping[str, Quantized]:
    """The quantized weights that the file holds, by checkpoint name."""
    if format == "onnx":
        from export.to_onnx import read_back_onnx, read_back_sfp8

        return {**read_back_onnx(path), **read_back_sfp8(path)}
    from export.to_executorch import read_back_pte

    return read_back_pte(path)


def require_passed(checks: Sequence[Check]) -> None:
    """Raises VerificationFailed naming the first check that did not pass."""
    failed = [check for check in checks if not check.passed]
    if failed:
        first, more = failed[0], f" (and {len(failed) - 1} checks more)" if len(failed) > 1 else ""
        raise VerificationFailed(
            f".{first.artifact}, {first.name}: {first.metric} is {first.value:.3g}, the limit is "
            f"{first.limit:.3g}{more}; do not use this file"
        )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _check_disk(directory: Path, weights: Mapping[Format, QuantizedWeights]) -> None:
    """Raises DoesNotFit when the files cannot have room. A .pte holds the embedding table a second time."""
    needed = SMALL_FILES_BYTES + sum(own.ideal_bytes for own in weights.values())
    if "pte" in weights:
        table = weights["pte"].tensors["model.embed_tokens.weight"]
        needed += 4 * table.numel() if isinstance(table, Tensor) else table.ideal_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DoesNotFit(
            f"{directory.parent}: {free >> 20} MiB free, the bundle needs {needed >> 20} MiB; "
            "make room or choose another -o"
        )
