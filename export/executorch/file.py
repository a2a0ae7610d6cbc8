"""What a .pte holds, read from the file itself: its methods, kernels, caches and matrix multiplications.

A .pte is a flatbuffer program (instructions, tensors, and the offsets of the data) followed by segments of data. The
payload of a delegate is another flatbuffer, the XNNPACK graph. Its constants are named data of the program.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import executorch.backends.xnnpack.serialization as xnnpack_serialization
import numpy as np
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _get_extended_header
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall
from numpy.typing import NDArray
from torch import Tensor

from export.target import FORWARD
from gemma3.errors import BadInput
from quant.integers import IntegerWeight

Bytes = NDArray[np.uint8]
Place = tuple[int, int, int] | None

# Kernels that compute no data: sizes, symbols and views.
BOOKKEEPING = ("executorch_prim::", "aten::sym_size", "aten::_local_scalar_dense")
# The operators that write new keys or values to a cache, which is their second argument.
WRITES = "llama::update_cache"
HEADER_BYTES = 64
DTYPES = {
    ScalarType.BYTE: torch.uint8,
    ScalarType.CHAR: torch.int8,
    ScalarType.HALF: torch.float16,
    ScalarType.FLOAT: torch.float32,
}


@dataclass(frozen=True)
class StoredLinear:
    """A matrix multiplication in a delegate, with a weight [rows, columns]. Only integer weights can be read.

    Integers take up to twice the bytes that they have in the file, so ``read`` reads them when it is called.
    """

    rows: int
    columns: int
    read: Callable[[], IntegerWeight] | None  # None: floating point


class PteFile:
    """A .pte, memory-mapped. Raises BadInput when it is not one, or is shorter than its header says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < HEADER_BYTES:
            raise BadInput(f"{path}: {path.stat().st_size} bytes are not a .pte; export it again")
        # Mapped copy-on-write, although nothing is written, because torch wants writable memory.
        self.data: Bytes = np.memmap(path, np.uint8, "c")
        header = _get_extended_header(self.data[:HEADER_BYTES].tobytes())
        if header is None or not header.is_valid():
            raise BadInput(f"{path}: does not begin like a .pte; export it again")
        expected = header.segment_base_offset + header.segment_data_size
        if len(self.data) < expected:
            raise BadInput(f"{path}: {len(self.data)} bytes, its header says {expected}; copy or export it again")
        self.base: int = header.segment_base_offset
        self.program = _flatbuffer_to_program(self.data[: header.program_size].tobytes())

    def plan(self, method: str) -> ExecutionPlan:
        """The execution plan of a method. Raises BadInput when the file has no such method."""
        for plan in self.program.execution_plan:
            if plan.name == method:
                return plan
        raise BadInput(f"{self.path}: has no method {method}; it was not exported by this program")

    def constant_method(self, name: str) -> Any:
        """The value that a constant method returns."""
        plan = self.plan(name)
        return plan.values[plan.outputs[0]].val.__dict__[next(iter(plan.values[plan.outputs[0]].val.__dict__))]

    @property
    def networks(self) -> list[ExecutionPlan]:
        """The methods that compute something."""
        return [plan for plan in self.program.execution_plan if plan.chains[0].instructions]

    def kernels(self) -> Iterator[tuple[str, list[Any]]]:
        """The kernel calls outside the delegates as (name, arguments), in order, one method after the other."""
        for plan in self.networks:
            for instruction in plan.chains[0].instructions:
                call = instruction.instr_args
                if isinstance(call, KernelCall):
                    yield plan.operators[call.op_index].name, [plan.values[i].val for i in call.args]

    def segment(self, index: int) -> Bytes:
        segment = self.program.segments[index]
        return self.data[self.base + segment.offset :][: segment.size]

    def constant(self, tensor: Any) -> Tensor:
        """The values of a constant tensor of the program, mapped from the file."""
        dtype = DTYPES[tensor.scalar_type]
        offset = self.program.constant_segment.offsets[tensor.data_buffer_idx]
        count = int(np.prod(tensor.sizes)) * dtype.itemsize
        data = self.segment(self.program.constant_segment.segment_index)[offset:][:count]
        return torch.from_numpy(data).view(dtype).view(tensor.sizes)

    @cached_property
    def named(self) -> dict[str, int]:
        return {entry.key: entry.segment_index for entry in self.program.named_data}

    def linears(self, method: str = FORWARD) -> Iterator[StoredLinear]:
        """The matrix multiplications in a method's delegates, in the order of the delegates' first calls.

        Means, which are matrix multiplications with one row (see ``layers.Mean``), are left out.
        """
        plan = self.plan(method)
        arguments = [instruction.instr_args for instruction in plan.chains[0].instructions]
        calls = dict.fromkeys(call.delegate_index for call in arguments if isinstance(call, DelegateCall))
        for delegate in (plan.delegates[index] for index in calls):
            graph = xnnpack_graph(self.segment(delegate.processed.index))
            values = {}
            for entry in graph["xvalues"]:
                value = entry["xvalue_union"]
                values[value.get("tensor_value", value)["id_out"]] = value
            for node in graph["xnodes"]:
                if node["xnode_union_type"] == "XNNFullyConnected":
                    linear = self._linear(values[node["xnode_union"]["filter_id"]], graph["constant_data"])
                    if linear.rows > 1 or linear.read is not None:
                        yield linear

    def _linear(self, value: dict[str, Any], constants: list[dict[str, Any]]) -> StoredLinear:
        tensor, params = value.get("tensor_value", value), value.get("quant_params")
        rows, columns = tensor["dims"]
        if params is None:
            return StoredLinear(rows, columns, None)
        codes, scales = (
            self.named[constants[index]["named_key"]]
            for index in (tensor["constant_buffer_idx"], params["scale_buffer_idx"])
        )
        return StoredLinear(rows, columns, partial(self._integers, tensor, codes, scales))

    def _integers(self, tensor: dict[str, Any], codes_at: int, scales_at: int) -> IntegerWeight:
        """The weight of a matrix multiplication. ``codes_at`` and ``scales_at`` are segments."""
        rows, columns = tensor["dims"]
        codes, scales = (torch.from_numpy(self.segment(index)) for index in (codes_at, scales_at))
        grouped = tensor["datatype"] == "xnn_datatype_qbint4"
        scales = scales.view(torch.bfloat16 if grouped else torch.float32).float().view(rows, -1)
        if tensor["datatype"] == "xnn_datatype_qcint8":
            return IntegerWeight(codes.view(torch.int8).view(rows, columns), scales, 8)
        # A row with an odd number of columns ends in half a byte of padding.
        return IntegerWeight(unpack_nibbles(codes.view(rows, -1), first="low")[:, :columns], scales, 4)


