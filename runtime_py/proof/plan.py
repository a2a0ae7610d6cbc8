"""The plan of a proof: what is fed to a model, and at which positions its logits are compared.

One token sequence is fed in several ways ("walks"), each after a reset. It crosses the sliding window W (W − 1, W,
W + 1, 2W) and several wraps of the bounded caches. For a multimodal model it contains images: one at the start, one
across each of the chunk, the window and the wraps, two in a row, and one past every wrap. A file gives logits after an
image, but never inside one.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest
from gemma3.cache import CacheLayout
from gemma3.config import SLIDING, VisionConfig
from gemma3.images import Pixels
from runtime_py.sessions.protocol import Image, SoftTokens

# The length of the sequence: so many windows past the first wrap of the larger bounded cache, and so many turns of that
# cache, and for a multimodal model so many images more, but never more than the context. If the larger numbers ask for
# more than STEP_EVERYTHING positions, these must do, or what the smaller numbers ask for. A fault that grows with the
# distance between positions, such as a wrong RoPE base, shows more in a longer sequence.
WINDOWS_PAST_THE_WRAP, TURNS, MORE_IMAGES = (1, 4), (2, 3), (2, 4)
# The walk ONE_BY_ONE feeds every id of a sequence up to this length by itself. In a longer sequence it does so only for
# the ids at most NEAR positions from a landmark, and feeds the ids between them in chunks.
STEP_EVERYTHING = 1024
NEAR = 16
# What does not depend on the depth takes at most so many of the sequence's first positions: a reference's noise and
# float error, and the walk that is repeated after a reset.
MEASURED = 1024
# Golden vectors keep the positions at most this far from a landmark.
GOLDEN_NEAR = 1
TAIL = 8  # positions decoded one by one after the whole prompt
SEED = 20_250_312
# Two images are enough to reveal a mix-up. Each more would cost a run of the vision model and an image's bytes. They
# repeat in this order. Its first n entries, for n ≥ 3, do not read the same backwards, which reveals a reversed order.
IMAGES = 2
ORDER = (0, 0, 1, 0, 1, 1)

ODD_SIZES, ONE_BY_ONE, CHUNKS, WHOLE_PROMPT = "odd-sizes", "one-by-one", "chunks", "whole-prompt"


@dataclass(frozen=True)
class Plan:
    """What is fed, and where the logits are compared.

    ``walks``: by id, the length of each call's ids, in order. ``landmarks``: by id, a position. ``image_places``: the
    position of each image's first soft token. ``image_numbers``: which of the golden images is at each place.
    """

    ids: tuple[int, ...]
    walks: dict[str, tuple[int, ...]]
    landmarks: dict[str, int]
    image_places: tuple[int, ...] = ()
    image_numbers: tuple[int, ...] = ()

    @property
    def positions(self) -> list[int]:
        """Every position at which some walk gives logits: the last one of each call."""
        return sorted({end for lengths in self.walks.values() for end in ends(lengths)})

    @property
    def golden_positions(self) -> list[int]:
        """The positions around the landmarks, and those at which the walks other than ONE_BY_ONE give logits."""
        found = {end for walk, lengths in self.walks.items() if walk != ONE_BY_ONE for end in ends(lengths)}
        return sorted(found.union(near(self.landmarks.values(), GOLDEN_NEAR, len(self.ids))))

    def measured(self, soft_tokens: int) -> int:
        """How many of the first positions serve to measure what limits follow from. They end before or after an image.

        An image has ``soft_tokens`` of them.
        """
        end = min(MEASURED, len(self.ids))
        return next((place for place in self.image_places if place < end < place + soft_tokens), end)

    def images_between(self, start: int, end: int) -> slice:
        """The slice of ``image_places`` that lies in the positions ``start`` … ``end`` − 1."""
        return slice(bisect_left(self.image_places, start), bisect_left(self.image_places, end))

    def images_to_feed(self, soft_tokens: Sequence[SoftTokens], pixels: Sequence[Pixels] = ()) -> list[Image]:
        """What to feed at each place: the image's soft tokens, or at its first place its ``pixels``, if given."""
        numbers = self.image_numbers
        return [
            pixels[number] if len(pixels) and number not in numbers[:index] else soft_tokens[number]
            for index, number in enumerate(numbers)
        ]


