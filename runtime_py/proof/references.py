"""Computes fresh references: the logits of each artifact's quantized eager model along a plan.

All references of artifacts with the same weights are computed together, layer by layer (quant/streamed.py): in float32,
in float64, with each rounding, and with changed inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
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

DRAWS = 4  # how many times the noise of a small model is measured, with other changes each time


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

    With an int8 KV cache all of them round keys and values, and FLOAT has the cost of that rounding, and noise. The
    references of the keys ``noisy`` have their noise too. It is the distance between the reference and the same model
    after the inputs of the text model and of the vision model's layers are randomly changed by one unit in the last
    place. A small model has few values near a rounding boundary, and one draw may miss them all, so its noise is the
    largest of several draws.
    """
    # Each variant but the first is compared with its origin.
    variants, origins = [Variant(), Variant(torch.float64)], {1: 0}
    numbers = {FLOAT: 0}
    draws: dict[str, range] = {}

    def add(key: str, variant: Variant, noisy: bool) -> None:
        numbers[key], origins[len(variants)] = len(variants), numbers[FLOAT]
        first = len(variants) + 1
        draws[key] = range(first, first + noisy * (DRAWS if config.vocab_size <= FULL_VOCABULARY else 1))
        origins.update(dict.fromkeys(draws[key], first - 1))
        variants.extend((variant, *(replace(variant, nudge=seed) for seed in range(len(draws[key])))))

    if weights.kv:
        add(FLOAT, Variant(round_heads=True), noisy=True)
    for key, rounding in (roundings or {}).items():
        add(key, Variant(rounding=rounding, round_heads=bool(weights.kv)), key in noisy)

    layers = config.num_layers + (0 if config.vision is None else config.vision.num_hidden_layers)
    done = count(1)
    with closing(Progress(layers + 1)) as progress:  # the head is the last one
        model = Streamed(config, weights, variants, lambda: progress.show(next(done), "layers of the reference"))
        soft_tokens = encode(model, images)
        changes = {
            number: [relative_rms(*pair) for pair in zip(soft_tokens[number], soft_tokens[origin], strict=True)]
            for number, origin in origins.items()
        }
        recorded = {*numbers.values(), *origins.values()}
        recorders = {number: Recorder(plan.ids, config.vocab_size) for number in sorted(recorded)}
        differences: dict[int, list[Difference]] = {number: [] for number in origins}
        for position, logits in zip(plan.positions, logits_along(model, plan, soft_tokens), strict=True):
            rows = {number: recorder.add(position, logits[number]) for number, recorder in recorders.items()}
            for number, origin in origins.items():
                differences[number].append(rows[origin].compare(logits[number]))

    kl = {number: np.asarray([one.kl for one in found], np.float32) for number, found in differences.items()}
    found = {key: recorders[number].reference(images, soft_tokens[number]) for key, number in numbers.items()}
    error = np.asarray([one.max_abs for one in differences[1]], np.float32)
    found[FLOAT] = replace(found[FLOAT], float_error=error, soft_noise=np.asarray(changes[1], np.float32))
    for key, tries in draws.items():
        number = numbers[key]
        found[key] = replace(found[key], cost_kl=kl[number], soft_cost=np.asarray(changes[number], np.float32))
        if tries:
            noise = max((kl[one] for one in tries), key=lambda one: float(one.sum()))
            soft_noise = np.asarray([change for one in tries for change in changes[one]], np.float32)
            # The vision model rounds nothing for the cache, so that FLOAT's distance in float64 counts as well.
            soft_noise = np.concatenate((found[key].soft_noise, soft_noise)) if key == FLOAT else soft_noise
            found[key] = replace(found[key], noise_kl=noise, soft_noise=soft_noise)
    return found


def encode(model: Streamed, images: NDArray[np.uint8]) -> list[SoftTokens]:
    """The soft tokens of ``images`` [I, S, S, 3] in each variant: float32 [I, T, E], or [0, 0, 0] without images."""
    if len(images) == 0:
        return [np.zeros((0, 0, 0), np.float32) for _ in model.variants]
    pixels = torch.from_numpy(np.concatenate([network_input(image) for image in images]))
    return [one.numpy() for one in model.soft_tokens(pixels)]


def logits_along(model: Streamed, plan: Plan, soft_tokens: Sequence[SoftTokens]) -> Iterator[list[Logits]]:
    """The logits of each variant of ``model`` at one of the plan's positions after the other.

    ``soft_tokens`` [I, T, E] are those of each variant.
    """
    tokens = torch.tensor([plan.ids])
    numbers = list(plan.image_numbers)
    images = [torch.from_numpy(one[numbers])[None] for one in soft_tokens] if numbers else None
    hidden = model.hidden(tokens, images)
    for logits in model.logits([one[0, list(plan.positions)] for one in hidden]):
        yield [one.numpy() for one in logits]


def eager_session(
    manifest: Manifest, artifact: Artifact, weights: QuantizedWeights, target: Target, name: str
) -> EagerSession:
    """The quantized eager model of ``artifact``, with its ``weights``. It rounds as its reference ``name`` does."""
    rounding = rounding_of(target, name, artifact.float_activations)
    model = quantized_model(manifest.model, weights, rounding)
    return EagerSession(model, cache_layout(manifest.model, "ring", manifest.context, manifest.chunk))
