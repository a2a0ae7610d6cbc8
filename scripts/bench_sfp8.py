"""Measure every route by which a runtime can compute an SFP8 linear layer: time, file size, distance to the values.

    python -m scripts.bench_sfp8 [--rows 6912 --columns 1152]

This gives the table in docs/sfp8.md: one token, one thread, the median time of many calls.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.executorch.layers import Linear, project
from export.executorch.lower import lower
from export.executorch.target import PTE
from export.onnx.layers import IR_VERSION, OPSETS, GraphBuilder, WeightFile
from export.onnx.target import ONNX
from export.stand_ins import stand_in
from export.target import FORWARD
from quant.integers import round_to_nearest
from quant.sfp8 import DECODE, Sfp8Weight, encode_weight
from quant.weights import Weight
from runtime_py.report import table
from runtime_py.sessions.pte import open_program

SECONDS = 2.0
LARGEST_FLOAT8 = 448.0  # the largest value of E4M3FN


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call, over SECONDS and at least three calls, after one that warms up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def decibels(values: Tensor, found: Tensor) -> float:
    """10 · log₁₀(signal / noise) of ``found`` against ``values``; larger is closer."""
    noise = float((values - found).double().square().sum())
    return float(10 * torch.log10(values.double().square().sum() / noise)) if noise else float("inf")


# ONNX Runtime


def in_onnxruntime(
    path: Path, product: Callable[[GraphBuilder, ir.Value], ir.Value], weight: Weight, level: int, folded: bool = True
) -> tuple[float, int]:
    """(milliseconds per call, bytes of the file). Without ``folded``, the session computes at every call what it could
    compute once when it loads the file.
    """
    columns = (weight if isinstance(weight, Tensor) else weight.codes).shape[1]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, columns]))
    with WeightFile(path.with_name(path.name + ".data")) as file:
        graph = GraphBuilder({"w": weight}, file, ["w"] if level == 1 else [])
        y = product(graph, x)
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    nodes, initializers = graph.op.nodes, graph.op.initializers
    whole = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports=dict(OPSETS))
    ir.save(ir.Model(whole, ir_version=IR_VERSION), path)
    import onnxruntime  # after runtime_py, which turns its telemetry off

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not folded:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    given = {"x": torch.randn(1, columns).numpy()}
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return milliseconds(partial(session.run, None, given)), size


def linear(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    (product,) = graph.linear(x, "w")
    return product


def float8(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    """DequantizeLinear on E4M3FN codes, with one scale per row."""
    weight = graph.take("w")
    assert isinstance(weight, Tensor)
    codes, scale = to_float8(weight)
    tensor = ir.Tensor(codes.view(torch.uint8).numpy(), dtype=ir.DataType.FLOAT8E4M3FN, name="codes")
    values = graph.op.DequantizeLinear(graph.op.initializer(tensor), graph.floats(scale.flatten().tolist()), axis=0)
    return graph.op.MatMul(x, graph.op.Transpose(values, perm=[1, 0]))


def to_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3FN codes [rows, columns] and scales [rows, 1]."""
    scale = values.abs().amax(1, keepdim=True) / LARGEST_FLOAT8
    return (values / scale).to(torch.float8_e4m3fn), scale


# ExecuTorch


class OneLinear(nn.Module):
    """A linear layer as the exporter writes it."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        assert not isinstance(weight, Sfp8Weight)
        self.linear = Linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.linear)[0]


class LookedUp(nn.Module):
    """A linear layer that looks up the values of its SFP8 codes at every call."""

    def __init__(self, weight: Sfp8Weight) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("decoded", DECODE.clone())

    def forward(self, x: Tensor) -> Tensor:
        values = self.get_buffer("decoded")[self.get_buffer("codes").int()]
        return F.linear(x, values * self.get_buffer("scale"))


def in_executorch(path: Path, module: nn.Module, columns: int) -> tuple[float, int]:
    """(milliseconds per call, bytes of the file)."""
    x = torch.randn(1, columns)
    with path.open("wb") as stream:
        lower(torch.export.export(module.eval(), (x,)), {}).write_to_file(stream)
    method = open_program(path).load_method(FORWARD)
    return milliseconds(partial(method.call, (x,))), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6912, help="outputs of the layer")
    parser.add_argument("--columns", type=int, default=1152, help="inputs of the layer")
    arguments = parser.parse_args()
    rows, columns = arguments.rows, arguments.columns
    torch.manual_seed(0)
    torch.set_num_threads(1)
    original = torch.randn(rows, columns) / columns**0.5
    sfp8 = encode_weight(original, per_channel=True)
    values = sfp8.dequantize()
    blocks, channels = (stand_in(sfp8, target.stand_ins[sfp8.kind])[0] for target in (ONNX, PTE))
    int4 = round_to_nearest(original, 4, 32)
    codes, scale = to_float8(values)

    with tempfile.TemporaryDirectory() as scratch:
        onnx, pte = Path(scratch) / "model.onnx", Path(scratch) / "model.pte"
        ort, et = partial(in_onnxruntime, onnx), partial(in_executorch, pte)
        routes: list[tuple[str, str, Callable[[], tuple[float, int]], Tensor]] = [
            (".onnx", "8 bits, blocks of 32", partial(ort, linear, blocks, 4), blocks.dequantize()),
            (".onnx", "the same, multiplied in float32", partial(ort, linear, blocks, 1), blocks.dequantize()),
            (".onnx", "8 bits, one scale a row", partial(ort, linear, channels, 4), channels.dequantize()),
            (".onnx", "float8 E4M3FN", partial(ort, float8, values, 4, False), codes.float() * scale),
            (".onnx", "codes, looked up when loaded", partial(ort, linear, sfp8, 4), values),
            (".onnx", "codes, looked up at each call", partial(ort, linear, sfp8, 4, False), values),
            (".onnx", "float32", partial(ort, linear, values, 4), values),
            (".onnx", "int4, blocks of 32", partial(ort, linear, int4, 4), int4.dequantize()),
            (".pte", "8 bits, one scale a row", partial(et, OneLinear(channels), columns), channels.dequantize()),
            (".pte", "codes, looked up at each call", partial(et, LookedUp(sfp8), columns), values),
            (".pte", "float32", partial(et, OneLinear(values), columns), values),
            (".pte", "int4, blocks of 32", partial(et, OneLinear(int4), columns), int4.dequantize()),
        ]
        lines = []
        for runtime_name, route, measure, found in routes:
            time_ms, size = measure()
            lines.append(
                (
                    *(runtime_name, route, f"{time_ms:.2f}", f"{size / values.numel():.2f}"),
                    *(f"{decibels(values, found):.1f}", f"{decibels(original, found):.1f}"),
                )
            )
    print(f"{rows} × {columns}; SFP8 itself is {decibels(original, values):.1f} dB from the original weights\n")
    header = ("", "route", "ms", "bytes per weight in the file", "dB to the SFP8 values", "dB to the original")
    print(table(header, lines, left=2))


if __name__ == "__main__":
    main()