def make_plan(manifest: Manifest, longer: bool = False) -> Plan:
    """The plan for a bundle. It depends only on the model's configuration, the cache layouts, context and chunk.

    With ``longer`` no sequence is cut, as in bundles up to version 0.4.0, which are still replayed.
    """
    layouts = [artifact.cache for artifact in manifest.artifacts.values()]
    window, chunk, vision = manifest.model.sliding_window, manifest.chunk, manifest.model.vision
    wraps = sorted({local_slots(layout) for layout in layouts})
    soft_tokens = 0 if vision is None else vision.tokens_per_image
    least, most = (
        max(wraps[-1] + windows * window, turns * wraps[-1] + NEAR) + more * soft_tokens
        for windows, turns, more in zip(WINDOWS_PAST_THE_WRAP, TURNS, MORE_IMAGES, strict=True)
    )
    length = min(manifest.context, most if longer else max(least, min(most, STEP_EVERYTHING)))
    landmarks = {"first": 0, "chunk-end": chunk - 1, "W-1": window - 1, "W": window, "W+1": window + 1}
    landmarks |= {f"{count}W": count * window for count in range(2, WINDOWS_PAST_THE_WRAP[-1] + 1)}
    for slots in wraps:
        landmarks |= {f"wrap-{turn}-of-{slots}-slots": turn * slots for turn in range(1, TURNS[-1] + 1)}
    landmarks["last"] = length - 1
    places: list[int] = []
    if vision is not None:
        places = image_places(soft_tokens, [chunk, window, *wraps], length)
        landmarks |= {f"image-{number + 1}": place + soft_tokens - 1 for number, place in enumerate(places)}
    landmarks = {name: position for name, position in landmarks.items() if position < length}
    stepped = range(length) if length <= STEP_EVERYTHING else near(landmarks.values(), NEAR, length)
    odd = itertools.cycle((1, 2, 3, 5, 7, 11, 13, 1, chunk, max(1, chunk - 1), chunk + 1, 2 * chunk + 3))
    tail = min(TAIL, length - 1)
    walks = {
        ODD_SIZES: _fill(odd, length),
        ONE_BY_ONE: _lengths_to(stepped, length),
        CHUNKS: _fill(itertools.repeat(chunk), length),
        WHOLE_PROMPT: (length - tail, *[1] * tail),
    }
    return Plan(
        ids=tuple(probe_ids(manifest, length, places)),
        walks={walk: _images_whole(lengths, places, soft_tokens) for walk, lengths in walks.items()},
        landmarks=landmarks,
        image_places=tuple(places),
        image_numbers=tuple(itertools.islice(itertools.cycle(ORDER), len(places))),
    )


def plan_images(manifest: Manifest) -> NDArray[np.uint8]:
    """The images of the plan for a bundle, [IMAGES, S, S, 3]; [0, 0, 0, 3] for a text-only model."""
    vision = manifest.model.vision
    return np.zeros((0, 0, 0, 3), np.uint8) if vision is None else probe_images(vision)


def local_slots(layout: CacheLayout) -> int:
    """The slots of the sliding-window layers' caches, or the context if there are no such layers."""
    return min((layer.slots for layer in layout.layers if layer.kind == SLIDING), default=layout.context)