def unpack_nibbles(packed: Tensor, first: Literal["low", "high"]) -> Tensor:
    """The codes, int8 [N, 2·B] in −8 … 7, in packed bytes, uint8 [N, B].

    A nibble holds a code with 8 added. The ``first`` nibble of a byte is that of the even column.
    """
    low, high = packed & 15, packed >> 4
    pair = (low, high) if first == "low" else (high, low)
    return torch.stack(pair, dim=-1).view(len(packed), -1).to(torch.int8) - 8


def xnnpack_graph(payload: Bytes) -> dict[str, Any]:
    """The graph in a delegate's payload, as the JSON of XNNPACK's flatbuffer schema."""
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH].tobytes())
    graph = payload[header.flatbuffer_offset :][: header.flatbuffer_size].tobytes()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        schema, binary = directory / "schema.fbs", directory / "graph.bin"
        schema.write_bytes(resources.files(xnnpack_serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(graph)
        _flatc_decompile(name, str(schema), str(binary))
        return json.loads((directory / "graph.json").read_bytes())


def kernel_counts(file: PteFile) -> dict[str, int]:
    """Operator → number of calls outside the delegates, the most frequent first. BOOKKEEPING is left out."""
    counts = Counter(name for name, _ in file.kernels() if not name.startswith(BOOKKEEPING))
    return dict(counts.most_common())


def cache_shapes_pte(file: PteFile) -> list[list[int]]:
    """The shape of every cache buffer (see caches.py), layer by layer: keys, values, keys, values, …"""
    shapes: dict[tuple[int, str], list[int]] = {}
    for name, arguments in file.kernels():
        if name.startswith(WRITES):  # in no fixed order within a layer
            _, layer, _, part = arguments[1].extra_tensor_info.fully_qualified_name.split(".")
            shapes[int(layer), part] = arguments[1].sizes
    return [shapes[buffer] for buffer in sorted(shapes)]


def early_reads(plan: ExecutionPlan) -> list[int]:
    """The calls, by their place among the plan's instructions, that read a cache before the call that writes it.

    After the compiler's last passes, only the order of the calls says that attention reads what the same step wrote: a
    delegate's argument is a view of the cache, and not what the operator that writes in place returns.
    """
    uses: dict[Place, list[int]] = {}
    writes: dict[Place, int] = {}
    for index, instruction in enumerate(plan.chains[0].instructions):
        call = instruction.instr_args
        if not isinstance(call, KernelCall | DelegateCall):
            continue
        places = [place(plan.values[argument].val) for argument in call.args]
        for used in set(places) - {None}:
            uses.setdefault(used, []).append(index)
        if isinstance(call, KernelCall) and plan.operators[call.op_index].name.startswith(WRITES):
            writes[places[1]] = index
    return sorted({index for cache, write in writes.items() for index in uses[cache] if index < write})


def place(value: Any) -> Place:
    """Where a value's planned memory begins, which is also where its views begin. None: no memory is planned for it."""
    planned = getattr(value, "allocation_info", None)
    return planned and (planned.memory_id, planned.memory_offset_high, planned.memory_offset_low)
