"""Gemma 3's text model written for ExecuTorch: the arithmetic of gemma3.model, in a form that XNNPACK delegates.

It is built from the same configuration and weights as gemma3.model, and the tests compare the two. These are the
differences, besides those of export/executorch/layers.py, and their reasons:

* The query and key projections are split by rows into the two halves that RoPE rotates, because XNNPACK delegates two
  linear layers, but not the slicing of a tensor of dynamic length. Each row has its own codes and scales, so the
  integers do not change.
* The graph computes RoPE's angles, so it needs no tables of the context's length. XNNPACK's sin and cos are within
  4.2e-7 at position 131 072.
* The caches are buffers that custom operators write in place. Sliding-window layers keep a ring. One mask and one set
  of slots per step serve all of them, and there is no state besides the keys and values.
* XNNPACK computes the attention of sliding-window layers, over the whole ring, because a ring is short. Full-attention
  layers use ``llama.custom_sdpa``, which reads only as many keys as there are. It reads them once for each query head,
  so a call of one token passes the query heads of a key/value head as positions, which share one reading (``attend``).
* 1/√d, by which scores are multiplied, is part of the gain of the queries' norm. That is exact for powers of two, such
  as 1/16 in all Gemma 3 models but the 27B, and elsewhere as exact as another multiplication.

A multimodal model consists of three networks: ``TokenEmbedding`` and ``ExecutorchModel`` here, and the vision model in
export/executorch/vision.py. Its embeddings have an additional channel, 1 for a soft token of an image and 0 for text,
because the stock runners pass only embeddings and a position to the text model. A call whose first embedding belongs to
an image is one whole image: its positions attend to one another.

Shapes as in gemma3.model, but with the length before the heads: S new tokens, R ring slots, H query heads, K key/value
heads, D head dim, E hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import cast

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers the caches' and attention's operators)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.executorch.caches import cache_shapes
from export.executorch.layers import (
    GELU_A,
    GELU_B,
    Embedding,
    Linear,
    Mean,
    RMSNorm,
    floating,
    project,
    rope_half,
    rows,
)
from export.target import LOGITS_STRIDE, most_logits
from gemma3 import names
from gemma3.cache import CacheLayout, LayerCache
from gemma3.config import FULL, SLIDING, LayerKind, LayerSpec, ModelConfig
from gemma3.model import attention_mask, inverse_frequencies
from quant.weights import Weight, Weights


@dataclass(frozen=True)
class Flag:
    """A condition on a call, as a number and as a tensor: 1 where it holds, else 0."""

    number: int  # a symbol while tracing
    factor: Tensor  # float32 [1]


@dataclass(frozen=True)
class RingStep:
    """What the sliding-window layers share in one call."""

    key_slots: Tensor  # int64 [K · D, S]: the ring slots of the new positions, once for each channel of the keys
    value_slots: Tensor  # int64 [K, S]: the same once for each head
    mask: Tensor  # float32 [S, 1, R]: 0 where s attends to slot r, else −∞


@dataclass(frozen=True)
class Step:
    """What all layers of one kind share in one call."""

    start: int  # the first new position; a symbol while tracing
    cos: Tensor  # [1, S, 1, D/2]
    sin: Tensor  # [1, S, 1, D/2]
    ring: RingStep | None = None  # sliding-window layers only
    image: Flag | None = None  # the call is an image; None: a text-only model
    single: Flag | None = None  # full-attention layers only: the call is one position, and not one of the first


class HeadProjection(nn.Module):
    """Projects to heads, normalizes each head over D and applies RoPE, all on the two halves of D separately.

    The result is multiplied by ``scale``.
    """

    def __init__(self, weight: Weight, norm: Tensor, heads: int, dim: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.half_dim, self.eps = heads, dim // 2, eps
        self.halves = nn.ModuleList(Linear(rows(weight, rope_half(heads, dim, half))) for half in (0, 1))
        first_gain, second_gain = (scale * (1.0 + norm.float())).chunk(2)
        self.register_buffer("first_gain", first_gain.clone())
        self.register_buffer("second_gain", second_gain.clone())
        self.mean = Mean(dim // 2, dim)

    def forward(self, first: Tensor, second: Tensor, step: Step) -> Tensor:
        """[1, S, heads, D] from the projections of the two halves, [1, S, heads · D/2] each."""
        first, second = first.view(-1, self.half_dim), second.view(-1, self.half_dim)
        scale = torch.rsqrt(self.mean(first * first) + self.mean(second * second) + self.eps)
        first = first * scale * self.get_buffer("first_gain")
        second = second * scale * self.get_buffer("second_gain")
        first, second = (half.view(1, -1, self.heads, self.half_dim) for half in (first, second))
        return torch.cat((first * step.cos - second * step.sin, second * step.cos + first * step.sin), dim=-1)


class Attention(nn.Module):
    """Attention and its cache: x [S, E] → [S, E]; keys and values as export/executorch/caches.py says."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, cache: LayerCache, weights: Weights, name: str) -> None:
        super().__init__()
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        eps = config.rms_norm_eps
        self.kv_heads, self.groups, self.head_dim = kv_heads, heads // kv_heads, dim
        scale = config.query_pre_attn_scalar**-0.5
        self.query = HeadProjection(
            weights[f"{name}.q_proj.weight"], floating(weights, f"{name}.q_norm.weight"), heads, dim, eps, scale
        )
        self.key = HeadProjection(
            weights[f"{name}.k_proj.weight"], floating(weights, f"{name}.k_norm.weight"), kv_heads, dim, eps
        )
        self.value = Linear(weights[f"{name}.v_proj.weight"])
        self.output = Linear(weights[f"{name}.o_proj.weight"])
        for part, shape in zip(("keys", "values"), cache_shapes(cache), strict=True):
            self.register_buffer(part, torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        first_query, second_query, first_key, second_key, values = project(
            x, *self.query.halves, *self.key.halves, self.value
        )
        queries = self.query(first_query, second_query, step)
        keys = self.key(first_key, second_key, step)
        values = values.view(1, -1, self.kv_heads, self.head_dim)
        attend = self.attend if step.ring is None else self.attend_in_ring
        out = attend(queries, keys, values, step).view(-1, queries.shape[2] * self.head_dim)
        return project(out, self.output)[0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        """Write the new keys and values [1, S, K, D] to the cache. Returns the heads' outputs [1, S, H, D].

        ``custom_sdpa`` reads all keys and values once for each query head. For a single query, at p, the H/K heads of
        a key/value head are passed as the queries of H/K positions. Without the causal mask all of them attend to
        everything up to the end of the call, which is p if they begin at p − H/K + 1. So p must be at least H/K − 1.

        Both ways are computed, because only the inputs of the call say which one is needed. The other one begins at
        position 0, where it reads no more keys than it has queries.
        """
        operators = torch.ops.llama
        cached = self.get_buffer("keys"), self.get_buffer("values")
        operators.update_cache(keys, cached[0], step.start)
        operators.update_cache(values, cached[1], step.start)
        single, groups = step.single, self.groups
        if single is None:
            return self.attend_per_head(queries, step.start, step.image)
        per_head = self.attend_per_head(queries, step.start * (1 - single.number), step.image)
        as_positions = exchange(queries, self.kv_heads, groups).view(1, -1, self.kv_heads, self.head_dim)
        last = as_positions.narrow(1, as_positions.shape[1] - groups, groups)
        start = (step.start - (groups - 1)) * single.number
        out = operators.custom_sdpa(last, *cached, start, None, 0.0, False, 1.0)
        out = exchange(out, groups, self.kv_heads).view(1, 1, -1, self.head_dim)
        return per_head * (1.0 - single.factor) + out * single.factor

    def attend_in_ring(self, queries: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        """``attend`` for a sliding-window layer, [S, K, H/K, D]: one product takes all queries of a key/value head."""
        assert step.ring is not None
        heads, groups, dim = self.kv_heads, self.groups, self.head_dim
        cached_keys, cached_values = self.get_buffer("keys"), self.get_buffer("values")
        write = torch.ops.llama.update_cache_with_indices
        write(keys.view(-1, heads * dim).permute(1, 0).view(heads * dim, -1, 1, 1), cached_keys, 0, step.ring.key_slots)
        write(by_head(values, heads, 1, dim), cached_values, 0, step.ring.value_slots)
        slots = step.ring.mask.shape[-1]
        per_head = by_head(queries, heads, groups, dim).view(heads, -1, dim)
        scores = torch.bmm(per_head, cached_keys.view(heads, dim, slots)).view(heads, -1, groups, slots)
        weights = (scores + step.ring.mask).softmax(-1).view(heads, -1, slots)
        out = torch.bmm(weights, cached_values.view(heads, slots, dim))
        return out.view(heads, -1, groups, dim).permute(1, 0, 2, 3).contiguous()

    def attend_per_head(self, queries: Tensor, start: int, image: Flag | None) -> Tensor:
        """Causal attention for text; for an image, attention to everything up to the end of the call.

        For a multimodal model both are computed, as ``attend`` does it.
        """
        cached = (self.get_buffer("keys"), self.get_buffer("values"))
        sdpa = torch.ops.llama.custom_sdpa
        if image is None:
            return sdpa(queries, *cached, start, None, 0.0, True, 1.0)
        causal = sdpa(queries, *cached, start * (1 - image.number), None, 0.0, True, 1.0)
        whole = sdpa(queries, *cached, start * image.number, None, 0.0, False, 1.0)
        return causal * (1.0 - image.factor) + whole * image.factor


def by_head(x: Tensor, heads: int, groups: int, dim: int) -> Tensor:
    """[heads, S, groups, dim] from x [1, S, heads · groups, dim]."""
    if heads == 1:
        return x.view(1, -1, groups, dim)
    return x.view(-1, heads, groups, dim).permute(1, 0, 2, 3).contiguous()


def exchange(x: Tensor, outer: int, inner: int) -> Tensor:
    """[n, inner, outer, D] from x, [n, outer, inner, D] or the same numbers in another shape."""
    if outer == 1 or inner == 1:
        return x.view(-1, inner, outer, x.shape[-1])
    return x.view(-1, outer, inner, x.shape[-1]).permute(0, 2, 1, 3).contiguous()


class MLP(nn.Module):
    """x [S, E] → [S, E]: down(gelu(gate(x)) · up(x)), with GELU in its tanh form."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.gate = Linear(weights[f"{name}.gate_proj.weight"])
        self.up = Linear(weights[f"{name}.up_proj.weight"])
        self.down = Linear(weights[f"{name}.down_proj.weight"])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate, self.up)
        gate = gate * torch.sigmoid(gate * (GELU_A + GELU_B * (gate * gate)))
        return project(gate * up, self.down)[0]


class Layer(nn.Module):
    """A residual block on x [S, E]: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, cache: LayerCache, weights: Weights, name: str) -> None:
        super().__init__()

        def norm(which: str) -> RMSNorm:
            return RMSNorm(floating(weights, f"{name}.{which}.weight"), config.rms_norm_eps)

        self.before_attention = norm("input_layernorm")
        self.attention = Attention(config, spec, cache, weights, f"{name}.self_attn")
        self.after_attention = norm("post_attention_layernorm")
        self.before_mlp = norm("pre_feedforward_layernorm")
        self.mlp = MLP(weights, f"{name}.mlp")
        self.after_mlp = norm("post_feedforward_layernorm")

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.after_attention(self.attention(self.before_attention(x), step))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


def flag_of(condition: Tensor) -> Flag:
    """The flag of a condition, bool [1]."""
    number = cast(int, condition.to(torch.int64).item())
    torch._check(number >= 0)  # type: ignore[no-untyped-call]
    torch._check(number <= 1)  # type: ignore[no-untyped-call]
    return Flag(number, condition.float())


class ExecutorchModel(nn.Module):
    """Inputs at the positions from start_pos (int64 [1]) on → logits float32 [1, k, V] of the last k positions.

    The inputs of a text-only model are tokens int64 [1, S]. Those of a multimodal model are embeddings float32
    [1, S, E + 1], all of text or of one whole image; the last channel of the first one says which.

    start_pos is the first position + (k − 1) · LOGITS_STRIDE. A position alone asks for one row, as the stock runners
    do. An input of its own, or a start_pos of k numbers, would be more direct, but these runners pass exactly two
    inputs, and they take a start_pos of a dynamic length for a list of all positions.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layout: CacheLayout) -> None:
        super().__init__()
        assert layout.style == "ring"
        self.config = config
        self.context, self.most_logits = layout.context, most_logits(layout)
        if config.vision is None:
            self.embedding = Embedding(weights[names.EMBEDDING])
        self.layers = nn.ModuleList(
            Layer(config, spec, cache, weights, names.layer(index))
            for index, (spec, cache) in enumerate(zip(config.layers, layout.layers, strict=True))
        )
        self.norm = RMSNorm(floating(weights, names.FINAL_NORM), config.rms_norm_eps)
        self.head = Linear(weights[names.head_of(config)])
        specs = {spec.kind: spec for spec in config.layers}
        self.specs = {kind: specs[kind] for kind in (SLIDING, FULL) if kind in specs}
        assert len(self.specs) == len(set(config.layers)), "layers of one kind share a step, so they need equal specs"
        self.ring = next((cache.slots for cache in layout.layers if cache.kind == SLIDING), 0)
        for kind, spec in self.specs.items():
            self.register_buffer(f"{kind}_frequencies", inverse_frequencies(spec).view(1, 1, 1, -1))

    def forward(self, inputs: Tensor, start_pos: Tensor) -> Tensor:
        length = inputs.shape[1]
        count = cast(int, (start_pos[0] // LOGITS_STRIDE).item()) + 1
        torch._check(count >= 1)  # type: ignore[no-untyped-call]
        torch._check(count <= self.most_logits)  # type: ignore[no-untyped-call]
        torch._check(count <= length)  # type: ignore[no-untyped-call]
        start_pos = start_pos % LOGITS_STRIDE
        start = cast(int, start_pos[0].item())
        torch._check_is_size(start)  # type: ignore[no-untyped-call]
        torch._check(start + length <= self.context)  # type: ignore[no-untyped-call]
        positions = start_pos + torch.arange(length)
        # The last channel of the first embedding says whether a call is an image.
        image = None if self.config.vision is None else flag_of(inputs[0, :1, -1] > 0.5)
        steps = {kind: self.step(kind, start, positions, start_pos + (length - 1), image) for kind in self.specs}
        if self.config.vision is None:
            # The factor is not folded into the table's scales, because these must stay the quantizer's.
            x = self.embedding(inputs[0]) * math.sqrt(self.config.hidden_size)
        else:
            x = inputs[0, :, :-1]
        for layer, spec in zip(self.layers, self.config.layers, strict=True):
            x = layer(x, steps[spec.kind])
        last = x.narrow(0, length - count, count)
        return project(self.norm(last), self.head)[0].unsqueeze(0)

    def step(self, kind: LayerKind, start: int, positions: Tensor, last: Tensor, image: Flag | None) -> Step:
        """What the layers of ``kind`` share in a call at ``positions`` [S], which ends at the position ``last`` [1]."""
        angles = positions.view(1, -1, 1, 1).float() * self.get_buffer(f"{kind}_frequencies")
        cos, sin = angles.cos(), angles.sin()
        window = self.specs[kind].window
        if window is None:
            return Step(start, cos, sin, image=image, single=self.single(positions, last))
        ring = self.ring
        slots = (positions % ring).view(1, -1)
        # The position that each slot holds after this step, negative for a slot that is not written yet. ``ring`` is
        # added before the remainder, because for negative operands ExecuTorch's integer remainder is that of C.
        slot_positions = last - (last + ring - torch.arange(ring)) % ring
        same_image = None if image is None else ((slot_positions >= positions[0]) & (image.factor > 0)).unsqueeze(0)
        visible = attention_mask(positions, slot_positions, window, same_image)
        mask = torch.where(visible & (slot_positions >= 0), 0.0, float("-inf")).unsqueeze(1)
        heads, dim = self.specs[kind].num_key_value_heads, self.specs[kind].head_dim
        return Step(start, cos, sin, RingStep(slots.expand(heads * dim, -1), slots.expand(heads, -1), mask), image)

    def single(self, positions: Tensor, last: Tensor) -> Flag | None:
        """The flag for ``Attention.attend``. None where query heads share no keys, or a cache has fewer slots."""
        spec = self.specs[FULL]
        groups = spec.num_attention_heads // spec.num_key_value_heads
        if not 1 < groups <= self.context:
            return None
        first = positions[:1]
        return flag_of((first == last) & (first >= groups - 1))


class TokenEmbedding(nn.Module):
    """tokens int64 [1, S] → scaled embeddings float32 [1, S, E + 1], with 0 (text) in the last channel."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.embedding = Embedding(weights[names.EMBEDDING])
        self.scale = math.sqrt(config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.pad(self.embedding(tokens) * self.scale, (0, 1))
