"""Gemma 3's text network written for ExecuTorch: same arithmetic as gemma3.model, shaped so that XNNPACK takes it.

It is built from the same configuration and weights and compared with gemma3.model in the tests. What differs,
and why:

* RMSNorm's mean is a linear with fixed weights 1/size: XNNPACK delegates that for any rank, ``mean`` only for images.
* The query and key projections are split by rows into the two halves that RoPE rotates: slicing a dynamic
  length is not delegated, two linears are. Rows own their codes and scales, so integers stay as they are.
* RoPE's angles are computed in the graph, which saves tables of the context's length. XNNPACK's sin and cos are
  within 4.2e-7 at position 131 072.
* The caches are buffers that custom operators write in place. Sliding-window layers keep a ring; one mask and one
  set of slots a step serve them all, and there is no state beside the keys and values.
* GELU's tanh form is spelled out, since XNNPACK computes the exact form whatever ``approximate`` says (4.7e-4 off).
* Integer linears that read the same activations share one rounding of them to int8.

A model that sees is three networks: ``TokenEmbedding``, ``ExecutorchModel``, and export/executorch_vision.py's encoder.
An embedding then has one channel more, 1 for a soft token of an image and 0 for text, because the stock runners pass
nothing on beside embeddings and a position. A call whose first embedding is an image's is one image, whole: its
positions see one another.

Shapes as in gemma3.model, with the length before the heads: S new tokens, R ring slots, H query heads, K key/value
heads, D head dim, E hidden size, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  (both imports register the operators used below)
import torch
import torch.nn.functional as F
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (registers embedding_4bit)
from torch import Tensor, nn

from gemma3.cache import CacheLayout
from gemma3.config import FULL, SLIDING, LayerKind, ModelConfig
from gemma3.errors import BadInput
from gemma3.model import attention_mask, inverse_frequencies
from quant.integers import IntegerWeight

Weight = Tensor | IntegerWeight
Weights = Mapping[str, Weight]
GROUP_MULTIPLE = 32  # XNNPACK's blockwise int4 takes groups of multiples of 32
# GELU(x) ≈ x · sigmoid(x · (A + B·x²)): tanh(z) = 2·sigmoid(2z) − 1 in x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))).
GELU_A = 2.0 * math.sqrt(2.0 / math.pi)
GELU_B = GELU_A * 0.044715


@dataclass(frozen=True)
class Sight:
    """Whether a call is an image: twice the same number, 1 for an image and 0 for text."""

    number: int  # a symbol while tracing
    factor: Tensor  # float32 [1]


@dataclass(frozen=True)
class Step:
    """What all layers of one kind share in one call."""

    start: int  # the first new position; a symbol while tracing
    cos: Tensor  # [1, S, 1, D/2]
    sin: Tensor  # [1, S, 1, D/2]
    slots: Tensor | None = None  # int64 [1, S]: ring slots of the new positions (sliding layers)
    mask: Tensor | None = None  # float32 [S, R]: 0 where visible, −∞ elsewhere (sliding layers)
    sight: Sight | None = None  # None: a text-only model


def rows(weight: Weight, index: Tensor) -> Weight:
    """The rows ``index`` of a weight; an integer weight's codes and scales stay what they are."""
    if isinstance(weight, IntegerWeight):
        return IntegerWeight(weight.codes[index], weight.scales[index], weight.bits)
    return weight[index]


