"""Gemma 3's text model as an ONNX graph for ONNX Runtime, to be read top to bottom like gemma3/model.py.

Shapes: S new tokens, T = past + S, H query heads, K key/value heads, D head dim, E hidden size, V vocabulary; the batch
is 1. These are the inputs and outputs, with the names that onnxruntime-genai expects, which runs the file as it is:

    input_ids int64 [1, S], attention_mask int64 [1, T] (only its length is used)
    past_key_values.{i}.key and .value float32 (or int8 codes) [1, K, slots, D] → present.{i}.key and .value, the same
    logits float32 [1, 1, V], of the last token
    logits_to_keep int64 [1], 1 unless given → last_logits float32 [1, logits_to_keep, V], of the last tokens

The number of slots in a cache is fixed in the file. Past and present are one buffer, which the caller binds as both.
Sliding-window layers use GroupQueryAttention's windowed cache. T alone determines which position is in which row, so
T = S begins a new sequence, whatever the buffer held before.
In int8, GroupQueryAttention rounds the new keys and values with fixed scales, a float32 for each channel of a head, and
attends to the rounded ones (see ``quant.kv.PerChannel``).

A multimodal model has one more input, and one more graph that computes it, ``vision.onnx`` (export/onnx/vision.py):

    soft_tokens float32 [1, M, E], appended to the embeddings of the S tokens, unscaled; empty unless given

In each call, input_ids or soft_tokens is empty: a call takes text, or one whole image (input_ids [1, 0]), whose
positions attend to one another. Only attention differs, so only attention has two branches. Weights, caches and
everything else serve both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from export.onnx.file import LAST_LOGITS, LOGITS_TO_KEEP
from export.onnx.layers import KV_SCALES, MICROSOFT, GraphBuilder, block_size, declare, typed_value
from gemma3 import names
from gemma3.cache import CacheDtype, CacheLayout
from gemma3.config import LayerSpec, ModelConfig
from gemma3.model import RoundHeads, inverse_frequencies
from quant.integers import IntegerWeight
from quant.kv import PerChannel
from quant.sfp8 import Sfp8Weight

MAX_INT64 = 2**63 - 1
PARTS = ("key", "value")
CACHE_DTYPES: dict[CacheDtype, ir.DataType] = {"float32": ir.DataType.FLOAT, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class Step:
    """The values that all layers share in one call. S here counts soft tokens too."""

    past: ir.Value  # int32 [1]: T − 1, as GroupQueryAttention expects it
    total: ir.Value  # int32 scalar: T
    rope: dict[LayerSpec, tuple[ir.Value, ir.Value]]  # cos, sin [1, S, D/2]
    is_image: ir.Value | None  # bool scalar; None: a text-only model


@dataclass(frozen=True)
class Cache:
    """A layer's past keys and values [1, K, slots, D], and for int8 codes their scales, float32 [1, K, 1, D] each."""

    past: list[ir.Value]
    scales: list[ir.Value]


