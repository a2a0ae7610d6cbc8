"""What validation feeds to a model, and where it looks.

One token sequence is fed in several ways ("walks"). It crosses the sliding window W (W − 1, W, W + 1, 2W) and several
wraps of the bounded caches. For a model that sees it holds images: first, across the chunk, the window and the wraps,
two in a row, and past every wrap; what a file computes is known after an image, never inside one.
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
from runtime_py.session import Image, SoftTokens

# How far the sequence goes: this many windows past the first wrap of the larger bounded cache, and over this many
# turns of it; never over the context.
WINDOWS_PAST_THE_WRAP = 4
TURNS = 3
# Up to here every position is stepped over one by one; a longer sequence is fed in chunks up to NEAR positions
# before a landmark and stepped over it.
STEP_EVERYTHING = 1024
NEAR = 16
# Golden vectors keep the positions this near to a landmark.
GOLDEN_NEAR = 1
TAIL = 8  # decoded one by one after the whole prompt
SEED = 20_250_312
# Two images tell a mix-up; more would cost an encoder's run and a picture's bytes each. In this order, again and again:
# the first three and more are another sequence when they are reversed.
IMAGES = 2
ORDER = (0, 0, 1, 0, 1, 1)
MORE_FOR_IMAGES = 4  # so many images longer is the sequence of a model that sees

ONE_BY_ONE = "one by one"


@dataclass(frozen=True)
class Plan:
    """What is fed and where it is looked at."""

    ids: tuple[int, ...]
    landmarks: dict[str, int]  # name → position
    walks: dict[str, tuple[int, ...]]  # name → lengths of the pieces, in order
    images: NDArray[np.uint8]  # [IMAGES, S, S, 3], shown in ORDER; [0, 0, 0, 3]: text only
    places: tuple[int, ...] = ()  # the position of each image's first soft token

    @property
    def positions(self) -> list[int]:
        """Every position whose logits some walk shows: the last of each piece."""
        return sorted({end for pieces in self.walks.values() for end in _ends(pieces)})

    @property
    def golden_positions(self) -> list[int]:
        """Around the landmarks, and whatever the walks in larger pieces show."""
        pieces = {end for name, walk in self.walks.items() if name != ONE_BY_ONE for end in _ends(walk)}
        return sorted(pieces.union(near(self.landmarks.values(), GOLDEN_NEAR, len(self.ids))))

    def places_in(self, start: int, end: int) -> slice:
        """Those of the places from position ``start`` to before ``end``."""
        return slice(bisect_left(self.places, start), bisect_left(self.places, end))

    def shown_images(self, soft_tokens: Sequence[SoftTokens], as_pixels: bool = False) -> list[Image]:
        """What is at each place: ``soft_tokens`` of one of ``images``, or, the first time, its pixels."""
        numbers = list(itertools.islice(itertools.cycle(ORDER), len(self.places)))
        return [
            self.images[number] if as_pixels and number not in numbers[:index] else soft_tokens[number]
            for index, number in enumerate(numbers)
        ]


def make_plan(manifest: Manifest) -> Plan:
    """The plan for a bundle depends on its configuration, cache layouts, context and chunk alone."""
    layouts = [artifact.cache for artifact in manifest.artifacts.values()]
    window, chunk, vision = manifest.model.sliding_window, manifest.chunk, manifest.model.vision
    wraps = sorted({local_slots(layout) for layout in layouts})
    past_the_wrap = wraps[-1] + WINDOWS_PAST_THE_WRAP * window
    length = max(past_the_wrap, TURNS * wraps[-1] + NEAR)
    if vision is not None:
        length += MORE_FOR_IMAGES * vision.tokens_per_image
    length = min(manifest.context, length)
    landmarks = {"first": 0, "chunk end": chunk - 1, "W−1": window - 1, "W": window, "W+1": window + 1}
    landmarks |= {f"{count}W": count * window for count in range(2, WINDOWS_PAST_THE_WRAP + 1)}
    for slots in wraps:
        landmarks |= {f"wrap {turn} of {slots} slots": turn * slots for turn in range(1, TURNS + 1)}
    landmarks["last"] = length - 1
    places, soft_tokens = [], 0
    if vision is not None:
        soft_tokens = vision.tokens_per_image
        places = image_places(soft_tokens, [chunk, window, *wraps], length)
        landmarks |= {f"image {number + 1}": place + soft_tokens - 1 for number, place in enumerate(places)}
    landmarks = {name: position for name, position in landmarks.items() if position < length}
    stepped = range(length) if length <= STEP_EVERYTHING else near(landmarks.values(), NEAR, length)
    odd = itertools.cycle((1, 2, 3, 5, 7, 11, 13, 1, chunk, max(1, chunk - 1), chunk + 1, 2 * chunk + 3))
    tail = min(TAIL, length - 1)
    walks = {
        "odd sizes": _fill(odd, length),
        ONE_BY_ONE: _pieces_ending_at(stepped, length),
        "chunks": _fill(itertools.repeat(chunk), length),
        "whole prompt": (length - tail, *[1] * tail),
    }
    return Plan(
        ids=tuple(probe_ids(manifest, length, places)),
        landmarks=landmarks,
        walks={name: _images_whole(pieces, places, soft_tokens) for name, pieces in walks.items()},
        images=np.zeros((0, 0, 0, 3), np.uint8) if vision is None else probe_images(vision),
        places=tuple(places),
    )


def local_slots(layout: CacheLayout) -> int:
    """Slots of the sliding layers' cache (the context where there are none)."""
    return min((layer.slots for layer in layout.layers if layer.kind == SLIDING), default=layout.context)


