"""The layers of which the ONNX graphs of the text model and the vision model are built, and their weights.

Graphs are built from the forms of weights. The values are asked for one weight at a time, and go to the external data
file a few rows at a time. An integer weight keeps its own codes and scales. MatMulNBits holds code + 2^(bits−1)
with an implicit zero point of the same value, an even column in the low nibble, and float16 scales, in which the
quantizer's scales are exact. The table that embedding and head share is in the file once; two initializers of different
shapes refer to it.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from torch import Tensor

from export.onnx.file import WEIGHTS_KEY, data_file
from export.target import TensorDtype, TensorSpec
from gemma3.errors import BadInput
from quant.integers import VALUES_AT_ONCE, IntegerWeight, blocks_of_rows
from quant.sfp8 import DECODE, Sfp8Weight
from quant.weights import Weight, Weights, forms_of

MICROSOFT = "com.microsoft"
OPSETS = {"": 23, MICROSOFT: 1}  # 23 brought RMSNormalization and RotaryEmbedding
IR_VERSION = 11  # opset 23's

# The block sizes of MatMulNBits are powers of two from 16; ONNX Runtime has fast kernels up to 128.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
FAST_BLOCKS = (128, 64, 32)
# MatMulNBits' accuracy levels: 4 rounds its input to int8 by block and multiplies in int8; 1 multiplies the dequantized
# weights in float32.
INT8_LEVEL, FLOAT_LEVEL = 4, 1
DTYPES: dict[ir.DataType, TensorDtype] = {
    ir.DataType.INT64: "int64",
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT8: "int8",
}
ALIGNMENT = 64  # bytes of a CPU cache line, so that weights used directly from the mapped file are aligned
SFP8_SCALE = ".scale"
ATTENTION, KV_SCALES = "GroupQueryAttention", (12, 13)  # the operator, and its inputs k_scale and v_scale


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

    def add(self, name: str, shape: Sequence[int], parts: Iterable[NDArray[np.generic]]) -> ir.ExternalTensor:
        """Append an array, given as ``parts`` along its first axis, to the file. Returns a tensor that refers to it."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for part in parts:
            dtype = ir.DataType.from_numpy(part.dtype)
            self._file.write(np.ascontiguousarray(part).data)
        length = self._file.tell() - offset
        assert length == math.prod(shape) * dtype.itemsize
        return ir.ExternalTensor(self._path.name, offset, length, dtype, shape=ir.Shape(shape), name=name)


def write_graph(
    path: Path,
    name: str,
    weights: Weights,
    float_activations: Collection[str],
    build: "Callable[[GraphBuilder], tuple[list[ir.Value], list[ir.Value]]]",
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], set[str]]:
    """Write the graph ``path`` with the inputs and outputs that ``build`` returns, and its external data file.

    The inputs of the integer weights ``float_activations`` are not rounded. Returns the specs of the graph's inputs and
    outputs, and the names of the weights that it uses.
    """
    with WeightFile(data_file(path)) as file:
        graph = GraphBuilder(weights, file, float_activations)
        inputs, outputs = build(graph)
    whole = ir.Graph(
        inputs,
        outputs,
        nodes=graph.op.nodes,
        initializers=graph.op.initializers,
        opset_imports=dict(OPSETS),
        name=name,
    )
    ir.save(ir.Model(whole, ir_version=IR_VERSION, producer_name="gemma-edge"), path)
    return _specs(inputs), _specs(outputs), graph.used


def _specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.name is not None
        assert value.shape is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        assert value.dtype is not None
        specs.append(TensorSpec(value.name, DTYPES[value.dtype], shape))
    return tuple(specs)


