"""Gemma 3's text network as an ONNX graph for ONNX Runtime, to be read top to bottom like gemma3/model.py.

Shapes: S new tokens, T = past + S, H query heads, K key/value heads, D head dim, E hidden size, V vocabulary;
the batch is 1. In and out (the names are onnxruntime-genai's, which runs the file as it is):

    input_ids int64 [1, S], attention_mask int64 [1, T] (only its length is used)
    past_key_values.{i}.key and .value float32 [1, K, slots, D] → present.{i}.key and .value, the same shape
    logits float32 [1, 1, V], of the last token

The caches' slots are fixed in the file. Past and present are one buffer, which the caller binds as both. Sliding
layers use GroupQueryAttention's windowed cache: what is in which row is a function of T alone, so T = S begins a
new sequence whatever the buffer held.

Weights go to the external data file as they are read, so that none but the current one is in memory twice. An
integer weight keeps its own codes and scales: MatMulNBits holds code + 2^(bits−1) with an implicit zero point
of the same value, an even column in the low nibble, and float16 scales, in which ours are exact. The table that
embedding and head share is in the file once and is named by two initializers of different shape.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from torch import Tensor

from export.onnx_file import load_graph, read_initializer
from gemma3.cache import CacheLayout
from gemma3.config import SLIDING, LayerKind, ModelConfig
from gemma3.errors import BadInput, VerificationFailed
from gemma3.model import inverse_frequencies
from quant.integers import IntegerWeight, equal_codes
from quant.recipe import Weight
from quant.sfp8 import DECODE, Sfp8Weight

Weights = Mapping[str, Weight]

MICROSOFT = "com.microsoft"
OPSETS = {"": 23, MICROSOFT: 1}  # 23 brought RMSNormalization and RotaryEmbedding
IR_VERSION = 11  # opset 23's

# MatMulNBits' blocks are powers of two from 16; ONNX Runtime has fast kernels up to 128.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
ALIGNMENT = 64  # bytes: a cache line, so that weights used straight from the mapped file are aligned
WEIGHTS_KEY = "gemma_edge.weights"  # on a node: which checkpoint weights its matrix is made of


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and what reading it back showed."""

    opsets: dict[str, int]
    ir_version: int
    accuracy_level: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
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
    data_path = path.with_name(path.name + ".data")
    with WeightFile(data_path) as file:
        graph = GraphBuilder(weights, file, accuracy_level)
        inputs, outputs = text_model(graph, config, layout)
    unused = sorted(set(weights) - graph.used)
    if unused:
        raise BadInput(f"{len(unused)} weights are not part of this model, the first is {unused[0]}")
    model = ir.Model(
        ir.Graph(
            inputs,
            outputs,
            nodes=graph.op.nodes,
            initializers=graph.op.initializers,
            opset_imports=dict(OPSETS),
            name="gemma3",
        ),
        ir_version=IR_VERSION,
        producer_name="gemma-edge",
    )
    ir.save(model, path)

    equal, unequal = compare_integers(weights, path)
    if unequal:
        raise VerificationFailed(f"{path}: {unequal} integers are not the quantizer's; do not use this file")
    return OnnxReport(
        opsets=OPSETS,
        ir_version=IR_VERSION,
        accuracy_level=accuracy_level,
        inputs={value.name or "": _dims(value) for value in inputs},
        outputs={value.name or "": _dims(value) for value in outputs},
        files={file.name: file.stat().st_size for file in (path, data_path)},
        ideal_bytes=sum(
            4 * weight.numel() if isinstance(weight, Tensor) else weight.ideal_bytes for weight in weights.values()
        ),
        integers_equal=equal,
        integers_unequal=unequal,
    )


