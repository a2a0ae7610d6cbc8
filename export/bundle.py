"""From a quantized checkpoint to a bundle: a directory that appears whole and proven, or not at all.

    with draft_bundle(quantized, out, targets=[ONNX]) as draft:
        seal(draft, prove(draft))

Everything is written into a staging directory beside ``out``, proven there, synced to disk, and renamed to ``out``. The
same inputs give the same bytes: nothing in a bundle depends on the time, the directory or the host.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from export.checks import Check, require_passed
from export.manifest import (
    MANIFEST,
    PROOF,
    SCHEMA_VERSION,
    Artifact,
    Manifest,
    TokenizerInfo,
    describe_files,
)
from export.preflight import SMALL_FILES_BYTES, bundle_bytes, check_disk
from export.stand_ins import for_target
from export.target import StandIn, Target, multiplied, references_of
from export.tokenizer import write_tokenizer
from gemma3.cache import DEFAULT_CHUNK, DEFAULT_CONTEXT, CacheDtype, CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, DoesNotFit
from gemma3.generation_config import GENERATION_CONFIG, stop_ids
from gemma3.host.atomic import staging
from gemma3.host.memory import give_back, peak_rss
from gemma3.tokenizer import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SOFT_TOKEN,
    START_OF_IMAGE,
    START_OF_TURN,
)
from quant.kv import PerChannel
from quant.quantize import OF_WEIGHTS_ALONE, in_recipe
from quant.recipe import Recipe, Rule
from quant.source import QuantizedCheckpoint, Source
from quant.weights import QuantizedWeights

log = logging.getLogger(__name__)


@dataclass
class Draft:
    """A bundle that is not proven yet: its staging directory, its manifest, and by format the weights of each file.

    ``seal`` sets ``sealed``.
    """

    directory: Path
    manifest: Manifest
    weights: dict[str, QuantizedWeights]
    sealed: bool = False


@contextmanager
def draft_bundle(
    checkpoint: QuantizedCheckpoint,
    out: Path,
    *,
    targets: Sequence[Target],
    context: int | None = None,
    chunk: int | None = None,
    exact_sfp8: bool = False,
    kv: CacheDtype = "float32",
    kv_scales: Mapping[int, PerChannel] | None = None,
) -> Iterator[Draft]:
    """Export ``checkpoint`` to each of ``targets``. When the block ends and the draft is sealed, ``out`` appears.

    SFP8 weights become 8-bit integers; with ``exact_sfp8`` they keep their codes, which only .onnx can hold.
    ``context`` (positions) defaults to the model's, at most 4096. ``chunk`` (tokens) defaults to 128, at most the
    context; a multimodal model raises it to an image's tokens. ``kv`` is the dtype of the caches; int8 ones need
    ``kv_scales``, by layer (see ``quant.kv.calibrate``), and a target that has them. Raises BadInput or DoesNotFit for
    what cannot be exported, before the export begins where possible, and RuntimeError when the block ends without a
    seal. After any error nothing is left behind.
    """
    config = checkpoint.config
    layouts = cache_layouts(config, targets, context, chunk, kv)
    check_activations(targets, checkpoint.recipe)
    check_kv(targets, kv)
    assert kv == "float32" or kv_scales is not None, "an int8 cache needs scales"
    with staging(out) as directory:
        tokenizer = tokenizer_info(checkpoint)
        for line in companion_notes(checkpoint):
            log.info("%s", line)
        own_template = tokenizer.chat_template if tokenizer.chat_format == "template" else None
        write_tokenizer(checkpoint.tokenizer, checkpoint.path, directory, own_template)
        give_back()
        weights: dict[str, QuantizedWeights] = {}
        stand_ins: dict[str, dict[str, StandIn]] = {}
        for target in targets:
            own, stand_ins[target.name] = for_target(checkpoint.weights, target, exact_sfp8)
            weights[target.name] = replace(own, kv=kv_scales) if kv == "int8" and kv_scales else own
        sizes = [bundle_bytes(config, target, weights[target.name].forms) for target in targets]
        check_disk(out.parent, SMALL_FILES_BYTES + sum(sizes))
        artifacts = {}
        for target in targets:
            own, layout = weights[target.name], layouts[target.name]
            chosen = float_activations_of(target, config, checkpoint.recipe, own)
            artifact = export_artifact(target, config, own, layout, tokenizer.eos_ids, directory, chosen)
            artifacts[target.name] = replace(artifact, stand_ins=stand_ins[target.name])
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            gemma_edge=version("gemma-edge"),
            model=config,
            recipe=checkpoint.recipe.name,
            rules={rule.pattern: rule.scheme for rule in checkpoint.recipe.rules},
            method=checkpoint.method,
            weights=checkpoint.weights.verdicts,
            context=layouts[targets[0].name].context,
            chunk=layouts[targets[0].name].chunk,
            reference_dtype="float32",
            tokenizer=tokenizer,
            artifacts=artifacts,
            files=describe_files(directory),
            validation=(),
            sampling=checkpoint.generation.sampling,
        )
        (directory / PROOF).mkdir()
        write_manifest(directory, manifest)
        draft = Draft(directory, manifest, weights)
        yield draft
        if not draft.sealed:
            raise RuntimeError(f"{out}: the draft was not sealed, so the bundle does not appear")


def seal(draft: Draft, checks: Sequence[Check]) -> Manifest:
    """Write the final manifest of ``draft``. Raises VerificationFailed when one of ``checks`` did not pass."""
    checks = (*stand_in_checks(draft.manifest), *checks)
    require_passed(checks)
    manifest = replace(draft.manifest, files=describe_files(draft.directory), validation=checks)
    write_manifest(draft.directory, manifest)
    draft.sealed = True
    return manifest


def export_artifact(
    target: Target,
    config: ModelConfig,
    weights: QuantizedWeights,
    layout: CacheLayout,
    eos_ids: Sequence[int],
    directory: Path,
    float_activations: Sequence[str] = (),
) -> Artifact:
    """Write the files of one target into ``directory``. Returns the manifest's entry, still without stand-ins.

    The inputs of the weights ``float_activations`` stay in floating point.
    """
    log.info("exporting .%s", target.name)
    started = time.perf_counter()
    path = directory / target.file
    report = target.export(config, weights.tensors, layout, eos_ids, path, float_activations, weights.kv)
    give_back()
    stored = sum((directory / name).stat().st_size for name in report.files)
    log.info(
        "%s: %.1f MB in %.0f s, peak memory of this process so far %.1f GB",
        target.file,
        stored / 1e6,
        time.perf_counter() - started,
        peak_rss() / 1e9,
    )
    return Artifact(
        file=target.file,
        files=report.files,
        cache=layout,
        methods=report.methods,
        references=references_of(target, config, weights.integers, float_activations),
        float_activations=tuple(float_activations),
        versions={package: version(package) for package in target.packages},
        opsets=report.opsets,
        bytes=stored,
        ideal_bytes=weights.ideal_bytes,
        peak_memory_estimate=stored + layout.total_bytes + image_bytes(config),
        stand_ins={},
        details=report.details,
    )


def float_activations_of(
    target: Target, config: ModelConfig, recipe: Recipe, weights: QuantizedWeights
) -> tuple[str, ...]:
    """The integer weights whose inputs stay in floating point by ``recipe``, of a target that would round them."""
    if not target.roundings:
        return ()
    return tuple(name for name in multiplied(config, weights.integers) if recipe.rule(name).activations == "float")


def stored_kv(
    bundle: Path, manifest: Manifest, weights: Mapping[str, QuantizedWeights], targets: Mapping[str, Target]
) -> dict[str, QuantizedWeights]:
    """``weights``, by format, with the scales of int8 keys and values that the files of ``bundle`` hold.

    Raises BadInput when a file cannot be read.
    """
    found = dict(weights)
    for format, artifact in manifest.artifacts.items():
        read = targets[format].read_kv
        if artifact.cache.dtype == "int8" and read is not None:
            found[format] = replace(found[format], kv=dict(read(bundle / artifact.file)))
    return found


def check_kv(targets: Sequence[Target], kv: CacheDtype) -> None:
    """Raises BadInput when a target has no caches of the dtype ``kv``."""
    unable = [target.name for target in targets if kv == "int8" and target.read_kv is None]
    if unable:
        raise BadInput(f"a .{unable[0]} has no int8 KV cache; leave out --kv, or choose --format onnx")


def check_exportable(
    source: Source,
    targets: Sequence[Target],
    recipe: Recipe,
    context: int | None,
    chunk: int | None,
    kv: CacheDtype = "float32",
) -> None:
    """Raises what ``draft_bundle`` would raise for ``source`` before it needs quantized weights.

    So a caller learns of a bad context, chunk or tokenizer, and of activations that a target cannot keep in floating
    point, before the time-consuming quantization.
    """
    cache_layouts(source.config, targets, context, chunk, kv)
    check_activations(targets, recipe)
    check_kv(targets, kv)
    tokenizer_info(source)


def check_activations(targets: Sequence[Target], recipe: Recipe) -> None:
    """Raises BadInput when ``recipe`` keeps activations in floating point that the kernels of a target round."""
    chosen = [rule.pattern for rule in recipe.rules if rule.activations == "float" and rule.scheme != "float32"]
    unable = [target.name for target in targets if target.roundings and not target.can_keep_float]
    if chosen and unable:
        raise BadInput(
            f"float activations for {chosen[0]}: the kernels of a .{unable[0]} round them to int8; choose --format "
            "onnx, keep these weights in float32, or train for the rounding with qat --activations int8"
        )


def cache_layouts(
    config: ModelConfig,
    targets: Sequence[Target],
    context: int | None,
    chunk: int | None,
    kv: CacheDtype = "float32",
) -> dict[str, CacheLayout]:
    """The layout of each target's caches. Raises DoesNotFit or BadInput for a context or chunk that is not possible."""
    context = min(config.max_position_embeddings, DEFAULT_CONTEXT) if context is None else context
    chunk = largest_call(config, context, min(DEFAULT_CHUNK, context) if chunk is None else chunk)
    return {target.name: cache_layout(config, target.cache_style, context, chunk, kv) for target in targets}


