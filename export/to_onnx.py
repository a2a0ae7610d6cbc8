"""Gemma 3's text network as an ONNX graph for ONNX Runtime, to be read top to bottom like gemma3/model.py.

Shapes: S new tokens, T = past + S, H query heads, K key/value heads, D head dim, E hidden size, V vocabulary;
the batch is 1. In and out (the names are onnxruntime-genai's, which runs the file as it is):

    input_ids int64 [1, S], attention_mask int64 [1, T] (only its length is used)
    past_key_values.{i}.key and .value float32 [1, K, slots, D] → present.{i}.key and .value, the same shape
    logits float32 [1, 1, V], of the last token

The caches' slots are fixed in the file. Past and present are one buffer, which the caller binds as both. Sliding
layers use GroupQueryAttention's windowed cache: what is in which row is a function of T alone, so T = S begins a
new sequence whatever the buffer held.

A model that sees has another input, and another graph, ``vision.onnx`` (export/onnx_vision.py), which computes it:

    soft_tokens float32 [1, M, E], which stand behind the S tokens, unscaled; none unless given

One of the two is empty: a call is text, or one image whole (S = 0), whose tokens see one another. Only the attention
differs, so only the attention is in two branches; weights, caches and everything else serve both.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from export.onnx_file import VISION_FILE, data_file, graphs_of, load_graph
from export.onnx_graph import (
    IR_VERSION,
    MICROSOFT,
    OPSETS,
    GraphBuilder,
    Weights,
    block_size,
    declare,
    stored_integers,
    stored_sfp8,
    typed_value,
    write_graph,
)
from export.onnx_vision import vision_model
from gemma3.cache import CacheLayout
from gemma3.config import SLIDING, LayerKind, ModelConfig
from gemma3.errors import BadInput, VerificationFailed
from gemma3.model import inverse_frequencies
from quant.integers import IntegerWeight, equal_codes
from quant.sfp8 import Sfp8Weight

Shapes = dict[str, list[int | str]]


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and what reading it back showed."""

    opsets: dict[str, int]
    ir_version: int
    accuracy_level: int
    methods: dict[str, dict[str, Shapes]]  # name → "inputs", "outputs"
    files: dict[str, int]  # name → bytes
    ideal_bytes: int  # integers at their bits, scales at two bytes, other weights at four
    integers_equal: int  # codes and scales read back from the file and equal to the quantizer's
    integers_unequal: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(
    config: ModelConfig, weights: Weights, layout: CacheLayout, path: Path, *, accuracy_level: int = 4
) -> OnnxReport:
    """Write ``path`` and its external data ``path``.data, then read the integers back and compare.

    ``weights`` by checkpoint name: float tensors (written as float32), IntegerWeight of 4 or 8 bits, or Sfp8Weight,
    whose codes go into the file as they are and are looked up when it is loaded (4 bytes a weight in memory: to
    validate with, see export/reexpress.py for what ships).
    ``layout`` must be of the compacting style. ``accuracy_level`` is MatMulNBits': 4 multiplies in int8 after
    rounding the activations by block, 1 in float32 with the weights exact.
    Raises BadInput for weights that do not fit the configuration or the runtime's kernels, and
    VerificationFailed when an integer in the file is not the quantizer's. The same arguments give the same bytes.
    """
    assert layout.style == "compacting"
    if config.head_dim % 8:
        raise BadInput(f"head_dim is {config.head_dim}; ONNX Runtime's attention needs a multiple of 8")
    inputs, outputs, used = write_graph(
        path, "gemma3", weights, accuracy_level, lambda graph: text_model(graph, config, layout)
    )
    methods = {"forward": {"inputs": inputs, "outputs": outputs}}
    if config.vision is not None:
        inputs, outputs, seen = write_graph(
            path.with_name(VISION_FILE),
            "gemma3-vision",
            weights,
            accuracy_level,
            lambda graph: vision_model(graph, config),
        )
        methods["vision_encoder"] = {"inputs": inputs, "outputs": outputs}
        used |= seen
    unused = sorted(set(weights) - used)
    if unused:
        raise BadInput(f"{len(unused)} weights are not part of this model, the first is {unused[0]}")

    equal, unequal = compare_integers(weights, path)
    if unequal:
        raise VerificationFailed(f"{path}: {unequal} integers are not the quantizer's; do not use this file")
    return OnnxReport(
        opsets=OPSETS,
        ir_version=IR_VERSION,
        accuracy_level=accuracy_level,
        methods=methods,
        files={file.name: file.stat().st_size for graph in graphs_of(path) for file in (graph, data_file(graph))},
        ideal_bytes=sum(
            4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in weights.values()
        ),
        integers_equal=equal,
        integers_unequal=unequal,
    )


