"""Computes fresh references: the logits of each artifact's quantized eager model along a plan.

All references of artifacts with the same weights are computed together, layer by layer (quant/streamed.py): in float32
and with each rounding. A second pass, over the plan's first positions, measures what limits follow from: the distance
from float64 with the errors of adding, and from the same model with changed inputs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from export.manifest import Artifact, Manifest
from export.target import FLOAT, Target, rounding_of
from gemma3.cache import cache_layout
from gemma3.config import ModelConfig
from gemma3.host.memory import give_back
from gemma3.host.progress import Progress
from gemma3.images import network_input
from quant.activations import Rounding
from quant.eager import quantized_model
from quant.streamed import Streamed, Variant
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import (
    FULL_VOCABULARY,
    Difference,
    Recorder,
    ReferenceLogits,
    reference_keys,
    relative_rms,
    same_weights,
)
from runtime_py.proof.plan import Plan, plan_images
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Logits, SoftTokens

WIDE_CACHE = "wide-cache"  # the key of FLOAT without the rounding of an int8 KV cache; no file is compared with it
DRAWS = 4  # how many times the noise of a small model is measured, with other changes each time
# Files that round nothing are 0.4 to 1.1 times as far from their reference as that is from itself in float64 with
# errors of adding. Limits are four times the float error, and twice this distance is enough.
FLOAT_ERROR_SHARE = 0.5


@dataclass(frozen=True)
class FreshReferences:
    """The references of a bundle's artifacts.

    ``golden`` are by key (see ``reference_keys``). ``exact`` are by format: the same weights with float activations.
    """

    golden: dict[str, ReferenceLogits]
    exact: dict[str, ReferenceLogits]


def fresh_references(
    manifest: Manifest, plan: Plan, weights: Mapping[str, QuantizedWeights], targets: Mapping[str, Target]
) -> FreshReferences:
    """Compute the references of all artifacts. ``weights`` and ``targets`` are by format. Needs no runtime."""
    images = plan_images(manifest)
    keys = reference_keys(manifest)
    golden: dict[str, ReferenceLogits] = {}
    exact: dict[str, ReferenceLogits] = {}
    for formats in groups_of(manifest):
        roundings: dict[str, Rounding] = {}
        measured_by: dict[str, str] = {}  # key → the key of the reference whose noise it has
        for format in formats:
            rounded = {key: name for name, key in keys[format].items() if name != FLOAT}
            for key, name in rounded.items():
                chosen = manifest.artifacts[format].float_activations
                roundings.setdefault(key, rounding_of(targets[format], name, chosen))
                # The noise of one rounding is about that of another, so it is measured once for each format.
                measured_by.setdefault(key, next((one for one in rounded if one in measured_by), key))
        noisy = frozenset(measured_by.values())
        found = references(manifest.model, weights[formats[0]], plan, images, roundings, noisy)
        for key in roundings:
            source = found[measured_by[key]]
            golden[key] = replace(found[key], noise_kl=source.noise_kl, soft_noise=source.soft_noise)
        for format in formats:
            exact[format] = found[FLOAT]
            if FLOAT in keys[format]:
                golden[keys[format][FLOAT]] = found[FLOAT]
    give_back()  # a runtime opens the file next
    return FreshReferences(golden, exact)


def groups_of(manifest: Manifest) -> list[list[str]]:
    """The formats of a bundle, those that compute with the same weights together."""
    groups: list[list[str]] = []
    for format, artifact in manifest.artifacts.items():
        group = next((one for one in groups if same_weights(manifest.artifacts[one[0]], artifact)), None)
        if group is None:
            groups.append([format])
        else:
            group.append(format)
    return groups


def references(
    config: ModelConfig,
    weights: QuantizedWeights,
    plan: Plan,
    images: NDArray[np.uint8],
    roundings: Mapping[str, Rounding] | None = None,
    noisy: frozenset[str] = frozenset(),
) -> dict[str, ReferenceLogits]:
    """The reference FLOAT with its float error, and one for each of ``roundings`` with what that costs, by its key.

    The float error is FLOAT_ERROR_SHARE of the distance between FLOAT and the same model in float64, whose matrix
    products have the errors of kernels that add one term after another (``quant.streamed.error_of_adding``). FLOAT
    itself is multiplied by a library whose errors are smaller, and do not grow with the columns of a matrix.

    With an int8 KV cache all of them round keys and values, and FLOAT has the cost of that rounding, and noise. The
    references of the keys ``noisy`` have their noise too. It is the distance between the reference and the same model
    after the inputs of the text model and of the vision model's layers are randomly changed by one unit in the last
    place. A small model has few values near a rounding boundary, and one draw may miss them all, so its noise is the
    largest of several draws.
    """
    # The variants along the whole plan, by key, and with which other one a variant's logits are compared for its cost.
    variants, origins = {FLOAT: Variant()}, dict[str, str]()
    if weights.kv:
        variants, origins = {WIDE_CACHE: Variant(), FLOAT: Variant(round_heads=True)}, {FLOAT: WIDE_CACHE}
    for key, rounding in (roundings or {}).items():
        variants[key], origins[key] = Variant(rounding=rounding, round_heads=bool(weights.kv)), FLOAT
    # The changed variants along the plan's beginning, each after the key of the variant that it is compared with.
    wide = (next(iter(variants)), Variant(torch.float64, adding=0))
    draws = range(DRAWS if config.vocab_size <= FULL_VOCABULARY else 1)
    nudged = [key for key in variants if key in noisy or (weights.kv and key == FLOAT)]
    changed = [wide, *((key, replace(variants[key], nudge=seed)) for key in nudged for seed in draws)]

    layers = config.num_layers + (0 if config.vision is None else config.vision.num_hidden_layers)
    done = count(1)
    with closing(Progress(2 * layers)) as progress:

        def report() -> None:
            progress.show(next(done), "layers of the reference")

        model = Streamed(config, weights, list(variants.values()), report)
        soft_tokens = dict(zip(variants, encode(model, images), strict=True))
        recorders = {key: Recorder(plan.ids, config.vocab_size) for key in variants}
        costs: dict[str, list[float]] = {key: [] for key in origins}
        for position, found in logits_along(model, plan, len(plan.ids), list(soft_tokens.values())):
            logits = dict(zip(variants, found, strict=True))
            rows = {key: recorders[key].add(position, one) for key, one in logits.items()}
            for key, origin in origins.items():
                costs[key].append(rows[origin].compare(logits[key]).kl)

        end = plan.measured(0 if config.vision is None else config.vision.tokens_per_image)
        first_images = images[: 1 + max(plan.image_numbers[plan.images_between(0, end)], default=0)]
        model = Streamed(config, weights, [variant for _, variant in changed], report)
        changed_tokens = encode(model, first_images)
        differences: list[list[Difference]] = [[] for _ in changed]
        for position, found in logits_along(model, plan, end, changed_tokens):
            for (key, _), one, compared in zip(changed, found, differences, strict=True):
                compared.append(recorders[key].rows[position].compare(one))

    results = {key: recorders[key].reference(images, soft_tokens[key]) for key in variants}
    for key, origin in origins.items():
        cost, soft_cost = floats(costs[key]), changes(soft_tokens[key], soft_tokens[origin])
        results[key] = replace(results[key], cost_kl=cost, soft_cost=soft_cost)
    error = FLOAT_ERROR_SHARE * floats(one.max_abs for one in differences[0])
    soft_error = FLOAT_ERROR_SHARE * changes(changed_tokens[0], soft_tokens[wide[0]])
    results[FLOAT] = replace(results[FLOAT], float_error=error, soft_noise=soft_error)
    for key in nudged:
        tries = [number for number, (of, _) in enumerate(changed) if of == key and number > 0]
        noise = max((floats(one.kl for one in differences[number]) for number in tries), key=lambda one: one.sum())
        soft_noise = [changes(changed_tokens[number], soft_tokens[key]) for number in tries]
        # The vision model rounds nothing for the cache, so that FLOAT's distance in float64 counts as well.
        soft_noise = [soft_error, *soft_noise] if key == FLOAT else soft_noise
        results[key] = replace(results[key], noise_kl=noise, soft_noise=np.concatenate(soft_noise))
    return results


def floats(values: Iterable[float]) -> NDArray[np.float32]:
    return np.asarray(list(values), np.float32)


def changes(seen: SoftTokens, expected: SoftTokens) -> NDArray[np.float32]:
    """float32 [I]: how far the soft tokens ``seen`` of the first I images are from the expected ones (relative_rms)."""
    return floats(map(relative_rms, seen, expected[: len(seen)]))


def encode(model: Streamed, images: NDArray[np.uint8]) -> list[SoftTokens]:
    """The soft tokens of ``images`` [I, S, S, 3] in each variant: float32 [I, T, E], or [0, 0, 0] without images."""
    if len(images) == 0:
        return [np.zeros((0, 0, 0), np.float32) for _ in model.variants]
    pixels = torch.from_numpy(np.concatenate([network_input(image) for image in images]))
    return [one.numpy() for one in model.soft_tokens(pixels)]


def logits_along(
    model: Streamed, plan: Plan, end: int, soft_tokens: Sequence[SoftTokens]
) -> Iterator[tuple[int, list[Logits]]]:
    """The logits of each variant of ``model`` at the plan's positions below ``end``, after each position.

    ``soft_tokens`` [I, T, E] are those of each variant, of the images below ``end`` at least.
    """
    positions = [position for position in plan.positions if position < end]
    tokens = torch.tensor([plan.ids[:end]])
    numbers = list(plan.image_numbers[plan.images_between(0, end)])
    images = [torch.from_numpy(one[numbers])[None] for one in soft_tokens] if numbers else None
    hidden = model.hidden(tokens, images)
    for position, logits in zip(positions, model.logits([one[0, positions] for one in hidden]), strict=True):
        yield position, [one.numpy() for one in logits]


def eager_session(
    manifest: Manifest, artifact: Artifact, weights: QuantizedWeights, target: Target, name: str
) -> EagerSession:
    """The quantized eager model of ``artifact``, with its ``weights``. It rounds as its reference ``name`` does."""
    rounding = rounding_of(target, name, artifact.float_activations)
    model = quantized_model(manifest.model, weights, rounding)
    return EagerSession(model, cache_layout(manifest.model, "ring", manifest.context, manifest.chunk))
