"""The way from the buffers of a .pte to keys and values by slot, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.executorch.caches import by_position, cache_shapes
from gemma3.cache import LayerCache
from gemma3.config import FULL, SLIDING, LayerKind


@pytest.mark.parametrize("kind", [SLIDING, FULL])
@given(slots=st.integers(1, 9), heads=st.integers(1, 4), dim=st.integers(1, 6), seed=st.integers(0, 99))
def test_what_was_written_is_read(kind: LayerKind, slots: int, heads: int, dim: int, seed: int) -> None:
    layer = LayerCache(kind, slots, heads, dim)
    written = np.random.default_rng(seed).standard_normal((2, slots, heads, dim))
    buffers = [np.zeros(shape) for shape in cache_shapes(layer)]
    for slot, head, channel in np.ndindex(slots, heads, dim):
        keys, values = written[:, slot, head, channel]
        if kind == SLIDING:
            buffers[0][head * dim + channel, slot, 0, 0] = keys
            buffers[1][head, slot, 0, channel] = values
        else:
            buffers[0][0, slot, head, channel], buffers[1][0, slot, head, channel] = keys, values
    for view, buffer, expected in zip(by_position(layer, *buffers), buffers, written, strict=True):
        assert np.array_equal(view, expected)
        view[:] = 0
        assert not buffer.any()


def test_caches_of_older_files_are_by_slot() -> None:
    layer = LayerCache(SLIDING, 3, 2, 4)
    keys, values = np.random.default_rng(0).standard_normal((2, *layer.by_slot))
    views = by_position(layer, keys, values)
    assert np.array_equal(views[0], keys[0])
    assert np.array_equal(views[1], values[0])
