"""How a .pte stores its KV caches: the shape of each buffer, and the way from there to [slots, K, D].

Full-attention layers store keys and values as ``llama.custom_sdpa`` reads them, slots before heads. Sliding-window
layers store them as XNNPACK's batched matrix products read them, one matrix per key/value head: Kᵀ [D, slots] for the
scores, V [slots, D] for the output. Both are written by ``llama.update_cache_with_indices``, which takes four axes and
writes along the second one. For Kᵀ the channels play the batch.
"""

from typing import Any

from numpy.typing import NDArray

from gemma3.cache import LayerCache
from gemma3.config import SLIDING

Shape = tuple[int, int, int, int]


def cache_shapes(layer: LayerCache) -> tuple[Shape, Shape]:
    """The shapes of the buffers for the keys and for the values of ``layer``."""
    if layer.kind != SLIDING:
        return layer.by_slot, layer.by_slot
    heads, dim = layer.num_key_value_heads, layer.head_dim
    return (heads * dim, layer.slots, 1, 1), (heads, layer.slots, 1, dim)


def by_position(layer: LayerCache, keys: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The buffers' contents by slot, [slots, K, D] each: views, so that what is written there is in the buffers."""
    if layer.kind != SLIDING or keys.shape == layer.by_slot:  # an older version's file has all its caches by slot
        return keys[0], values[0]
    heads, dim = layer.num_key_value_heads, layer.head_dim
    return keys.reshape(heads, dim, layer.slots).transpose(2, 0, 1), values[:, :, 0].transpose(1, 0, 2)