def text_model(
    graph: GraphBuilder, config: ModelConfig, layout: CacheLayout, kv: Mapping[int, RoundHeads]
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Build the graph of the text model with caches of ``layout``. Returns its inputs and its outputs.

    ``kv`` has the scales of int8 caches, by layer.
    """
    op = graph.op
    ids = typed_value("input_ids", ir.DataType.INT64, [1, "sequence_length"])
    mask = typed_value("attention_mask", ir.DataType.INT64, [1, "total_sequence_length"])
    inputs, caches, soft_tokens = [ids, mask], [], None
    if config.vision is not None:
        # Empty by default, so that onnxruntime-genai, which does not know this input, can run text.
        soft_tokens = op.initializer(ir.tensor(np.empty((1, 0, config.hidden_size), np.float32)), name="soft_tokens")
        declare(soft_tokens, "soft_tokens", ir.DataType.FLOAT, [1, "soft_tokens_length", config.hidden_size])
        inputs.append(soft_tokens)
    step = step_values(graph, config, ids, mask, soft_tokens)
    x = op.Mul(embed(graph, config, ids), graph.floats([math.sqrt(config.hidden_size)]))
    if soft_tokens is not None:
        x = op.Concat(x, soft_tokens, axis=1)
    for index, (spec, cache) in enumerate(zip(config.layers, layout.layers, strict=True)):
        shape = list(cache.by_head)
        dtype = CACHE_DTYPES[layout.dtype]
        past = [typed_value(f"past_key_values.{index}.{part}", dtype, shape) for part in PARTS]
        scales = kv_scales(graph, f"{names.layer(index)}.self_attn", kv.get(index))
        x, present = layer(graph, config, f"{names.layer(index)}.", spec, x, step, Cache(past, scales))
        for value, part in zip(present, PARTS, strict=True):
            declare(value, f"present.{index}.{part}", dtype, shape)
        inputs += past
        caches += present
    # onnxruntime-genai does not know this input, and takes the logits of one token only.
    keep = op.initializer(ir.tensor(np.array([1], np.int64)), name=LOGITS_TO_KEEP)
    declare(keep, LOGITS_TO_KEEP, ir.DataType.INT64, [1])
    inputs.append(keep)
    kept = op.Slice(x, op.Neg(keep), graph.ints([MAX_INT64]), graph.ints([1]))  # [1, k, E]
    (every,) = graph.linear(graph.norm(kept, config.rms_norm_eps, names.FINAL_NORM), names.head_of(config))
    declare(every, LAST_LOGITS, ir.DataType.FLOAT, [1, LOGITS_TO_KEEP, config.vocab_size])
    logits = op.Gather(every, graph.ints([-1]), axis=1)
    declare(logits, "logits", ir.DataType.FLOAT, [1, 1, config.vocab_size])
    return inputs, [logits, *caches, every]


def step_values(
    graph: GraphBuilder, config: ModelConfig, ids: ir.Value, mask: ir.Value, soft_tokens: ir.Value | None
) -> Step:
    """Build the nodes that compute what all layers share."""
    op = graph.op
    total = op.Shape(mask, start=1)  # [1]
    new = op.Shape(ids, start=1)
    is_image = None
    if soft_tokens is not None:
        image = op.Shape(soft_tokens, start=1, end=2)
        new, is_image = op.Add(new, image), op.Greater(op.Squeeze(image), graph.ints(0))
    one = graph.ints(1)
    positions = op.Range(op.Squeeze(op.Sub(total, new)), op.Squeeze(total), one)  # [S]
    columns = op.Unsqueeze(op.Cast(positions, to=ir.DataType.FLOAT), graph.ints([0, 2]))  # [1, S, 1]
    rope = {}
    for spec in dict.fromkeys(config.layers):
        angles = op.Mul(columns, graph.floats(inverse_frequencies(spec).tolist()))
        rope[spec] = (op.Cos(angles), op.Sin(angles))
    narrow = op.Cast(total, to=ir.DataType.INT32)
    return Step(op.Cast(op.Sub(total, one), to=ir.DataType.INT32), op.Squeeze(narrow, graph.ints([0])), rope, is_image)


def kv_scales(graph: GraphBuilder, prefix: str, round_heads: RoundHeads | None) -> list[ir.Value]:
    """The scales of a layer's keys and of its values, float32 [1, K, 1, D] each; nothing for float caches."""
    if round_heads is None:
        return []
    assert isinstance(round_heads, PerChannel)
    pairs = zip(PARTS, (round_heads.keys, round_heads.values), strict=True)
    return [graph.values(f"{prefix}.{part}_scale", scales[None, :, None]) for part, scales in pairs]


def embed(graph: GraphBuilder, config: ModelConfig, ids: ir.Value) -> ir.Value:
    """The rows of the embedding table for ``ids`` [1, S]: [1, S, E], without the embedding scale."""
    name = names.EMBEDDING
    weight = graph.take(name)
    if isinstance(weight, Tensor):
        return graph.op.Gather(graph.float_matrix([name], [weight]), ids)
    if isinstance(weight, Sfp8Weight):
        return graph.op.Gather(graph.sfp8_matrix(name, weight), ids)
    assert isinstance(weight, IntegerWeight)
    rows, columns = weight.codes.shape
    block = block_size(name, weight)
    codes, scales = graph.integer_matrix([name], [weight], block)
    x = graph.integer_node(
        "GatherBlockQuantized",
        [graph.flattened(codes), ids, scales],
        {name: rows},
        columns,
        {"bits": weight.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
    )
    if columns % block:
        x = graph.op.Slice(x, graph.ints([0]), graph.ints([columns]), graph.ints([2]))
    return x


def layer(
    graph: GraphBuilder,
    config: ModelConfig,
    prefix: str,
    spec: LayerSpec,
    x: ir.Value,
    step: Step,
    cache: Cache,
) -> tuple[ir.Value, list[ir.Value]]:
    """The output of a layer for x [1, S, E]: [1, S, E], and the present keys and values."""

    def norm(value: ir.Value, name: str) -> ir.Value:
        return graph.norm(value, config.rms_norm_eps, f"{prefix}{name}.weight")

    op = graph.op
    out, present = attention(graph, config, prefix + "self_attn.", spec, norm(x, "input_layernorm"), step, cache)
    x = op.Add(x, norm(out, "post_attention_layernorm"))
    out = mlp(graph, prefix + "mlp.", norm(x, "pre_feedforward_layernorm"))
    return op.Add(x, norm(out, "post_feedforward_layernorm")), present


def attention(
    graph: GraphBuilder,
    config: ModelConfig,
    prefix: str,
    spec: LayerSpec,
    x: ir.Value,
    step: Step,
    cache: Cache,
) -> tuple[ir.Value, list[ir.Value]]:
    """The output of the attention block for x [1, S, E]: [1, S, E], and the present keys and values."""
    op = graph.op
    heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    queries, keys, values = graph.linear(x, *(f"{prefix}{part}_proj.weight" for part in "qkv"))

    def rotated(value: ir.Value, count: int, norm: str) -> ir.Value:
        split = op.Reshape(value, graph.ints([0, 0, count, dim]))
        normed = graph.norm(split, config.rms_norm_eps, f"{prefix}{norm}.weight")
        flat = op.Reshape(normed, graph.ints([0, 0, count * dim]))
        return op.RotaryEmbedding(flat, *step.rope[spec], num_heads=count)

    operands = [rotated(queries, heads, "q_norm"), rotated(keys, kv_heads, "k_norm"), values]
    out, *present = attend(graph, config, prefix, spec, operands, step, cache)
    (projected,) = graph.linear(out, prefix + "o_proj.weight")
    return projected, present


def attend(
    graph: GraphBuilder,
    config: ModelConfig,
    prefix: str,
    spec: LayerSpec,
    operands: list[ir.Value],
    step: Step,
    cache: Cache,
) -> list[ir.Value]:
    """The heads' outputs [1, S, H·D], and the present keys and values. ``operands`` are queries, keys and values."""
    shape = cache.past[0].shape
    assert shape is not None
    # A cache that is shorter than the window holds the whole context, so it never drops a row.
    width = None if spec.window is None else min(spec.window, shape.numpy()[2])
    window = {} if width is None else {"local_window_size": width, "sliding_window_cache": 1}

    whole = [*operands, *cache.past, step.past, step.total]

    def text() -> list[ir.Value]:
        return group_query_attention(graph, config, spec, whole, cache.scales, **window)

    def image() -> list[ir.Value]:
        if width is not None:
            return image_in_window(graph, config, spec, width, operands, step, cache)
        return group_query_attention(graph, config, spec, whole, cache.scales, causal=0)

    if step.is_image is None:
        return text()
    then, otherwise = graph.branch(prefix + "image", image), graph.branch(prefix + "text", text)
    outputs: list[ir.Value] = graph.op.If(step.is_image, then_branch=then, else_branch=otherwise, outputs=3)
    return outputs


def group_query_attention(
    graph: GraphBuilder,
    config: ModelConfig,
    spec: LayerSpec,
    inputs: Sequence[ir.Value | None],
    scales: Sequence[ir.Value],
    **attributes: int,
) -> list[ir.Value]:
    """A GroupQueryAttention node: the heads' outputs [1, S, H·D], and the present keys and values.

    With ``scales``, of keys and of values, the caches hold int8 codes.
    """
    rounding: dict[str, Any] = {}
    if scales:
        inputs = [*inputs, *[None] * (KV_SCALES[0] - len(inputs)), *scales]
        rounding = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    outputs: list[ir.Value] = graph.op.GroupQueryAttention(
        *inputs,
        **rounding,
        num_heads=spec.num_attention_heads,
        kv_num_heads=spec.num_key_value_heads,
        scale=config.query_pre_attn_scalar**-0.5,
        **attributes,
        domain=MICROSOFT,
        outputs=3,
    )
    return outputs


def image_in_window(
    graph: GraphBuilder,
    config: ModelConfig,
    spec: LayerSpec,
    window: int,
    operands: list[ir.Value],
    step: Step,
    cache: Cache,
) -> list[ir.Value]:
    """``attend`` for an image in a sliding-window layer.

    A query attends to all later positions of the image, and to the earlier positions within its window.
    GroupQueryAttention has a window only with a causal mask. Here it runs without one, over the cache rows in use and
    the image's rows, and a bias masks what is outside the window. The rows that GroupQueryAttention's windowed cache
    would keep become the present.
    """
    op = graph.op
    (queries, keys, values), past = operands, cache.past
    assert past[0].shape is not None
    slots = past[0].shape.numpy()[2]
    zero, two = graph.ints([0]), graph.ints([2])
    new = op.Shape(keys, start=1, end=2)  # [1]
    end = op.Add(op.Cast(step.past, to=ir.DataType.INT64), graph.ints([1]))
    before, after = (resident_rows(graph, tokens, slots, window) for tokens in (op.Sub(end, new), end))
    rows = op.Add(before, new)

    # Query i and row r both count from the image's first position. Query i attends to row r if r > i − window.
    query = op.Unsqueeze(op.Range(graph.ints(0), op.Squeeze(new), graph.ints(1)), graph.ints([0, 1, 3]))
    row = op.Range(op.Squeeze(op.Neg(before)), op.Squeeze(new), graph.ints(1))
    visible = op.Greater(row, op.Sub(query, graph.ints([window])))
    bias = op.Where(visible, graph.floats([0.0]), graph.floats([-math.inf]))  # [1, 1, S, rows]

    total = op.Cast(rows, to=ir.DataType.INT32)
    seen = [op.Slice(part, zero, before, two) for part in past]
    counts = [op.Sub(total, op.Cast(graph.ints([1]), to=ir.DataType.INT32)), op.Squeeze(total)]
    inputs = [queries, keys, values, *seen, *counts, None, None, None, bias]
    out, *whole = group_query_attention(graph, config, spec, inputs, cache.scales, causal=0)
    kept = [op.Slice(part, op.Sub(rows, after), rows, two) for part in whole]
    padding = op.Concat(graph.ints([0] * 6), op.Sub(graph.ints([slots]), after), zero, axis=0)
    return [out, *(op.Pad(part, padding) for part in kept)]


def resident_rows(graph: GraphBuilder, tokens: ir.Value, slots: int, window: int) -> ir.Value:
    """int64 [1]: how many rows a windowed cache holds after ``tokens`` tokens, by GroupQueryAttention's contract.

    When all ``slots`` are full and another row comes, the slots − window + 1 oldest rows are dropped at once.
    """
    op = graph.op
    dropped = graph.ints([slots - window + 1])
    excess = op.Max(op.Sub(tokens, graph.ints([slots])), graph.ints([0]))
    times = op.Div(op.Add(excess, graph.ints([slots - window])), dropped)
    return op.Sub(tokens, op.Mul(times, dropped))


def mlp(graph: GraphBuilder, prefix: str, x: ir.Value) -> ir.Value:
    """x [1, S, E] → [1, S, E]: down(gelu(gate(x)) · up(x)), with GELU in its tanh form."""
    gate, up = graph.linear(x, prefix + "gate_proj.weight", prefix + "up_proj.weight")
    hidden = graph.op.Mul(graph.op.Gelu(gate, approximate="tanh"), up)
    (down,) = graph.linear(hidden, prefix + "down_proj.weight")
    return down