def compare_integers(weights: Weights, path: Path) -> tuple[int, int]:
    """How many of the integers in ``weights`` are (equal, unequal) in every place that the file uses them.

    An integer under another scale counts as unequal, like those of a weight that no node uses.
    """
    expected = {name: weight for name, weight in weights.items() if isinstance(weight, IntegerWeight)}
    equal: dict[str, int] = {}
    for name, stored in stored_integers(path):
        alike = equal_codes(stored, expected[name])
        equal[name] = min(alike, equal.get(name, alike))
    total = sum(weight.codes.numel() for weight in expected.values())
    return sum(equal.values()), total - sum(equal.values())


def _dims(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


# The network.


@dataclass(frozen=True)
class Step:
    """What all layers share in one call."""

    past: ir.Value  # int32 [1]: T − 1, as GroupQueryAttention wants it
    total: ir.Value  # int32 scalar: T
    rope: dict[LayerKind, tuple[ir.Value, ir.Value]]  # cos, sin [1, S, D/2]


def text_model(
    graph: "GraphBuilder", config: ModelConfig, layout: CacheLayout
) -> tuple[list[ir.Value], list[ir.Value]]:
    """The graph's inputs and outputs."""
    op = graph.op
    ids = _value("input_ids", ir.DataType.INT64, [1, "sequence_length"])
    mask = _value("attention_mask", ir.DataType.INT64, [1, "total_sequence_length"])
    inputs, caches = [ids, mask], []
    step = step_values(graph, config, ids, mask)
    x = op.Mul(embed(graph, config, ids), graph.floats([math.sqrt(config.hidden_size)]))
    for index, kind in enumerate(config.layer_types):
        shape = [1, layout.num_key_value_heads, layout.layers[index].slots, layout.head_dim]
        past = [_value(f"past_key_values.{index}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]
        x, present = layer(graph, config, f"model.layers.{index}.", kind, x, step, past)
        for value, part in zip(present, ("key", "value"), strict=True):
            _declare(value, f"present.{index}.{part}", ir.DataType.FLOAT, shape)
        inputs += past
        caches += present
    last = op.Gather(x, graph.ints([-1]), axis=1)  # [1, 1, E]
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    (logits,) = graph.linear(graph.norm(last, config, "model.norm.weight"), head)
    _declare(logits, "logits", ir.DataType.FLOAT, [1, 1, config.vocab_size])
    return inputs, [logits, *caches]


def step_values(graph: "GraphBuilder", config: ModelConfig, ids: ir.Value, mask: ir.Value) -> Step:
    op = graph.op
    total = op.Shape(mask, start=1)  # [1]
    new = op.Shape(ids, start=1)
    one = graph.ints(1)
    positions = op.Range(op.Squeeze(op.Sub(total, new)), op.Squeeze(total), one)  # [S]
    columns = op.Unsqueeze(op.Cast(positions, to=ir.DataType.FLOAT), graph.ints([0, 2]))  # [1, S, 1]
    rope = {}
    for kind in dict.fromkeys(config.layer_types):
        angles = op.Mul(columns, graph.floats(inverse_frequencies(config, kind).tolist()))
        rope[kind] = (op.Cos(angles), op.Sin(angles))
    narrow = op.Cast(total, to=ir.DataType.INT32)
    return Step(op.Cast(op.Sub(total, one), to=ir.DataType.INT32), op.Squeeze(narrow, graph.ints([0])), rope)


def embed(graph: "GraphBuilder", config: ModelConfig, ids: ir.Value) -> ir.Value:
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
    graph: "GraphBuilder",
    config: ModelConfig,
    prefix: str,
    kind: LayerKind,
    x: ir.Value,
    step: Step,
    past: Sequence[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    def norm(value: ir.Value, name: str) -> ir.Value:
        return graph.norm(value, config, f"{prefix}{name}.weight")

    op = graph.op
    out, present = attention(graph, config, prefix + "self_attn.", kind, norm(x, "input_layernorm"), step, past)
    x = op.Add(x, norm(out, "post_attention_layernorm"))
    out = mlp(graph, prefix + "mlp.", norm(x, "pre_feedforward_layernorm"))
    return op.Add(x, norm(out, "post_feedforward_layernorm")), present


def attention(
    graph: "GraphBuilder",
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
        normed = op.Reshape(graph.norm(split, config, f"{prefix}{norm}.weight"), graph.ints([0, 0, count * dim]))
        return op.RotaryEmbedding(normed, *step.rope[kind], num_heads=count)

    window = {"local_window_size": config.sliding_window, "sliding_window_cache": 1} if kind == SLIDING else {}
    out, *present = op.GroupQueryAttention(
        rotated(queries, heads, "q_norm"),
        rotated(keys, kv_heads, "k_norm"),
        values,
        *past,
        step.past,
        step.total,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=config.query_pre_attn_scalar**-0.5,
        **window,
        domain=MICROSOFT,
        outputs=3,
    )
    (projected,) = graph.linear(out, prefix + "o_proj.weight")
    return projected, present


def mlp(graph: "GraphBuilder", prefix: str, x: ir.Value) -> ir.Value:
    gate, up = graph.linear(x, prefix + "gate_proj.weight", prefix + "up_proj.weight")
    hidden = graph.op.Mul(graph.op.Gelu(gate, approximate="tanh"), up)
    (down,) = graph.linear(hidden, prefix + "down_proj.weight")
    return down


# Building blocks.


class WeightFile:
    """The external data file: arrays one after another, each at a multiple of ALIGNMENT."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "WeightFile":
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).data)
        dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        return ir.ExternalTensor(self._path.name, offset, array.nbytes, dtype, shape=shape, name=name)


class Operators(Tape):
    """Nodes in order: ``op.Add(x, y)`` appends one and returns its output, or the list of its ``outputs``."""

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def add(*inputs: ir.Value, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
            if outputs == 1:
                return self.op(kind, inputs, attributes, domain=domain)
            return list(self.op_multi_out(kind, inputs, attributes, domain=domain, num_outputs=outputs))

        return add


class GraphBuilder:
    """Nodes (``op``), constants and weights of one graph, in order."""

    def __init__(self, weights: Weights, file: WeightFile, accuracy_level: int) -> None:
        self.op = Operators()
        self.used: set[str] = set()
        self._weights = weights
        self._file = file
        self._accuracy_level = accuracy_level
        self._constants: dict[str, ir.Value] = {}
        self._matrices: dict[str, ir.Value] = {}
        self._scales: dict[str, ir.Value] = {}
        self._decoded: dict[str, ir.Value] = {}

    def ints(self, values: int | list[int]) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def floats(self, values: list[float]) -> ir.Value:
        return self._constant(np.array(values, np.float32))

    def _constant(self, array: NDArray[np.generic]) -> ir.Value:
        """Equal constants are one initializer."""
        key = f"{array.dtype}{array.tolist()}"
        if key not in self._constants:
            self._constants[key] = self.op.initializer(ir.tensor(array), name=f"constant_{len(self._constants)}")
        return self._constants[key]

    def take(self, name: str) -> Weight:
        """Raises BadInput when the weight is missing."""
        if name not in self._weights:
            raise BadInput(f"weight {name} is missing")
        self.used.add(name)
        return self._weights[name]

    def norm(self, x: ir.Value, config: ModelConfig, name: str) -> ir.Value:
        """x / rms(x) · (1 + weight)."""
        weight = self.take(name)
        assert isinstance(weight, Tensor)
        scale = self._stored(name, lambda: (1.0 + weight.float()).numpy())
        return self.op.RMSNormalization(x, scale, axis=-1, epsilon=config.rms_norm_eps)

    def linear(self, x: ir.Value, *names: str) -> list[ir.Value]:
        """x · Wᵀ for each named weight. Weights stored alike become one matrix, whose product is split."""
        weights = [self.take(name) for name in names]
        floats = [weight for weight in weights if isinstance(weight, Tensor)]
        integers = [weight for weight in weights if isinstance(weight, IntegerWeight)]
        if len(floats) == len(names):
            rows = [weight.shape[0] for weight in floats]
            matrix = self.float_matrix(names, floats)
            product = self.op.FusedMatMul(x, matrix, transB=1, domain=MICROSOFT)
        elif len(integers) == len(names) and len({_kind(weight) for weight in integers}) == 1:
            rows = [weight.codes.shape[0] for weight in integers]
            columns, block = integers[0].codes.shape[1], block_size(names[0], integers[0])
            codes, scales = self.integer_matrix(names, integers, block)
            product = self.integer_node(
                "MatMulNBits",
                [x, codes, scales],
                dict(zip(names, rows, strict=True)),
                columns,
                {
                    "K": columns,
                    "N": sum(rows),
                    "bits": integers[0].bits,
                    "block_size": block,
                    "accuracy_level": self._accuracy_level,
                },
            )
        elif len(names) > 1:
            return [part for name in names for part in self.linear(x, name)]
        else:
            (weight,) = weights
            assert isinstance(weight, Sfp8Weight)
            return [self.op.FusedMatMul(x, self.sfp8_matrix(names[0], weight), transB=1, domain=MICROSOFT)]
        if len(names) == 1:
            return [product]
        parts: list[ir.Value] = self.op.Split(product, self.ints(rows), axis=-1, outputs=len(names))
        return parts

    def float_matrix(self, names: Sequence[str], weights: Sequence[Tensor]) -> ir.Value:
        """The weights' rows one after another, float32 [rows, columns]."""
        return self._stored("+".join(names), lambda: stacked([weight.float() for weight in weights]).numpy())

    def integer_matrix(
        self, names: Sequence[str], weights: Sequence[IntegerWeight], block: int
    ) -> tuple[ir.Value, ir.Value]:
        """Codes uint8 [rows, blocks, bytes of a block] and scales float32 [rows, blocks] of the weights' rows.

        The file holds a scale per row once; it is repeated for each block when the graph is loaded.
        """
        label = "+".join(names)
        codes = self._stored(label + ".codes", lambda: pack(weights, block))
        scales = self._stored(label + ".scales", lambda: half_scales(label, weights))
        if label not in self._scales:
            wide = self.op.Cast(scales, to=ir.DataType.FLOAT)
            assert codes.shape is not None
            grid = codes.shape.numpy()[:2]
            if scales.shape != grid:
                wide = self.op.Expand(wide, self.ints(list(grid)))
            self._scales[label] = wide
        return codes, self._scales[label]

    def sfp8_matrix(self, name: str, weight: Sfp8Weight) -> ir.Value:
        """float32 [rows, columns], from one byte a value in the file."""
        if name not in self._decoded:
            codes = self._stored(name + ".codes", lambda: weight.codes.numpy())
            scale = self._stored(name + ".scale", lambda: weight.scale.numpy())
            values = self.op.Gather(self.floats(DECODE.tolist()), self.op.Cast(codes, to=ir.DataType.INT32))
            self._decoded[name] = self.op.Mul(values, scale)
        return self._decoded[name]

    def integer_node(
        self, kind: str, inputs: Sequence[ir.Value], rows: dict[str, int], columns: int, attributes: dict[str, int]
    ) -> ir.Value:
        """A node over an integer matrix made of the weights named in ``rows``; ``stored_integers`` reads the note."""
        note = json.dumps({"rows": rows, "columns": columns})
        return self.op.op(kind, inputs, attributes, domain=MICROSOFT, metadata_props={WEIGHTS_KEY: note})

    def flattened(self, matrix: ir.Value) -> ir.Value:
        """The same bytes of the file as [rows, bytes of a row]."""
        tensor = matrix.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        rows, *rest = tensor.shape.numpy()
        flat = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape([rows, math.prod(rest)]),
            name=f"{tensor.name}.flat",
        )
        return self.op.initializer(flat)

    def _stored(self, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
        """The initializer of that name; written to the file when it is first asked for."""
        if name not in self._matrices:
            self._matrices[name] = self.op.initializer(self._file.add(name, make()))
        return self._matrices[name]


def _kind(weight: IntegerWeight) -> tuple[int, int]:
    return weight.bits, 0 if weight.per_channel else weight.group_size


def block_size(name: str, weight: IntegerWeight) -> int:
    """Columns per block of the kernels: the group's size, or for one scale a row the largest that needs no padding.

    Raises BadInput for bits or groups that the kernels do not have.
    """
    if weight.bits not in (4, 8):
        raise BadInput(f"{name}: {weight.bits}-bit integers; ONNX Runtime's kernels take 4 or 8")
    if weight.per_channel:
        columns = weight.codes.shape[1]
        return min(max(columns & -columns, SMALLEST_BLOCK), LARGEST_BLOCK)
    size = weight.group_size
    if size < SMALLEST_BLOCK or size > LARGEST_BLOCK or size & (size - 1):
        raise BadInput(
            f"{name}: groups of {size}; ONNX Runtime's kernels take powers of two from "
            f"{SMALLEST_BLOCK} to {LARGEST_BLOCK}"
        )
    return size


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The rows of one after those of the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def pack(weights: Sequence[IntegerWeight], block: int) -> NDArray[np.uint8]:
    """The weights' codes, one below the other, as uint8 [rows, blocks, block · bits / 8].

    Columns are padded with weight 0 to whole blocks.
    """
    bits = weights[0].bits
    # Adding in uint8 wraps int8's two's complement to the unsigned code.
    unsigned = stacked([weight.codes for weight in weights]).view(torch.uint8) + 2 ** (bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % block), value=2 ** (bits - 1))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.view(unsigned.shape[0], -1, block * bits // 8).numpy()


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> Tensor:
    """``pack``'s inverse: int8 [rows, columns]."""
    unsigned = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        unsigned = np.stack((unsigned & 15, unsigned >> 4), axis=-1).reshape(packed.shape[0], -1)
    # Subtracting in uint8 wraps to the two's complement that int8 reads.
    return torch.from_numpy((unsigned[:, :columns] - np.uint8(2 ** (bits - 1))).view(np.int8))


def half_scales(name: str, weights: Sequence[IntegerWeight]) -> NDArray[np.float16]:
    """float16 [rows, groups]. Raises BadInput when that is not exact."""
    scales = stacked([weight.scales for weight in weights])
    half = scales.half()
    if not torch.equal(half.float(), scales):
        raise BadInput(f"{name}: scales are not exact in float16; take them from quant.integers.bf16_grid")
    return half.numpy()


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _declare(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)


# Reading back.


def read_back_onnx(path: Path) -> dict[str, IntegerWeight]:
    """The integer weights in the file by checkpoint name. Raises BadInput as ``load_graph`` does."""
    return dict(stored_integers(path))


def stored_integers(path: Path) -> Iterator[tuple[str, IntegerWeight]]:
    """The operands of every node that computes with integers; a table with two uses comes twice."""
    model = load_graph(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}

    def read(name: str) -> NDArray[Any]:
        """An operand's stored values: the graph only casts and repeats them."""
        while name not in initializers:
            name = producers[name].input[0]
        return read_initializer(path, initializers[name])

    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        if WEIGHTS_KEY not in notes:
            continue
        note = json.loads(notes[WEIGHTS_KEY])
        bits, block = (
            next(attribute.i for attribute in node.attribute if attribute.name == name)
            for name in ("bits", "block_size")
        )
        codes = unpack(read(node.input[0 if node.op_type == "GatherBlockQuantized" else 1]), bits, note["columns"])
        scales = torch.from_numpy(read(node.input[2]).astype(np.float32))
        shorter_last = block if scales.shape[1] > 1 and note["columns"] % block else None
        start = 0
        for name, rows in note["rows"].items():
            yield name, IntegerWeight(codes[start : start + rows], scales[start : start + rows], bits, shorter_last)
            start += rows


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
