"""Compares single steps of a .pte with steps of the reference that begin with a copy of the file's cache.

A file that multiplies in int8 and its reference drift apart once a value is rounded the other way, because the change
stays in the cache and makes more values round the other way. In a single step from the same cache there is no such
history. Unless one of the step's own values lies within float error of a rounding boundary, file and reference agree as
well as in float32. So these figures show whether anything else differs.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from statistics import mean, median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checks import Check
from export.executorch.target import PTE
from export.target import FLOAT, rounding_of
from gemma3.config import LayerSpec, ModelConfig
from gemma3.host.progress import Progress
from gemma3.model import LayerKV, attention_mask, rope_angles
from gemma3.model import Step as ModelStep
from quant.activations import Rounding
from quant.streamed import Streamed, Variant
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import FULL_VOCABULARY, Difference, Recorder, ReferenceLogits
from runtime_py.proof.limits import COST, KL_MAX, KL_MEAN, NOISE, PEAK_NOISE, judged, limits_of
from runtime_py.proof.plan import GOLDEN_NEAR, Plan, near
from runtime_py.proof.subject import Subject
from runtime_py.sessions.protocol import Call, Logits, calls
from runtime_py.sessions.pte import PteSession

log = logging.getLogger(__name__)

# The share of agreeing results may be lower than that of the reference in float64 by this factor, because a kernel's
# float error may be larger than the reference's, and by so many standard deviations of a mean over a few steps.
AGREEING, SPREAD = 0.5, 2.0
FEW = 3  # so many of the steps may turn a rounding where the reference in float64 turns none
# Keys and values agree if the root mean square of their difference is at most this share of theirs. Float errors are
# ten times smaller, the step of an int8 rounding ten times larger.
SAME = 2e-5


@dataclass(frozen=True)
class Step:
    """One step of the file, and of the reference in float64, both compared with the reference's from the same cache.

    ``file_layers`` and ``wide_layers`` say for each layer whether its new keys and values agree with the reference's.
    """

    file: Difference
    wide: Difference
    file_layers: tuple[bool, ...]
    wide_layers: tuple[bool, ...]


def check_single_steps(subject: Subject) -> list[Check]:
    """The checks of single steps of a .pte that rounds activations; no checks for another .pte.

    A step has results on the way: the new keys and values of each layer, and at the end the logits. Up to the first
    value that lies near a rounding boundary they must agree as in float32. How far that is, is measured on the
    reference itself, in float64. A fault that changes every step shows from the first layer it concerns, however far
    roundings carry further on. The steps past the window are also counted by themselves, because many faults show only
    there.

    A small model is compared after every id, a large one only around the plan's landmarks.
    """
    if not subject.rounds:
        return []
    plan, manifest = subject.plan, subject.manifest
    compared = set(range(len(plan.ids)))
    if manifest.model.vocab_size > FULL_VOCABULARY:
        compared = set(near(plan.landmarks.values(), GOLDEN_NEAR, len(plan.ids)))
    log.info("validating .%s from its own cache at %d positions", subject.format, len(compared))
    (name, reference), *_ = subject.references.items()
    session = PteSession(subject.path, subject.artifact.cache, manifest.model, None)
    fed = feed(session, plan, compared, reference.images)
    del session  # its memory is needed for the reference
    rounding = rounding_of(PTE, name, subject.artifact.float_activations)
    done = count(1)
    with closing(Progress(manifest.model.num_layers)) as progress:

        def report() -> None:
            progress.show(next(done), "layers of the single steps")

        found = steps(fed, manifest.model, subject.weights, rounding, report)
    agreement = limits_of(subject.exact, FLOAT, 1).max_abs
    assert agreement is not None
    mean_limit, max_limit = step_limits([step.wide.kl for step in found], reference)
    kl = [step.file.kl for step in found]
    title = f"one by one, each from the file's own cache ({len(kl)} positions)"
    checks = [
        judged(subject.format, "single-steps", title, *one)
        for one in (
            ("kl_mean", sum(kl) / len(kl), mean_limit),
            ("kl_median", median(kl), None),
            ("kl_max", float(np.max(kl)), max_limit),
            ("float_equal", *agreeing(found, agreement)),
        )
    ]
    past = [step for step in found if step.file.position >= manifest.model.sliding_window]
    if past:
        title = f"one by one, each from the file's own cache, past the window ({len(past)} positions)"
        checks.append(
            judged(subject.format, "single-steps/past-window", title, "float_equal", *agreeing(past, agreement))
        )
    return checks


def step_limits(wide: Sequence[float], reference: ReferenceLogits) -> tuple[float, float]:
    """The limits of the mean and the maximum KL divergence of single steps.

    They follow from ``wide``, that of the reference in float64 in the same steps. Where the reference's float error
    happened to turn no rounding, the file's may still turn a few.
    """
    one = COST * float(reference.cost_kl.max())
    noise = NOISE * sum(wide) / len(wide) + PEAK_NOISE * max(wide) / len(wide)
    return max(KL_MEAN, noise + FEW * one / len(wide)), max(KL_MAX, PEAK_NOISE * max(wide), one)


def agreeing(found: Sequence[Step], agreement: float) -> tuple[float, float]:
    """The share of results on which file and reference agree, over all steps, and the least to expect.

    Logits agree if none differs by more than ``agreement``.
    """
    file = [mean((*step.file_layers, step.file.max_abs <= agreement)) for step in found]
    wide = [mean((*step.wide_layers, step.wide.max_abs <= agreement)) for step in found]
    expected = mean(wide)
    deviation = math.sqrt(expected * (1 - expected) / len(found))
    return mean(file), max(0.0, AGREEING * (expected - SPREAD * deviation))


@dataclass(frozen=True)
class Fed:
    """What a file made of a plan's ids.

    ``calls`` are the compared ones, by the position of the last id, with the soft tokens that the file computed, and
    ``logits``, float32 [V], those after them. ``keys`` and ``values`` are what the cache of each layer got at every
    position of ``ids``, float32 [T, K, D].
    """

    ids: Sequence[int]
    calls: dict[int, Call]
    logits: dict[int, Logits]
    keys: list[NDArray[np.float32]]
    values: list[NDArray[np.float32]]


def feed(session: PteSession, plan: Plan, compared: Collection[int], images: NDArray[np.uint8] | tuple[()] = ()) -> Fed:
    """Feed ``plan`` to a new ``session``: the ids at the positions ``compared`` one at a time, others in chunks."""
    config = session.config
    rows = [(len(plan.ids), spec.num_key_value_heads, spec.head_dim) for spec in config.layers]
    keys, values = ([np.zeros(shape, np.float32) for shape in rows] for _ in range(2))
    fed = Fed(plan.ids, {}, {}, keys, values)
    to_feed = plan.images_to_feed([session.encode_image(image) for image in images])
    for call in joined(calls(session, plan.ids, to_feed, text_chunk=1), compared, session.chunk):
        logits = session.prefill(call.ids, () if call.image is None else (call.image,))
        positions = range(session.position - len(call.ids), session.position)
        for layer in range(config.num_layers):
            part = slice(positions.start, positions.stop)
            keys[layer][part], values[layer][part] = session.rows(layer, positions)
        if positions[-1] in compared:
            fed.calls[positions[-1]], fed.logits[positions[-1]] = call, logits
    return fed


def joined(single: Iterable[Call], compared: Collection[int], chunk: int) -> Iterator[Call]:
    """``single`` calls of one id or an image each, with neighbouring text joined up to ``chunk`` ids.

    A call that ends at a position ``compared`` stays as it is.
    """
    waiting: list[int] = []
    position = 0
    for call in single:
        position += len(call.ids)
        alone = call.image is not None or position - 1 in compared
        if waiting and (alone or len(waiting) == chunk):
            yield Call(waiting)
            waiting = []
        if alone:
            yield call
        else:
            waiting = [*waiting, *call.ids]
    if waiting:
        yield Call(waiting)


def steps(
    fed: Fed,
    config: ModelConfig,
    weights: QuantizedWeights,
    rounding: Rounding,
    report: Callable[[], None] = lambda: None,
) -> list[Step]:
    """The compared calls of ``fed``, each against the reference's from the same cache, in float32 and in float64.

    All of them go through the reference together. In each layer, the new positions of a call attend to what the file's
    cache got at the positions before the call, and to one another. ``report`` is called after each layer.
    """
    variants = (Variant(rounding=rounding), Variant(torch.float64, rounding))
    model = Streamed(config, weights, variants, report)
    length, added = len(fed.ids), sum(len(call.ids) for call in fed.calls.values())
    ends = torch.tensor(list(fed.calls))
    sizes = torch.tensor([len(call.ids) for call in fed.calls.values()])
    number = torch.arange(len(sizes)).repeat_interleave(sizes)  # of the call that each new position is in
    last = sizes.cumsum(0) - 1  # where each call's last position is among the new ones
    positions = torch.arange(added) - last[number] + ends[number]
    is_image = torch.tensor([call.image is not None for call in fed.calls.values()])[number]
    own = number[:, None] == number  # [S, S]: in the same call
    before = torch.arange(length) <= (ends - sizes)[number][:, None]  # [S, T]: before the call
    available = torch.cat((before, own), dim=1)
    together = torch.cat((torch.zeros_like(before), own & is_image[:, None]), dim=1)
    key_positions = torch.cat((torch.arange(length), positions))

    def step(spec: LayerSpec, dtype: torch.dtype) -> ModelStep:
        mask = attention_mask(positions, key_positions, spec.window, together) & available
        cos, sin = rope_angles(spec, positions)
        return ModelStep(cos.to(dtype), sin.to(dtype), mask, torch.arange(length, length + added))

    def cache(layer: int, dtype: torch.dtype) -> LayerKV:
        """What the file's cache got, with room for the new positions after it."""
        pair = (torch.from_numpy(one[layer]).to(dtype).transpose(0, 1) for one in (fed.keys, fed.values))
        return LayerKV(*(torch.nn.functional.pad(one, (0, 0, 0, added))[None] for one in pair))

    shared = {(spec, one.dtype): step(spec, one.dtype) for spec in dict.fromkeys(config.layers) for one in variants}
    tokens = torch.tensor([[token for call in fed.calls.values() for token in call.ids]])
    images = [call.image for call in fed.calls.values() if call.image is not None]
    given = [torch.from_numpy(np.stack(images))[None]] * len(variants) if images else None
    x = model.embed(tokens, given)
    agree: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the file and of float64, for each layer: bool [calls]
    for index, which, layer in model.layers():
        kv = cache(index, x[which].dtype)
        x[which] = layer(x[which], shared[config.layers[index], x[which].dtype], kv)
        rows = rows_at(kv, length + last)
        if which == 0:
            expected = rows
            agree[0].append(same(rows_at(kv, ends), rows))
        else:
            agree[1].append(same(rows, expected))
    file_layers, wide_layers = (torch.stack(one, dim=1).tolist() for one in agree)
    logits = model.logits(model.norm([one[0, last] for one in x]))
    found, recorder = [], Recorder(fed.ids, config.vocab_size)
    for index, (position, (narrow, wide)) in enumerate(zip(fed.calls, logits, strict=True)):
        reference = recorder.add(position, narrow.numpy())
        file, in_float64 = reference.compare(fed.logits[position]), reference.compare(wide.numpy())
        found.append(Step(file, in_float64, tuple(file_layers[index]), tuple(wide_layers[index])))
    return found


def rows_at(kv: LayerKV, slots: Tensor) -> Tensor:
    """The keys and values in ``slots`` [n] of a layer, float32 [n, 2 · K · D]."""
    return torch.cat([part[0, :, slots].transpose(0, 1).flatten(1) for part in (kv.keys, kv.values)], dim=1).float()


def same(found: Tensor, expected: Tensor) -> Tensor:
    """bool [n]: do the keys and values [n, 2 · K · D] agree (see SAME)?"""
    distance, size = (torch.linalg.vector_norm(one, dim=1) for one in (found - expected, expected))
    return distance <= SAME * size