def largest_call(config: ModelConfig, context: int, chunk: int) -> int:
    """The most tokens in one call: the larger of ``chunk`` and the number of an image's soft tokens.

    An image must be whole in one call. Raises DoesNotFit when an image does not fit the context.
    """
    if config.vision is None:
        return chunk
    tokens = config.vision.tokens_per_image
    needed = tokens + 4  # BOS, a marker on each side, and at least one token of text
    if needed > context:
        raise DoesNotFit(
            f"an image needs {needed} positions ({tokens} soft tokens, BOS, markers, text), the context is {context}; "
            f"use --context {needed} or more"
        )
    return max(chunk, tokens)


def image_bytes(config: ModelConfig) -> int:
    """The peak memory, in bytes, of encoding an image, besides the weights. 0 for a text-only model.

    It is about eleven float32 vectors of SigLIP's hidden size for each patch: five between the parts of a layer, and
    six within a part. The hidden values of an MLP, which takes 1024 patches at a time, need less.
    """
    vision = config.vision
    if vision is None:
        return 0
    return vision.patches_per_side**2 * 11 * vision.hidden_size * 4


def stand_in_checks(manifest: Manifest) -> list[Check]:
    """For each artifact, how close its worst stand-in is to the weight it replaces. The checks have no limit."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        if artifact.stand_ins:
            worst = min(artifact.stand_ins.values(), key=lambda one: one.decibels)
            count = len(artifact.stand_ins)
            name = f"{count} {worst.kind.upper()} weights as {worst.scheme}, the lowest signal-to-noise ratio"
            checks.append(Check(format, "stand-ins", "decibels", name, worst.decibels, None, True))
    return checks


def tokenizer_info(source: Source) -> TokenizerInfo:
    """The manifest's entry for the tokenizer. Raises BadInput as ``gemma3.companions.read_tokenizer`` does."""
    config, tokenizer = source.config, source.tokenizer
    markers = [START_OF_TURN, END_OF_TURN]
    if config.vision is not None:
        markers += [START_OF_IMAGE, IMAGE_SOFT_TOKEN, END_OF_IMAGE]
    return TokenizerInfo(
        sha256=tokenizer.sha256,
        bos_id=config.bos_token_id,
        eos_ids=stop_ids(config, source.generation, tokenizer),
        pad_id=config.pad_token_id,
        chat_template=source.chat.template,
        special_ids={marker: tokenizer.special_id(marker) for marker in markers},
        chat_format=source.chat.name,
        template_variables=dict(source.chat.variables),
    )