def rope_half(heads: int, dim: int, half: int) -> Tensor:
    """Row numbers of the first (0) or second (1) half of every head's ``dim`` rows."""
    return torch.arange(heads * dim).view(heads, 2, dim // 2)[:, half].reshape(-1)


def require_whole_groups(weight: IntegerWeight) -> None:
    """Raises BadInput for a last group that is shorter than the others."""
    if weight.group:
        raise BadInput(
            f"{weight.codes.shape[1]} columns in groups of {weight.group} end in a shorter one, for which there is no "
            "kernel in a .pte; use one scale a channel"
        )


class Linear(nn.Module):
    """A weight [N, K] in float32 or as integers that XNNPACK multiplies with int8 activations; bias [N] in float32.

    Integers reach XNNPACK as dequantize operators in front of a linear. Raises BadInput for a kind of integer
    weight that XNNPACK has no kernel for.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Buffer(bias.float())
        self.integer = isinstance(weight, IntegerWeight)
        if not isinstance(weight, IntegerWeight):
            self.register_buffer("weight", weight.float())
            return
        self.bits = weight.bits
        self.group_size = None if weight.per_channel else weight.group_size
        if weight.bits not in (4, 8) or (weight.bits == 8 and not weight.per_channel):
            raise BadInput(
                f"{weight.bits}-bit weights in groups of {weight.group_size} have no XNNPACK kernel; "
                "use 4 bits, or 8 bits per channel"
            )
        if self.group_size is not None and self.group_size % GROUP_MULTIPLE:
            raise BadInput(
                f"groups of {self.group_size} have no XNNPACK kernel; use multiples of {GROUP_MULTIPLE} "
                "or one scale a channel"
            )
        require_whole_groups(weight)
        scales = weight.scales.flatten() if weight.per_channel else weight.scales
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros_like(scales, dtype=torch.int8))

    def value(self) -> Tensor:
        if not self.integer:
            return self.get_buffer("weight")
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        stored = (self.get_buffer("codes"), self.get_buffer("scales"), self.get_buffer("zero_points"))
        operators = torch.ops.quantized_decomposed
        if self.group_size is None:
            value = operators.dequantize_per_channel.default(*stored, 0, low, high, torch.int8)
        else:
            value = operators.dequantize_per_channel_group.default(
                *stored, low, high, torch.int8, self.group_size, torch.float32
            )
        return value


def round_activations(x: Tensor) -> Tensor:
    """x rounded to int8 per token, asymmetric: XNNPACK folds the three operators into its int8 linears."""
    operators = torch.ops.quantized_decomposed
    scale, zero_point = operators.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = operators.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
    return operators.dequantize_per_token.default(codes, scale, zero_point, -128, 127, torch.int8, torch.float32)


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """Each linear applied to x; the integer ones share one rounding of x."""
    rounded = round_activations(x) if any(linear.integer for linear in linears) else x
    return [F.linear(rounded if linear.integer else x, linear.value(), linear.bias) for linear in linears]


class Mean(nn.Module):
    """Σ x / ``divisor`` over the last axis of ``size``, kept as an axis of 1."""

    def __init__(self, size: int, divisor: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((1, size), 1.0 / divisor))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("gain", 1.0 + weight.float())
        self.mean = Mean(weight.numel(), weight.numel())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * self.get_buffer("gain")


class HeadProjection(nn.Module):
    """Project to heads, normalise each over D and rotate it, on the two halves of D throughout."""

    def __init__(self, weight: Weight, norm: Tensor, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.half_dim, self.eps = heads, dim // 2, eps
        self.halves = nn.ModuleList(Linear(rows(weight, rope_half(heads, dim, half))) for half in (0, 1))
        first_gain, second_gain = (1.0 + norm.float()).chunk(2)
        self.register_buffer("first_gain", first_gain.clone())
        self.register_buffer("second_gain", second_gain.clone())
        self.mean = Mean(dim // 2, dim)

    def forward(self, first: Tensor, second: Tensor, step: Step) -> Tensor:
        """[1, S, heads, D] from the halves' projections [1, S, heads · D/2] each."""
        first, second = first.view(-1, self.half_dim), second.view(-1, self.half_dim)
        scale = torch.rsqrt(self.mean(first * first) + self.mean(second * second) + self.eps)
        first = first * scale * self.get_buffer("first_gain")
        second = second * scale * self.get_buffer("second_gain")
        first, second = (half.view(1, -1, self.heads, self.half_dim) for half in (first, second))
        return torch.cat((first * step.cos - second * step.sin, second * step.cos + first * step.sin), dim=-1)


class Attention(nn.Module):
    """Attention that owns its cache: [1, slots, K, D] of keys and of values, in float32."""

    def __init__(self, config: ModelConfig, kind: LayerKind, slots: int, weights: Weights, name: str) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        eps = config.rms_norm_eps
        self.kind = kind
        self.kv_heads, self.head_dim = kv_heads, dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.query = HeadProjection(
            weights[f"{name}.q_proj.weight"], floating(weights, f"{name}.q_norm.weight"), heads, dim, eps
        )
        self.key = HeadProjection(
            weights[f"{name}.k_proj.weight"], floating(weights, f"{name}.k_norm.weight"), kv_heads, dim, eps
        )
        self.value = Linear(weights[f"{name}.v_proj.weight"])
        self.output = Linear(weights[f"{name}.o_proj.weight"])
        shape = (1, slots, kv_heads, dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        first_query, second_query, first_key, second_key, values = project(
            x, *self.query.halves, *self.key.halves, self.value
        )
        queries = self.query(first_query, second_query, step)
        keys = self.key(first_key, second_key, step)
        values = values.view(1, -1, self.kv_heads, self.head_dim)
        out = self.attend(queries, keys, values, step).view(-1, queries.shape[2] * self.head_dim)
        return project(out, self.output)[0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        operators = torch.ops.llama
        cached_keys, cached_values = self.get_buffer("keys"), self.get_buffer("values")
        if self.kind == SLIDING:
            operators.update_cache_with_indices(keys, cached_keys, step.start, step.slots)
            operators.update_cache_with_indices(values, cached_values, step.start, step.slots)
            # With a mask the operator reads the whole ring, so its own start and causality are off.
            start, mask, causal = 0, step.mask, False
        else:
            operators.update_cache(keys, cached_keys, step.start)
            operators.update_cache(values, cached_values, step.start)
            start, mask, causal = step.start, None, True
            if step.sight is not None:
                return self.attend_seeing(queries, step.start, step.sight)
        return operators.custom_sdpa(queries, cached_keys, cached_values, start, mask, 0.0, causal, self.scale)

    def attend_seeing(self, queries: Tensor, start: int, sight: Sight) -> Tensor:
        """Causal for text, everything up to the call's end for an image.

        Both are computed, since which one counts is known when the call comes. The other one begins at position 0,
        where it reads as many keys as there are queries: one, for a single token.
        """
        cached = (self.get_buffer("keys"), self.get_buffer("values"))
        sdpa = torch.ops.llama.custom_sdpa
        causal = sdpa(queries, *cached, start * (1 - sight.number), None, 0.0, True, self.scale)
        whole = sdpa(queries, *cached, start * sight.number, None, 0.0, False, self.scale)
        return causal * (1.0 - sight.factor) + whole * sight.factor


class MLP(nn.Module):
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
    def __init__(self, config: ModelConfig, kind: LayerKind, slots: int, weights: Weights, name: str) -> None:
        super().__init__()

        def norm(which: str) -> RMSNorm:
            return RMSNorm(floating(weights, f"{name}.{which}.weight"), config.rms_norm_eps)

        self.before_attention = norm("input_layernorm")
        self.attention = Attention(config, kind, slots, weights, f"{name}.self_attn")
        self.after_attention = norm("post_attention_layernorm")
        self.before_mlp = norm("pre_feedforward_layernorm")
        self.mlp = MLP(weights, f"{name}.mlp")
        self.after_mlp = norm("post_feedforward_layernorm")

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.after_attention(self.attention(self.before_attention(x), step))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class Embedding(nn.Module):
    """Rows of the table, float32 [1, S, E] for tokens [1, S], unscaled."""

    def __init__(self, table: Weight) -> None:
        super().__init__()
        self.bits = table.bits if isinstance(table, IntegerWeight) else 32
        if not isinstance(table, IntegerWeight):
            self.register_buffer("table", table.float())
            return
        require_whole_groups(table)
        self.register_buffer("table", table.codes if table.bits == 8 else pack_embedding(table.codes))
        # Every scale that quant.integers allows is exact in half precision, which the kernel reads as well.
        scales = (table.scales.flatten() if table.per_channel else table.scales).half()
        assert torch.equal(scales.float().view(table.scales.shape), table.scales)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.get_buffer("table")
        if self.bits == 32:
            return F.embedding(tokens, table)
        operators = torch.ops.quantized_decomposed
        operator = operators.embedding_byte.dtype if self.bits == 8 else operators.embedding_4bit.dtype
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return operator(table, self.get_buffer("scales"), None, low, high, tokens, dtype=torch.float32)


def pack_embedding(codes: Tensor) -> Tensor:
    """uint8 [V, E/2] as embedding_4bit reads it: the even column in the high nibble, 8 added."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] << 4 | nibbles[:, 1::2]


def see(embeddings: Tensor) -> Sight:
    """What the last channel of the first embedding says."""
    is_image = embeddings[0, :1, -1] > 0.5
    number = cast(int, is_image.to(torch.int64).item())
    torch._check(number >= 0)  # type: ignore[no-untyped-call]
    torch._check(number <= 1)  # type: ignore[no-untyped-call]
    return Sight(number, is_image.float())


class ExecutorchModel(nn.Module):
    """Inputs at positions start_pos (int64 [1]) onwards → logits float32 [1, 1, V] of the last one.

    They are tokens int64 [1, S], or for a model that sees embeddings float32 [1, S, E + 1]: one image, whole, or text,
    by the last channel of the first.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layout: CacheLayout) -> None:
        super().__init__()
        assert layout.style == "ring"
        self.config = config
        self.context = layout.context
        if config.vision is None:
            self.embedding = Embedding(weights["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(
            Layer(config, cache.kind, cache.slots, weights, f"model.layers.{index}")
            for index, cache in enumerate(layout.layers)
        )
        self.norm = RMSNorm(floating(weights, "model.norm.weight"), config.rms_norm_eps)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.head = Linear(weights[head])
        self.kinds = [kind for kind in (SLIDING, FULL) if kind in config.layer_types]
        self.ring = next((cache.slots for cache in layout.layers if cache.kind == SLIDING), 0)
        for kind in self.kinds:
            self.register_buffer(f"{kind}_frequencies", inverse_frequencies(config, kind).view(1, 1, 1, -1))

    def forward(self, inputs: Tensor, start_pos: Tensor) -> Tensor:
        length = inputs.shape[1]
        start = cast(int, start_pos[0].item())
        torch._check_is_size(start)  # type: ignore[no-untyped-call]
        torch._check(start + length <= self.context)  # type: ignore[no-untyped-call]
        positions = start_pos + torch.arange(length)
        sight = None if self.config.vision is None else see(inputs)
        steps = {kind: self.step(kind, start, positions, start_pos + (length - 1), sight) for kind in self.kinds}
        if self.config.vision is None:
            # A multiplication of its own: folded into the table's scales they would no longer be the quantizer's.
            x = self.embedding(inputs[0]) * math.sqrt(self.config.hidden_size)
        else:
            x = inputs[0, :, :-1]
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, steps[kind])
        return project(self.norm(x[-1:]), self.head)[0].unsqueeze(0)

    def step(self, kind: LayerKind, start: int, positions: Tensor, last: Tensor, sight: Sight | None) -> Step:
        angles = positions.view(1, -1, 1, 1).float() * self.get_buffer(f"{kind}_frequencies")
        cos, sin = angles.cos(), angles.sin()
        if kind == FULL:
            return Step(start, cos, sin, sight=sight)
        ring = self.ring
        slots = (positions % ring).view(1, -1)
        # The position each slot holds after this step; negative where none has been written. ExecuTorch's integer
        # remainder follows C on negative operands, hence + ring in front of it.
        slot_positions = last - (last + ring - torch.arange(ring)) % ring
        same_image = None if sight is None else ((slot_positions >= positions[0]) & (sight.factor > 0)).unsqueeze(0)
        visible = attention_mask(positions, slot_positions, self.config.sliding_window, same_image)
        return Step(start, cos, sin, slots, torch.where(visible & (slot_positions >= 0), 0.0, float("-inf")), sight)


class TokenEmbedding(nn.Module):
    """tokens int64 [1, S] → float32 [1, S, E + 1], the last channel 0: text."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.embedding = Embedding(weights["model.embed_tokens.weight"])
        self.scale = math.sqrt(config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.pad(self.embedding(tokens) * self.scale, (0, 1))


def floating(weights: Weights, name: str) -> Tensor:
    """A weight that is computed with in float32. Raises BadInput when a recipe has quantized it."""
    weight = weights[name]
    if not isinstance(weight, Tensor):
        raise BadInput(f"{name} is quantized, and only linears and the table can be; keep it with a rule 'float32'")
    return weight
