"""Going back in the caches, against caches played through slot by slot."""

import pytest

from gemma3.cache import CacheLayout, CacheStyle, LayerCache
from gemma3.config import FULL, SLIDING

LATER = -1  # what a slot holds that was written after the position to which the sequence goes back


class Ring:
    """As export/executorch/text.py: position p is in slot p mod slots, and the mask goes by the call's own end."""

    def __init__(self, slots: int) -> None:
        self._held = [LATER] * slots

    def feed(self, position: int, value: int, window: int) -> dict[int, int]:
        """Write ``value``. Returns what the query at ``position`` sees: position → value."""
        slots = len(self._held)
        self._held[position % slots] = value
        seen = {position - (position + slots - slot) % slots: held for slot, held in enumerate(self._held)}
        return {at: held for at, held in seen.items() if at >= 0 and at > position - window}


class Compacting:
    """As GroupQueryAttention: when the rows are full and another comes, all but the last window − 1 are dropped.

    How many rows are in use follows from the position. Rows that are not in use may hold anything.
    """

    def __init__(self, slots: int) -> None:
        self._held = [LATER] * slots

    def _resident(self, tokens: int, window: int) -> int:
        rows = 0
        for _ in range(tokens):
            if rows == len(self._held):
                rows = window - 1
            rows += 1
        return rows

    def feed(self, position: int, value: int, window: int) -> dict[int, int]:
        before, after = self._resident(position, window), self._resident(position + 1, window)
        if after <= before:
            self._held[: after - 1] = self._held[before + 1 - after : before]
        self._held[after - 1] = value
        self._held[after:] = [LATER] * (len(self._held) - after)
        seen = {position + 1 - after + row: self._held[row] for row in range(after)}
        return {at: held for at, held in seen.items() if at > position - window}


@pytest.mark.parametrize("style", ["ring", "compacting"])
@pytest.mark.parametrize(("window", "slots"), [(2, 2), (2, 5), (3, 3), (3, 5), (4, 9), (6, 6), (6, 7), (8, 24)])
def test_a_cache_can_be_rewound_exactly_where_it_still_serves(style: CacheStyle, window: int, slots: int) -> None:
    layers = LayerCache(SLIDING, slots, 1, 1), LayerCache(FULL, 1000, 1, 1)
    layout = CacheLayout(style, context=1000, chunk=1, layers=layers)
    for written in range(50):
        for position in range(written + 1):
            cache = Ring(slots) if style == "ring" else Compacting(slots)
            for at in range(written):
                cache.feed(at, at if at < position else LATER, window)
            serves = all(
                all(held == seen for seen, held in cache.feed(at, at, window).items())
                for at in range(position, position + 2 * slots)
            )
            assert layout.can_rewind(written, position, window) == serves, (written, position)


def test_a_cache_of_the_whole_context_can_always_be_rewound() -> None:
    for style in ("ring", "compacting"):
        layout = CacheLayout(
            style, context=9, chunk=2, layers=(LayerCache(SLIDING, 9, 1, 1), LayerCache(FULL, 9, 1, 1))
        )
        assert all(layout.can_rewind(9, position, 20) for position in range(10))