def companion_notes(source: Source) -> Iterator[str]:
    """What a user should know of the files beside the weights, line by line."""
    if source.chat.name == "template":
        yield "the checkpoint's own chat template differs from Gemma's and is used"
    for setting in source.generation.ignored:
        yield f"{GENERATION_CONFIG}: {setting} is not applied by gemma-edge"
    for token in dict.fromkeys(source.config.eos_token_ids + source.generation.eos_token_ids):
        if token >= source.config.vocab_size:
            yield f"stop id {token} is left out: the vocabulary has {source.config.vocab_size} tokens"


def weights_behind(manifest: Manifest, source: Source, targets: Mapping[str, Target]) -> dict[str, QuantizedWeights]:
    """By format, the weights of each file of a bundle, made again from the checkpoint that it was exported from.

    Raises BadInput when ``source`` cannot be that checkpoint.
    """
    if source.config != manifest.model:
        raise BadInput(f"{source.path}: not the checkpoint of this bundle, whose manifest has another configuration")
    if manifest.method not in OF_WEIGHTS_ALONE and not isinstance(source, QuantizedCheckpoint):
        raise BadInput(
            f"{source.path}: is not quantized; give the checkpoint with the {manifest.method} integers that the bundle "
            "was exported from"
        )
    rules = tuple(Rule(pattern, scheme) for pattern, scheme in manifest.rules.items())
    weights = in_recipe(source, Recipe(manifest.recipe, rules), manifest.method).weights
    exact_sfp8 = not any(artifact.stand_ins for artifact in manifest.artifacts.values())
    return {name: for_target(weights, targets[name], exact_sfp8)[0] for name in manifest.artifacts}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