def image_places(soft_tokens: int, across: Iterable[int], length: int) -> list[int]:
    """Where images of ``soft_tokens`` begin in a sequence of ``length`` positions, each between its two marks.

    The first comes after BOS and its mark. Then one lies across each of the positions ``across`` that none does yet,
    two follow one another in the middle, and one is near the end. What has no room is left out.
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
    """BOS, then ids drawn evenly from the whole vocabulary: every row of the table may come up. Images at ``places``.

    Text hides faults. On the demo checkpoint a window off by one costs a mean KL divergence of 2.8e-3 over these ids
    and 2.7e-4 over held-out text, which is within the noise of int8 activations.
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
    """[IMAGES, S, S, 3]: colours drawn for each soft token's square, for each patch and for each pixel, averaged.

    Plain noise would not do: averaged over a square all of it looks alike, and a mix-up of soft tokens would not show.
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
    around = {mark + offset for mark in landmarks for offset in range(-distance, distance + 1)}
    return sorted(position for position in around if 0 <= position < length)


def _images_whole(pieces: Iterable[int], places: Iterable[int], soft_tokens: int) -> tuple[int, ...]:
    """``pieces`` with each cut that would be inside an image moved to its end."""
    cuts = set(itertools.accumulate(pieces))
    for place in places:
        inside = set(range(place + 1, place + soft_tokens)) & cuts
        if inside:
            cuts = cuts - inside | {place + soft_tokens}
    return tuple(after - before for before, after in itertools.pairwise([0, *sorted(cuts)]))


def _ends(pieces: Iterable[int]) -> list[int]:
    return [end - 1 for end in itertools.accumulate(pieces)]


def _pieces_ending_at(positions: Iterable[int], length: int) -> tuple[int, ...]:
    ends = [0, *(position + 1 for position in positions)]
    if ends[-1] != length:
        ends.append(length)
    return tuple(after - before for before, after in itertools.pairwise(ends))


def _fill(sizes: Iterable[int], length: int) -> tuple[int, ...]:
    pieces: list[int] = []
    for size in sizes:
        pieces.append(min(size, length - sum(pieces)))
        if sum(pieces) == length:
            break
    return tuple(pieces)