def read_back_onnx(path: Path) -> dict[str, IntegerWeight]:
    """The integer weights by checkpoint name in the file, and in the image encoder's that belongs to it.

    Raises BadInput as ``load_graph`` does.
    """
    return dict(chain.from_iterable(map(stored_integers, graphs_of(path))))


def read_back_sfp8(path: Path) -> dict[str, Sfp8Weight]:
    """The same of SFP8's codes, where the files keep them."""
    return dict(chain.from_iterable(map(stored_sfp8, graphs_of(path))))


def compare_integers(weights: Weights, path: Path) -> tuple[int, int]:
    """How many of the integers in ``weights`` are (equal, unequal) in every place that the files use them.

    An integer under another scale counts as unequal, like those of a weight that no node uses.
    """
    expected = {name: weight for name, weight in weights.items() if isinstance(weight, IntegerWeight)}
    equal: dict[str, int] = {}
    for name, stored in chain.from_iterable(map(stored_integers, graphs_of(path))):
        alike = equal_codes(stored, expected[name])
        equal[name] = min(alike, equal.get(name, alike))
    total = sum(weight.codes.numel() for weight in expected.values())
    return sum(equal.values()), total - sum(equal.values())


# The network.


@dataclass(frozen=True)
class Step:
    """What all layers share in one call."""

    past: ir.Value  # int32 [1]: T − 1, as GroupQueryAttention wants it
    total: ir.Value  # int32 scalar: T
    rope: dict[LayerKind, tuple[ir.Value, ir.Value]]  # cos, sin [1, S, D/2]
    is_image: ir.Value | None  # bool scalar, of models that see


