"""The layout of the static KV caches, as data: every backend, the planner and the manifest read it here.

Sliding-window layers keep a bounded number of positions whatever the context; full-attention layers keep
the whole context. Two styles exist because two runtimes do:

* ``ring``: position p lives in slot p mod slots. A chunk of C tokens is written before its first query
  reads, so a window of W needs W + C − 1 slots (rounded up to 8); with fewer, the chunk's own writes would
  evict keys that its first queries still see.
* ``compacting``: ONNX Runtime's GroupQueryAttention with ``sliding_window_cache``: rows stay in order and the
  live ones move to the front when the buffer is full; it reads the old rows before it drops them, so
  W + slack rows do for any chunk.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma3.config import SLIDING, LayerKind, ModelConfig
from gemma3.errors import BadInput, DoesNotFit

CacheStyle = Literal["ring", "compacting"]
# Rows beyond the window in a compacting cache. More rows mean fewer moves of the window to the front, but every
# step reads half of them on average. Milliseconds a token in 15 layers of W = 512, one KV head of 256 (one thread):
# 0 rows 1.97, 8 1.84, 16 1.86, 32 1.94, 64 1.93, 128 2.06, 256 2.26.
COMPACTING_SLACK = 16


@dataclass(frozen=True)
class LayerCache:
    """One layer's share: ``slots`` positions of keys and as many of values."""

    kind: LayerKind
    slots: int


@dataclass(frozen=True)
class CacheLayout:
    """Keys and values of each layer: [num_key_value_heads × slots × head_dim] of float32 each."""

    style: CacheStyle
    context: int
    chunk: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerCache, ...]
    dtype: Literal["float32"] = "float32"

    def layer_bytes(self, index: int) -> int:
        return 2 * self.num_key_value_heads * self.layers[index].slots * self.head_dim * 4

    @property
    def total_bytes(self) -> int:
        return sum(self.layer_bytes(index) for index in range(len(self.layers)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "CacheLayout":
        fields = dict(data)
        fields["layers"] = tuple(LayerCache(**layer) for layer in fields["layers"])
        return CacheLayout(**fields)


def cache_layout(config: ModelConfig, style: CacheStyle, context: int, chunk: int) -> CacheLayout:
    """The layout for at most ``context`` positions fed in chunks of at most ``chunk`` tokens.

    Raises DoesNotFit when the context is larger than the model's or not larger than the sliding window, and
    BadInput when the chunk is not within the context.
    """
    window = config.sliding_window
    if context > config.max_position_embeddings:
        raise DoesNotFit(
            f"context {context} is larger than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; use --context {config.max_position_embeddings} or less"
        )
    if SLIDING in config.layer_types and context < window:
        raise DoesNotFit(
            f"context {context} is smaller than the sliding window {window}; use --context {window} or more"
        )
    if not 1 <= chunk <= context:
        raise BadInput(f"chunk {chunk} is not between 1 and the context {context}; use --chunk {min(128, context)}")
    if style == "ring":
        # A ring as long as the context needs no wrap at all.
        local = min((window + chunk - 1 + 7) // 8 * 8, context)
    else:
        local = min(window + COMPACTING_SLACK, context)
    return CacheLayout(
        style=style,
        context=context,
        chunk=chunk,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=tuple(LayerCache(kind, local if kind == SLIDING else context) for kind in config.layer_types),
    )
