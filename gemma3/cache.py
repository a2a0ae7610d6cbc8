"""The layout of the static KV caches, as data: every backend, the planner and the manifest read it here.

Sliding-window layers keep a bounded number of positions, however long the context is. Full-attention layers keep the
whole context. There are two styles, because the runtimes differ:

* ``ring``: position p is in slot p mod slots. A chunk of C tokens is written before its first query reads, so a
  window of W needs W + C − 1 slots (rounded up to 8); with fewer, the chunk's own writes would evict keys that its
  first queries still attend to.
* ``compacting``: ONNX Runtime's GroupQueryAttention with ``sliding_window_cache``: rows stay in order, and the live
  ones move to the front when the buffer is full. It reads the old rows before it drops them, so W + slack rows are
  enough for any chunk.

An int8 cache holds codes. The graph has their scales, a float32 for each channel of a head, of keys and of values.
"""

from dataclasses import dataclass
from typing import Literal

from gemma3.config import SLIDING, LayerKind, ModelConfig
from gemma3.errors import BadInput, DoesNotFit

CacheStyle = Literal["ring", "compacting"]
CacheDtype = Literal["float32", "int8"]
BYTES: dict[CacheDtype, int] = {"float32": 4, "int8": 1}
# What an export uses when nothing else is asked for: positions in the caches, and tokens in one prefill call.
DEFAULT_CONTEXT, DEFAULT_CHUNK = 4096, 128
# Rows beyond the window in a compacting cache. More rows mean fewer moves of the window to the front, but every
# step reads half of them on average. Milliseconds per token in 15 layers (W = 512, one KV head, D = 256, one thread):
# 0 rows 1.97, 8 rows 1.84, 16 rows 1.86, 32 rows 1.94, 64 rows 1.93, 128 rows 2.06, 256 rows 2.26.
COMPACTING_SLACK = 16


@dataclass(frozen=True)
class LayerCache:
    """One layer's share: keys and values of ``slots`` positions, num_key_value_heads × head_dim numbers for each."""

    kind: LayerKind
    slots: int
    num_key_value_heads: int
    head_dim: int

    @property
    def by_head(self) -> tuple[int, int, int, int]:
        """The shape [1, K, slots, D] of the keys, and of the values, with the heads before the slots."""
        return 1, self.num_key_value_heads, self.slots, self.head_dim

    @property
    def by_slot(self) -> tuple[int, int, int, int]:
        """The shape [1, slots, K, D] of the keys, and of the values, with the slots before the heads."""
        return 1, self.slots, self.num_key_value_heads, self.head_dim


@dataclass(frozen=True)
class CacheLayout:
    """Keys and values of every layer, in ``dtype``."""

    style: CacheStyle
    context: int
    chunk: int
    layers: tuple[LayerCache, ...]
    dtype: CacheDtype = "float32"

    def layer_bytes(self, index: int) -> int:
        """Bytes of the keys and the values of one layer, and of the scales of int8 ones."""
        layer = self.layers[index]
        scales = BYTES["float32"] if self.dtype == "int8" else 0  # for each channel
        return 2 * layer.num_key_value_heads * layer.head_dim * (layer.slots * BYTES[self.dtype] + scales)

    @property
    def total_bytes(self) -> int:
        return sum(self.layer_bytes(index) for index in range(len(self.layers)))

    def can_rewind(self, written: int, position: int, window: int) -> bool:
        """Can a sequence go on at ``position`` after the positions before ``written`` have been in the caches?

        Then a call at ``position`` gives the logits that it would give had nothing after it ever been fed. ``window``
        is the model's sliding window: the query at p attends to p and the window − 1 positions before it.

        * In a ring, position p keeps its slot until p + slots is written, so that one must not have been written for
          the first position of the window. A slot that still holds a later position counts as one whole ring earlier,
          which by the same condition is before the window.
        * In a compacting cache, a call derives from its position alone which position is in the first row. So that one
          must be the same for ``written`` and ``position``.

        A sequence that begins anew, at 0, reads nothing of what was there.
        """
        if position == 0:
            return True
        slots = {layer.slots for layer in self.layers if layer.kind == SLIDING}
        if self.style == "ring":
            return all(max(0, position - window + 1) + count >= written for count in slots)
        return all(first_row(count, written, window) == first_row(count, position, window) for count in slots)


def first_row(slots: int, end: int, window: int) -> int:
    """The position in the first row of a compacting cache of ``slots`` rows once ``end`` positions are fed.

    When the rows are full and another one comes, the slots − window + 1 oldest ones are dropped at once.
    """
    dropped = slots - min(window, slots) + 1
    return -(-max(0, end - slots) // dropped) * dropped


def cache_layout(
    config: ModelConfig, style: CacheStyle, context: int, chunk: int, dtype: CacheDtype = "float32"
) -> CacheLayout:
    """The layout for at most ``context`` positions, which are fed in chunks of at most ``chunk`` tokens.

    A window longer than the context is clamped to it: such a layer holds the whole context. Raises DoesNotFit when the
    context is larger than the model's, and BadInput when it is below 1 or the chunk is not within it.
    """
    if context < 1:
        raise BadInput(f"context {context} holds no text; use --context 1 or more")
    if context > config.max_position_embeddings:
        raise DoesNotFit(
            f"context {context} is larger than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; use --context {config.max_position_embeddings} or less"
        )
    if not 1 <= chunk <= context:
        raise BadInput(
            f"chunk {chunk} is not between 1 and the context {context}; use --chunk {min(DEFAULT_CHUNK, context)}"
        )

    def slots(window: int | None) -> int:
        if window is None:
            return context
        # A buffer as long as the context never wraps, so no layer needs more slots than that.
        return min((window + chunk - 1 + 7) // 8 * 8 if style == "ring" else window + COMPACTING_SLACK, context)

    return CacheLayout(
        style=style,
        context=context,
        chunk=chunk,
        layers=tuple(
            LayerCache(spec.kind, slots(spec.window), spec.num_key_value_heads, spec.head_dim) for spec in config.layers
        ),
        dtype=dtype,
    )
