"""Gemma 3 in plain PyTorch, to be read top to bottom. gemma3/vision.py is the vision model.

Shapes: B batch, S new tokens, T key positions, H query heads, K key/value heads, D head dim, E hidden size, F MLP
size, V vocabulary. Parameter names are the checkpoint's, so that loading renames nothing.

The reference precision is float32. The embedding scale is sqrt(E) in float32; a bfloat16 run would round it.
Sources: the Gemma 3 report (arXiv 2503.19786); equality with transformers is tested in tests/gemma3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3.cache import CacheLayout
from gemma3.config import LayerSpec, ModelConfig
from gemma3.norm import RMSNorm
from gemma3.vision import MultiModalProjector, VisionTower


@dataclass(frozen=True)
class Step:
    """What all layers with one spec share in one forward call."""

    cos: Tensor  # [S, D/2]
    sin: Tensor  # [S, D/2]
    mask: Tensor  # bool [S, T], with images [B, 1, S, T]: may query s attend to key t?
    slots: Tensor  # int64 [S]: the cache slots of the new keys; unused without a cache


@dataclass(frozen=True)
class LayerKV:
    """The cached keys and values of one layer, [1, K, slots, D] each. They are written in place."""

    keys: Tensor
    values: Tensor


# Rounds what a layer's attention reads: queries [B, H, S, D], keys and values [B, K, S, D] → the same shapes.
RoundHeads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, S, D] by angles with the given cos and sin [S, D/2]; element i of D pairs with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalized queries and keys: x [B, S, E] → [B, S, E].

    With ``round_heads`` the queries, keys and values are rounded before they are used and cached, as the kernels of an
    exported file with an int8 cache round them.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.head_dim = dim
        self.round_heads: RoundHeads | None = None
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, kv: LayerKV | None) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        queries = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)  # [B, H, S, D]
        keys = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)  # [B, K, S, D]
        values = self.v_proj(x).view(split).transpose(1, 2)
        queries = apply_rope(queries, step.cos, step.sin)
        keys = apply_rope(keys, step.cos, step.sin)
        if self.round_heads is not None:
            queries, keys, values = self.round_heads(queries, keys, values)
        if kv is not None:
            kv.keys.index_copy_(2, step.slots, keys)
            kv.values.index_copy_(2, step.slots, values)
            visible = step.mask.shape[-1]
            keys, values = kv.keys[:, :, :visible], kv.values[:, :, :visible]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=step.mask, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """x [B, S, E] → [B, S, E]: down(gelu(gate(x)) · up(x)), with GELU in its tanh form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """A residual block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, spec)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, kv: LayerKV | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step, kv))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextModel(nn.Module):
    """Holds the parameters under the checkpoint's names; ``Gemma3.hidden`` runs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, spec) for spec in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma3(nn.Module):
    """Token ids in, logits out. Tokens attend to one another, and with a cache also to the positions that it holds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = MultiModalProjector(config.vision, config.hidden_size)

    def round_heads(self, roundings: Mapping[int, RoundHeads]) -> None:
        """From now on the layers round queries, keys and values as ``roundings``, by number, say; others do not."""
        for index, layer in enumerate(self.model.layers):
            attention = layer.get_submodule("self_attn")
            assert isinstance(attention, Attention)
            attention.round_heads = roundings.get(index)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """The soft tokens [N, tokens_per_image, E] of the images ``pixels`` [N, 3, size, size], float32 in 0 … 1."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def forward(
        self,
        tokens: Tensor,
        cache: Sequence[LayerKV] | None = None,
        start: int = 0,
        last_only: bool = False,
        soft_tokens: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] for tokens [B, S] (int64) at positions start … start + S − 1; [B, 1, V] with ``last_only``.

        ``cache`` (from ``new_cache``, for a batch of 1) holds the positions before ``start`` and receives the new ones.
        ``soft_tokens`` (from ``encode_images``) replace the image tokens in ``tokens``, in order. A run of image
        tokens is one image. Its positions attend to one another, so an image must be whole in one call.
        """
        x = self.hidden(tokens, cache, start, soft_tokens)
        return self.lm_head(x[:, -1:] if last_only else x)

    def hidden(
        self,
        tokens: Tensor,
        cache: Sequence[LayerKV] | None = None,
        start: int = 0,
        soft_tokens: Tensor | None = None,
    ) -> Tensor:
        """The head's input [B, S, E], after the final norm. From it a caller can compute logits a few at a time.

        The arguments are those of ``forward``.
        """
        x = embed(self.config, self.model.embed_tokens(tokens), tokens, soft_tokens)
        steps = steps_of(self.config, tokens, x.dtype, start, cache, images=soft_tokens is not None)
        for index, (spec, layer) in enumerate(zip(self.config.layers, self.model.layers, strict=True)):
            x = layer(x, steps[spec], None if cache is None else cache[index])
        return self.model.norm(x)


def embed(config: ModelConfig, rows: Tensor, tokens: Tensor, soft_tokens: Tensor | None = None) -> Tensor:
    """The first layer's input [B, S, E] from the table's rows [B, S, E] of tokens [B, S].

    ``soft_tokens`` replace the image tokens (see ``Gemma3.forward``).
    """
    x = rows * math.sqrt(config.hidden_size)
    if soft_tokens is None:
        return x
    is_image = _is_image(config, tokens)
    assert int(is_image.sum()) == soft_tokens.shape[:-1].numel(), "one soft token for each image token"
    return x.masked_scatter(is_image[..., None], soft_tokens.to(x.dtype))


def steps_of(
    config: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    start: int = 0,
    cache: Sequence[LayerKV] | None = None,
    images: bool = False,
) -> dict[LayerSpec, Step]:
    """What the layers of each spec share for tokens [B, S] at the positions from ``start`` on, computed in ``dtype``.

    With ``images`` the image tokens among them stand for soft tokens, and those of one image attend to one another.
    """
    length, device = tokens.shape[1], tokens.device
    end = start + length
    positions = torch.arange(start, end, device=device)
    numbers = image_numbers(_is_image(config, tokens)) if images else None
    steps = {}
    for spec in dict.fromkeys(config.layers):
        if cache is None:
            slots, key_positions = positions, positions
        else:
            size = cache[config.layers.index(spec)].keys.shape[2]
            slots = positions % size
            key_positions = ring_positions(end, size, device)
        together = None if numbers is None else same_image(numbers, key_positions - start)
        mask = attention_mask(positions, key_positions, spec.window, together)
        if numbers is not None:
            mask = mask[:, None]
        cos, sin = rope_angles(spec, positions)
        steps[spec] = Step(cos.to(dtype), sin.to(dtype), mask, slots)
    return steps


def _is_image(config: ModelConfig, tokens: Tensor) -> Tensor:
    assert config.vision is not None, "a text-only model has no images"
    return tokens == config.vision.image_token_id


def rope_angles(spec: LayerSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [S, D/2], of the angles position / factor · theta^(−2i/D) for positions [S]."""
    inverse = inverse_frequencies(spec).to(positions.device)
    angles = positions[:, None].float() * inverse
    return angles.cos(), angles.sin()