def image_places(soft_tokens: int, across: Iterable[int], length: int) -> list[int]:
    """The first position of each image in a sequence of ``length`` positions. An image stands between two markers.

    The first image follows BOS and its marker. Then one lies across each of the positions ``across`` in the first half
    that no image covers yet, two follow one another in the middle, and one is near the end. Images for which there is
    no room are left out.
    """
    places: list[int] = []

    def place(start: int) -> None:
        start = max(start, places[-1] + soft_tokens + 2 if places else 2)
        if start + soft_tokens + 1 + TAIL <= length:
            places.append(start)

    place(2)
    middle = length // 2
    for position in sorted(position for position in across if position < middle):
        if not any(place <= position < place + soft_tokens for place in places):
            place(position - soft_tokens // 2)
    place(middle)
    place(middle)
    place(length - soft_tokens - 1 - 2 * TAIL)
    return places


def probe_ids(manifest: Manifest, length: int, places: Sequence[int] = ()) -> list[int]:
    """The ids of the sequence: BOS, then random ids, with images at ``places``.

    The ids are drawn uniformly from the whole vocabulary, so that every row of the table may occur. Text would hide
    faults: on the demo checkpoint a window that is off by one costs a mean KL divergence of 2.8e-3 over these ids, but
    2.7e-4 over held-out text, which is within the noise of int8 activations.
    """
    random = np.random.default_rng(SEED)
    ids = [manifest.tokenizer.bos_id, *random.integers(manifest.model.vocab_size, size=length - 1).tolist()]
    vision = manifest.model.vision
    if vision is None:
        return ids
    ids = [manifest.tokenizer.bos_id if token == vision.image_token_id else token for token in ids]
    for place in places:
        end = place + vision.tokens_per_image
        ids[place - 1 : end + 1] = [
            vision.begin_image_token_id,
            *[vision.image_token_id] * vision.tokens_per_image,
            vision.end_image_token_id,
        ]
    return ids


def probe_images(vision: VisionConfig) -> NDArray[np.uint8]:
    """uint8 [IMAGES, S, S, 3]: the average of three random colours, one per soft token's square, per patch, per pixel.

    Random pixels alone would not do. Averaged over a square they all look alike, which would hide a mix-up of soft
    tokens.
    """
    random = np.random.default_rng(SEED)
    size = vision.image_size
    total = np.zeros((IMAGES, size, size, 3))
    cells = (math.isqrt(vision.tokens_per_image), vision.patches_per_side, size)
    for count in cells:
        colours = random.integers(256, size=(IMAGES, count, count, 3))
        total += colours.repeat(size // count, axis=1).repeat(size // count, axis=2)
    return (total / len(cells)).astype(np.uint8)


def near(landmarks: Iterable[int], distance: int, length: int) -> list[int]:
    """The positions in a sequence of ``length`` that are at most ``distance`` from a landmark, in order."""
    around = {mark + offset for mark in landmarks for offset in range(-distance, distance + 1)}
    return sorted(position for position in around if 0 <= position < length)


def _images_whole(lengths: Iterable[int], places: Iterable[int], soft_tokens: int) -> tuple[int, ...]:
    """``lengths`` of calls, where each cut inside an image is moved to the end of the image."""
    cuts = set(itertools.accumulate(lengths))
    for place in places:
        inside = set(range(place + 1, place + soft_tokens)) & cuts
        if inside:
            cuts = cuts - inside | {place + soft_tokens}
    return tuple(after - before for before, after in itertools.pairwise([0, *sorted(cuts)]))


def ends(lengths: Iterable[int]) -> list[int]:
    """The position of the last id of each call."""
    return [end - 1 for end in itertools.accumulate(lengths)]


def beginning(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """The first of ``lengths``, as many as add up to ``most`` or less, but at least one."""
    return tuple(lengths[: max(1, sum(end <= most for end in itertools.accumulate(lengths)))])


def _lengths_to(positions: Iterable[int], length: int) -> tuple[int, ...]:
    """Lengths of calls that end at each of ``positions``, and at the end of the sequence."""
    cuts = [0, *(position + 1 for position in positions)]
    if cuts[-1] != length:
        cuts.append(length)
    return tuple(after - before for before, after in itertools.pairwise(cuts))


def _fill(sizes: Iterable[int], length: int) -> tuple[int, ...]:
    """As many of ``sizes`` as add up to ``length``, with the last one shortened."""
    lengths: list[int] = []
    for size in sizes:
        lengths.append(min(size, length - sum(lengths)))
        if sum(lengths) == length:
            break
    return tuple(lengths)