def text_model(graph: GraphBuilder, config: ModelConfig, layout: CacheLayout) -> tuple[list[ir.Value], list[ir.Value]]:
    """The graph's inputs and outputs."""
    op = graph.op
    ids = typed_value("input_ids", ir.DataType.INT64, [1, "sequence_length"])
    mask = typed_value("attention_mask", ir.DataType.INT64, [1, "total_sequence_length"])
    inputs, caches, soft_tokens = [ids, mask], [], None
    if config.vision is not None:
        # Empty unless the caller gives some, so that onnxruntime-genai, which knows nothing of it, has the text half.
        soft_tokens = op.initializer(ir.tensor(np.empty((1, 0, config.hidden_size), np.float32)), name="soft_tokens")
        declare(soft_tokens, "soft_tokens", ir.DataType.FLOAT, [1, "soft_tokens_length", config.hidden_size])
        inputs.append(soft_tokens)
    step = step_values(graph, config, ids, mask, soft_tokens)
    x = op.Mul(embed(graph, config, ids), graph.floats([math.sqrt(config.hidden_size)]))
    if soft_tokens is not None:
        x = op.Concat(x, soft_tokens, axis=1)
    for index, kind in enumerate(config.layer_types):
        shape = [1, layout.num_key_value_heads, layout.layers[index].slots, layout.head_dim]
        past = [typed_value(f"past_key_values.{index}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]
        x, present = layer(graph, config, f"model.layers.{index}.", kind, x, step, past)
        for value, part in zip(present, ("key", "value"), strict=True):
            declare(value, f"present.{index}.{part}", ir.DataType.FLOAT, shape)
        inputs += past
        caches += present
    last = op.Gather(x, graph.ints([-1]), axis=1)  # [1, 1, E]
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    (logits,) = graph.linear(graph.norm(last, config.rms_norm_eps, "model.norm.weight"), head)
    declare(logits, "logits", ir.DataType.FLOAT, [1, 1, config.vocab_size])
    return inputs, [logits, *caches]


def step_values(
    graph: GraphBuilder, config: ModelConfig, ids: ir.Value, mask: ir.Value, soft_tokens: ir.Value | None
) -> Step:
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
    for kind in dict.fromkeys(config.layer_types):
        angles = op.Mul(columns, graph.floats(inverse_frequencies(config, kind).tolist()))
        rope[kind] = (op.Cos(angles), op.Sin(angles))
    narrow = op.Cast(total, to=ir.DataType.INT32)
    return Step(op.Cast(op.Sub(total, one), to=ir.DataType.INT32), op.Squeeze(narrow, graph.ints([0])), rope, is_image)


def embed(graph: GraphBuilder, config: ModelConfig, ids: ir.Value) -> ir.Value:
    """The table's rows of ``ids``: [1, S, E]."""
    name = "model.embed_tokens.weight"
    weight = graph.take(name)
    if isinstance(weight, Tensor):
        return graph.op.Gather(graph.float_matrix([name], [weight]), ids)
    if isinstance(weight, Sfp8Weight):
        return graph.op.Gather(graph.sfp8_matrix(name, weight), ids)
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
    kind: LayerKind,
    x: ir.Value,
    step: Step,
    past: Sequence[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    def norm(value: ir.Value, name: str) -> ir.Value:
        return graph.norm(value, config.rms_norm_eps, f"{prefix}{name}.weight")

    op = graph.op
    out, present = attention(graph, config, prefix + "self_attn.", kind, norm(x, "input_layernorm"), step, past)
    x = op.Add(x, norm(out, "post_attention_layernorm"))
    out = mlp(graph, prefix + "mlp.", norm(x, "pre_feedforward_layernorm"))
    return op.Add(x, norm(out, "post_feedforward_layernorm")), present


def attention(
    graph: GraphBuilder,
    config: ModelConfig,
    prefix: str,
    kind: LayerKind,
    x: ir.Value,
    step: Step,
    past: Sequence[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    """The output projection [1, S, E], and the present keys and values."""
    op = graph.op
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, keys, values = graph.linear(x, *(f"{prefix}{part}_proj.weight" for part in "qkv"))

    def rotated(value: ir.Value, count: int, norm: str) -> ir.Value:
        split = op.Reshape(value, graph.ints([0, 0, count, dim]))
        normed = graph.norm(split, config.rms_norm_eps, f"{prefix}{norm}.weight")
        flat = op.Reshape(normed, graph.ints([0, 0, count * dim]))
        return op.RotaryEmbedding(flat, *step.rope[kind], num_heads=count)

    operands = [rotated(queries, heads, "q_norm"), rotated(keys, kv_heads, "k_norm"), values, *past]
    out, *present = attend(graph, config, prefix, kind, operands, step)
    (projected,) = graph.linear(out, prefix + "o_proj.weight")
    return projected, present


def attend(
    graph: GraphBuilder, config: ModelConfig, prefix: str, kind: LayerKind, operands: list[ir.Value], step: Step
) -> list[ir.Value]:
    """Of queries, keys, values and past of both: the heads' outputs [1, S, H·D], and the present keys and values."""
    window = {"local_window_size": config.sliding_window, "sliding_window_cache": 1} if kind == SLIDING else {}

    def text() -> list[ir.Value]:
        return group_query_attention(graph, config, [*operands, step.past, step.total], **window)

    def image() -> list[ir.Value]:
        if kind == SLIDING:
            return image_in_window(graph, config, operands, step)
        return group_query_attention(graph, config, [*operands, step.past, step.total], causal=0)

    if step.is_image is None:
        return text()
    then, otherwise = graph.branch(prefix + "image", image), graph.branch(prefix + "text", text)
    outputs: list[ir.Value] = graph.op.If(step.is_image, then_branch=then, else_branch=otherwise, outputs=3)
    return outputs


def group_query_attention(
    graph: GraphBuilder, config: ModelConfig, inputs: Sequence[ir.Value | None], **attributes: int
) -> list[ir.Value]:
    outputs: list[ir.Value] = graph.op.GroupQueryAttention(
        *inputs,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.query_pre_attn_scalar**-0.5,
        **attributes,
        domain=MICROSOFT,
        outputs=3,
    )
    return outputs


def image_in_window(graph: GraphBuilder, config: ModelConfig, operands: list[ir.Value], step: Step) -> list[ir.Value]:
    """``attend`` for an image on a sliding layer: all of its tokens are seen, what lies before within the window.

    GroupQueryAttention has a window only with a causal mask. Here it runs over the rows in use and the image's, with
    the window as a bias, and what its windowed cache would keep of them becomes the present.
    """
    op = graph.op
    queries, keys, values, *past = operands
    assert past[0].shape is not None
    slots, window = past[0].shape.numpy()[2], config.sliding_window
    zero, two = graph.ints([0]), graph.ints([2])
    new = op.Shape(keys, start=1, end=2)  # [1]
    end = op.Add(op.Cast(step.past, to=ir.DataType.INT64), graph.ints([1]))
    before, after = (resident_rows(graph, tokens, slots, window) for tokens in (op.Sub(end, new), end))
    rows = op.Add(before, new)

    # Of query i and row r, counted from the image's first: is r > i − window?
    query = op.Unsqueeze(op.Range(graph.ints(0), op.Squeeze(new), graph.ints(1)), graph.ints([0, 1, 3]))
    row = op.Range(op.Squeeze(op.Neg(before)), op.Squeeze(new), graph.ints(1))
    visible = op.Greater(row, op.Sub(query, graph.ints([window])))
    bias = op.Where(visible, graph.floats([0.0]), graph.floats([-math.inf]))  # [1, 1, S, rows]

    total = op.Cast(rows, to=ir.DataType.INT32)
    seen = [op.Slice(part, zero, before, two) for part in past]
    counts = [op.Sub(total, op.Cast(graph.ints([1]), to=ir.DataType.INT32)), op.Squeeze(total)]
    inputs = [queries, keys, values, *seen, *counts, None, None, None, bias]
    out, *whole = group_query_attention(graph, config, inputs, causal=0)
    kept = [op.Slice(part, op.Sub(rows, after), rows, two) for part in whole]
    padding = op.Concat(graph.ints([0] * 6), op.Sub(graph.ints([slots]), after), zero, axis=0)
    return [out, *(op.Pad(part, padding) for part in kept)]


def resident_rows(graph: GraphBuilder, tokens: ir.Value, slots: int, window: int) -> ir.Value:
    """int64 [1]: how many rows a windowed cache holds after so many tokens, as GroupQueryAttention's contract says.

    When ``slots`` are full, the slots − window + 1 oldest go at once.
    """
    op = graph.op
    dropped = graph.ints([slots - window + 1])
    excess = op.Max(op.Sub(tokens, graph.ints([slots])), graph.ints([0]))
    times = op.Div(op.Add(excess, graph.ints([slots - window])), dropped)
    return op.Sub(tokens, op.Mul(times, dropped))


def mlp(graph: GraphBuilder, prefix: str, x: ir.Value) -> ir.Value:
    gate, up = graph.linear(x, prefix + "gate_proj.weight", prefix + "up_proj.weight")
    hidden = graph.op.Mul(graph.op.Gelu(gate, approximate="tanh"), up)
    (down,) = graph.linear(hidden, prefix + "down_proj.weight")
    return down


def cache_shapes_onnx(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every cache input as the file declares it. Raises BadInput as ``load_graph`` does."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in load_graph(path).graph.input
        if value.name.startswith("past_key_values.")
    }


def genai_config(config: ModelConfig, layout: CacheLayout, filename: str = "model.onnx") -> dict[str, Any]:
    """What onnxruntime-genai reads as genai_config.json, beside tokenizer.json and tokenizer_config.json.

    Its max_length must stay the context: the file fixes the caches' shapes.
    """
    local = [index for index, kind in enumerate(config.layer_types) if kind == SLIDING]
    sliding = {
        "window_size": config.sliding_window,
        "layers": local,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "cache_slack": layout.layers[local[0]].slots - config.sliding_window if local else 0,
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        **({"sliding_window": sliding} if local else {}),
    }
    return {
        "model": {
            "type": "gemma3_text",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "vocab_size": config.vocab_size,
            "context_length": layout.context,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": layout.context, "past_present_share_buffer": True},
    }