def inverse_frequencies(spec: LayerSpec) -> Tensor:
    """float32 [D/2]: theta^(−2i/D), divided by the factor of linear scaling."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    return 1.0 / (spec.rope.theta**exponents) / spec.rope.factor


def ring_positions(end: int, slots: int, device: torch.device | None = None) -> Tensor:
    """int64 [min(end, slots)]: the position that each used slot holds once positions 0 … end − 1 are written."""
    slot = torch.arange(min(end, slots), device=device)
    return end - 1 - (end - 1 - slot) % slots


def attention_mask(queries: Tensor, keys: Tensor, window: int | None, same_image: Tensor | None = None) -> Tensor:
    """Which of the positions ``keys`` [T] each of the positions ``queries`` [S] attends to: bool [S, T].

    With ``same_image`` (bool [B, S, T]) the result has that shape. Query q attends to key k if k ≤ q or both are in the
    same image. Under a window of W positions, which counts q itself, k > q − W must hold too.
    """
    visible = keys[None, :] <= queries[:, None]
    if same_image is not None:
        visible = visible | same_image
    if window is not None:
        visible = visible & (keys[None, :] > queries[:, None] - window)
    return visible


def image_numbers(is_image: Tensor) -> Tensor:
    """int64 [B, S]: the number of the image that each position is in, −1 for text.

    ``is_image`` (bool [B, S]) says which tokens are image tokens. A run of them is one image.
    """
    first = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
    return torch.where(is_image, first.cumsum(-1) - 1, -1)


def same_image(images: Tensor, keys: Tensor) -> Tensor:
    """bool [B, S, T]: is each new token in the same image as each key?

    ``images`` [B, S] is the image number of each new token (see ``image_numbers``). ``keys`` [T] are the positions of
    the keys, counted from the first new token. Keys before it are in none of these images.
    """
    numbers = torch.where(keys >= 0, images[:, keys.clamp(min=0)], -1)  # [B, T]
    return (images[:, :, None] == numbers[:, None, :]) & (images >= 0)[:, :, None]


def new_cache(layout: CacheLayout, dtype: torch.dtype = torch.float32) -> list[LayerKV]:
    """Zeroed buffers for each layer of ``layout``, which must be of the ring style."""
    assert layout.style == "ring"
    return [
        LayerKV(torch.zeros(layer.by_head, dtype=dtype), torch.zeros(layer.by_head, dtype=dtype))
        for layer in layout.layers
    ]