class Operators(Tape):
    """The nodes of a graph in order. ``op.Add(x, y)`` appends a node and returns its output.

    With ``outputs`` over 1 it returns a list of so many outputs.
    """

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def add(*inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
            if outputs == 1:
                return self.op(kind, inputs, attributes, domain=domain)
            return list(self.op_multi_out(kind, inputs, attributes, domain=domain, num_outputs=outputs))

        return add


class GraphBuilder:
    """Builds one graph: its nodes (with ``op``), its constants and its weights.

    ``used`` collects the names of the weights that the graph uses. The inputs of the integer weights
    ``float_activations`` are not rounded.
    """

    def __init__(self, weights: Weights, file: WeightFile, float_activations: Collection[str] = ()) -> None:
        self.op = self._main = Operators()
        self.used: set[str] = set()
        self._weights, self._forms = weights, forms_of(weights)
        self._file = file
        self._float_activations = float_activations
        self._constants: dict[str, ir.Value] = {}
        self._matrices: dict[str, ir.Value] = {}
        self._scales: dict[str, ir.Value] = {}
        self._decoded: dict[str, ir.Value] = {}

    def ints(self, values: int | list[int]) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def floats(self, values: list[float]) -> ir.Value:
        return self._constant(np.array(values, np.float32))

    def _constant(self, array: NDArray[np.generic]) -> ir.Value:
        """The initializer with the values of ``array``. Equal constants share one initializer."""
        key = f"{array.dtype}{array.tolist()}"
        if key not in self._constants:
            self._constants[key] = self._main.initializer(ir.tensor(array), name=f"constant_{len(self._constants)}")
        return self._constants[key]

    def take(self, name: str) -> Weight:
        """The form of the weight ``name``, which then counts as used. Raises BadInput when it is missing."""
        if name not in self._forms:
            raise BadInput(f"weight {name} is missing")
        self.used.add(name)
        return self._forms[name]

    def branch(self, name: str, build: Callable[[], list[ir.Value]]) -> ir.Graph:
        """The nodes that ``build`` makes, as a branch of an If. Their constants and weights go to the main graph."""
        outer, self.op = self.op, Operators()
        outputs, nodes, self.op = build(), self.op.nodes, outer
        # The names of values must differ from those outside the branch.
        for index, value in enumerate(output for node in nodes for output in node.outputs):
            value.name = f"{name}.{index}"
        return ir.Graph([], outputs, nodes=nodes, name=name)

    def floats_of(self, name: str) -> ir.Value:
        """The float weight ``name``, in float32."""
        weight = self.take(name)
        assert isinstance(weight, Tensor)
        return self.float_matrix([name], [weight])

    def values(self, name: str, array: Tensor) -> ir.Value:
        """The initializer ``name``, stored with the weights."""
        return self._stored(name, array.shape, [array.numpy()])

    def norm(self, x: ir.Value, eps: float, name: str) -> ir.Value:
        """x / rms(x) · (1 + weight), over the last axis."""
        weight = self.take(name)
        assert isinstance(weight, Tensor)
        scale = self._stored(name, weight.shape, (1.0 + part for part in self._floats([name])))
        return self.op.RMSNormalization(x, scale, axis=-1, epsilon=eps)

    def linear(self, x: ir.Value, *names: str) -> list[ir.Value]:
        """x · Wᵀ for each named weight. Weights stored in the same form become one matrix, whose product is split.

        Raises BadInput for a weight that is missing, or of integers that the kernels do not support.
        """
        weights = [self.take(name) for name in names]
        floats = [weight for weight in weights if isinstance(weight, Tensor)]
        integers = [weight for weight in weights if isinstance(weight, IntegerWeight)]
        if len(floats) == len(names):
            rows = [weight.shape[0] for weight in floats]
            matrix = self.float_matrix(names, floats)
            product = self.op.FusedMatMul(x, matrix, transB=1, domain=MICROSOFT)
        elif len(integers) == len(names) and len(set(map(self._kind, names, integers))) == 1:
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
                    "accuracy_level": FLOAT_LEVEL if names[0] in self._float_activations else INT8_LEVEL,
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

    def _kind(self, name: str, weight: IntegerWeight) -> tuple[int, int, bool]:
        """What weights must have in common to be one matrix."""
        return weight.bits, 0 if weight.per_channel else weight.group_size, name in self._float_activations

    def float_matrix(self, names: Sequence[str], weights: Sequence[Tensor]) -> ir.Value:
        """The weights, given as forms, stacked along the rows: float32 [rows, columns]."""
        shape = [sum(len(weight) for weight in weights), *weights[0].shape[1:]]
        return self._stored("+".join(names), shape, self._floats(names))

    def _floats(self, names: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """The values of float weights, in parts along their first axis."""
        for name in names:
            weight = self._weights[name]
            assert isinstance(weight, Tensor)
            count = max(1, VALUES_AT_ONCE // math.prod(weight.shape[1:]))
            for start in range(0, len(weight), count):
                yield weight[start : start + count].float().numpy()

    def integer_matrix(
        self, names: Sequence[str], weights: Sequence[IntegerWeight], block: int
    ) -> tuple[ir.Value, ir.Value]:
        """The stacked weights' codes uint8 [rows, blocks, bytes of a block], and scales, float32 [rows, blocks].

        If a row has one scale, the file holds it once. It is repeated for each block when the graph is loaded.
        """
        label = "+".join(names)
        stored_scales: list[NDArray[np.float16]] = []

        def packed() -> Iterator[NDArray[np.uint8]]:
            for name in names:
                weight = self._weights[name]
                assert isinstance(weight, IntegerWeight)
                stored_scales.append(half_scales(label, weight))
                for part in blocks_of_rows(weight.codes.shape):
                    yield pack(weight.codes[part], weight.bits, block)

        rows, (_, columns) = sum(len(weight.codes) for weight in weights), weights[0].codes.shape
        grid = [rows, -(-columns // block)]
        codes = self._stored(label + ".codes", [*grid, block * weights[0].bits // 8], packed())
        scales = self._stored(label + ".scales", [rows, weights[0].scales.shape[1]], stored_scales)
        if label not in self._scales:
            wide = self.op.Cast(scales, to=ir.DataType.FLOAT)
            if scales.shape != tuple(grid):
                wide = self.op.Expand(wide, self.ints(grid))
            self._scales[label] = wide
        return codes, self._scales[label]

    def sfp8_matrix(self, name: str, weight: Sfp8Weight) -> ir.Value:
        """The values of a weight, given as its form: float32 [rows, columns].

        The graph decodes them from codes in the file, one byte per value.
        """
        if name not in self._decoded:
            held = self._weights[name]
            assert isinstance(held, Sfp8Weight)
            codes = self._stored(name + ".codes", weight.codes.shape, [held.codes.numpy()])
            scale = self._stored(name + SFP8_SCALE, weight.scale.shape, [held.scale.numpy()])
            values = self.op.Gather(self.floats(DECODE.tolist()), self.op.Cast(codes, to=ir.DataType.INT32))
            self._decoded[name] = self.op.Mul(values, scale)
        return self._decoded[name]

    def integer_node(
        self, kind: str, inputs: Sequence[ir.Value], rows: dict[str, int], columns: int, attributes: dict[str, int]
    ) -> ir.Value:
        """A node with an integer matrix, which consists of the weights in ``rows`` (name → number of rows).

        These and ``columns`` are noted in the node's metadata, for read_back.py.
        """
        note = json.dumps({"rows": rows, "columns": columns})
        return self.op.op(kind, inputs, attributes, domain=MICROSOFT, metadata_props={WEIGHTS_KEY: note})

    def flattened(self, matrix: ir.Value) -> ir.Value:
        """An initializer over the same bytes of the file, with the shape [rows, bytes of a row]."""
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
        return self._main.initializer(flat)

    def _stored(self, name: str, shape: Sequence[int], parts: Iterable[NDArray[np.generic]]) -> ir.Value:
        """The initializer ``name``. Its values are taken from ``parts`` and written when it is first asked for."""
        if name not in self._matrices:
            self._matrices[name] = self._main.initializer(self._file.add(name, shape, parts))
        return self._matrices[name]


def block_size(name: str, weight: IntegerWeight) -> int:
    """How many columns the kernels take as one block.

    It is the group size. With one scale per row, it is the largest fast size that pads the row by at most 1/64. Raises
    BadInput for bits or group sizes that the kernels do not support.
    """
    if weight.bits not in (4, 8):
        raise BadInput(f"{name}: {weight.bits}-bit integers; ONNX Runtime's kernels take 4 or 8")
    if weight.per_channel:
        columns = weight.codes.shape[1]
        return next((size for size in FAST_BLOCKS if -columns % size <= columns // 64), SMALLEST_BLOCK)
    size = weight.group_size
    if size < SMALLEST_BLOCK or size > LARGEST_BLOCK or size & (size - 1):
        raise BadInput(
            f"{name}: groups of {size}; ONNX Runtime's kernels take powers of two from "
            f"{SMALLEST_BLOCK} to {LARGEST_BLOCK}"
        )
    return size


def pack(codes: Tensor, bits: int, block: int) -> NDArray[np.uint8]:
    """Codes, int8 [rows, columns], as uint8 [rows, blocks, block · bits / 8].

    The columns are padded to whole blocks with the code that stands for 0.
    """
    # Addition in uint8 wraps around, which turns int8's two's complement into the unsigned code.
    unsigned = codes.view(torch.uint8) + 2 ** (bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % block), value=2 ** (bits - 1))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.view(unsigned.shape[0], -1, block * bits // 8).numpy()


def half_scales(name: str, weight: IntegerWeight) -> NDArray[np.float16]:
    """The weight's scales as float16 [rows, groups]. Raises BadInput for scales that are not exact in it."""
    half = weight.scales.half()
    if not torch.equal(half.float(), weight.scales):
        raise BadInput(f"{name}: scales are not exact in float16; take them from quant.integers.bf16_grid")
    return half.numpy()


def typed_value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def declare(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    """Give a value its name, dtype and shape; a string in ``shape`` is a dynamic dimension."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
