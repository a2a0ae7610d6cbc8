"""Integers of any shape and value, written by each exporter and read back: all of them are equal."""

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.executorch.file import PteFile
from export.executorch.layers import Embedding, Linear, project
from export.executorch.lower import lower
from export.executorch.read_back import embedding_integers
from export.onnx.layers import IR_VERSION, OPSETS, GraphBuilder, WeightFile
from export.onnx.read_back import read_back_onnx
from export.onnx.rounding import kleidiai, per_block
from export.onnx.text import embed
from quant.activations import fake_quantize_per_token
from quant.integers import MAX_SCALE, MIN_SCALE, IntegerWeight, bf16_grid, round_to_nearest
from runtime_py.sessions.pte import open_program
from tests.shapes import tiny_config

NAME = "model.embed_tokens.weight"


@st.composite
def weights(draw: st.DrawFn, forms: list[tuple[int, int | None]], shorter: bool = False) -> IntegerWeight:
    """Codes and scales of any allowed value: extremes, rows of zeros, one row, odd numbers of blocks."""
    bits, size = draw(st.sampled_from(forms))
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    if size is None:
        columns = draw(st.sampled_from([32, 96, 160, 352]))
        groups = 1
    else:
        columns = size * groups - (draw(st.integers(0, size - 1)) if shorter and groups > 1 else 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    for row in range(rows):
        kind = draw(st.sampled_from(["random", "random", "zeros", "lowest", "highest"]))
        if kind != "random":
            codes[row] = {"zeros": 0, "lowest": -limit, "highest": limit - 1}[kind]
    scales = torch.empty(rows, groups).log_normal_(-4, 2, generator=generator)
    scales[draw(st.integers(0, rows - 1)), 0] = draw(st.sampled_from([MIN_SCALE, 2.0**-10, 1.0, MAX_SCALE]))
    shorter_last = size if size is not None and columns % size else None
    return IntegerWeight(codes, bf16_grid(scales), bits, shorter_last)


def assert_equal(stored: IntegerWeight, weight: IntegerWeight) -> None:
    assert (stored.bits, stored.group_size) == (weight.bits, weight.group_size)
    assert torch.equal(stored.codes, weight.codes)
    assert torch.equal(stored.scales, weight.scales)


def assert_close(found: np.ndarray, expected: Tensor, size: Tensor) -> None:
    """Equal but for the order of float32 additions. ``size`` is the sum of the terms' magnitudes."""
    assert (np.abs(found - expected.numpy()) <= 1e-6 * size.numpy() + 1e-30).all()


def write_onnx(weight: IntegerWeight, path: Path, float_activations: Sequence[str] = (NAME,)) -> None:
    """A graph with one stored table W: x [1, S, K] → x · Wᵀ, and ids [1, S] → their rows.

    Unless W is among ``float_activations``, x is rounded first.
    """
    rows, columns = weight.codes.shape
    config = tiny_config(vocab_size=rows, hidden_size=columns)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "length", columns]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "length"]))
    with WeightFile(path.with_name(path.name + ".data")) as file:
        graph = GraphBuilder({NAME: weight}, file, float_activations)
        (product,) = graph.linear(x, NAME)
        outputs = [product, embed(graph, config, ids)]
        for value, name in zip(outputs, ("product", "rows"), strict=True):
            value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    whole = ir.Graph(
        [x, ids], outputs, nodes=graph.op.nodes, initializers=graph.op.initializers, opset_imports=dict(OPSETS)
    )
    ir.save(ir.Model(whole, ir_version=IR_VERSION), path)


ONNX_FORMS: list[tuple[int, int | None]] = [(4, 32), (4, 128), (4, None), (8, 32), (8, 128), (8, None)]


@given(weight=weights(ONNX_FORMS, shorter=True))
def test_onnx(weight: IntegerWeight, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(weight, path)
    stored = dict(read_back_onnx(path))[NAME]
    assert isinstance(stored, IntegerWeight)
    assert_equal(stored, weight)

    rows, columns = weight.codes.shape
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rows)[[0, -1, rows // 2]]
    session = onnxruntime.InferenceSession(path)
    product, looked_up = session.run(["product", "rows"], {"x": x[None].numpy(), "ids": ids[None].numpy()})
    values = weight.dequantize()
    assert_close(product[0], (x.double() @ values.double().T).float(), x.abs() @ values.abs().T)
    assert np.array_equal(looked_up[0], values[ids].numpy())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="on ARM, KleidiAI's kernels round in another way")
@given(weight=weights(ONNX_FORMS, shorter=True), size=st.sampled_from([1e-6, 1.0, 300.0]), tokens=st.integers(1, 5))
def test_the_reference_rounds_activations_as_matmulnbits_does(
    weight: IntegerWeight, size: float, tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Up to the order of additions, and to values that lie so close to a boundary that a float error decides."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(weight, path, ())
    columns = weight.codes.shape[1]
    x = size * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    x[0, : columns // 2] = 0.0
    session = onnxruntime.InferenceSession(path)
    (product,) = session.run(["product"], {"x": x[None].numpy(), "ids": np.zeros((1, 1), np.int64)})
    round = per_block(NAME, weight)
    rounded, values = round(x), weight.dequantize()
    assert 0 < float((rounded - x).abs().max()) <= float(x.abs().max()) / 254 * 1.001
    # The kernels multiply with unsigned codes and subtract the zero point's share afterwards.
    unsigned = replace(weight, codes=torch.full_like(weight.codes, 2 ** (weight.bits - 1) - 1)).dequantize()
    assert_close(product[0], (rounded.double() @ values.double().T).float(), rounded.abs() @ (2 * unsigned).T)


def test_arm_kernels_round_by_token_where_kleidiai_takes_over() -> None:
    x = torch.randn(3, 96)
    whole, ragged = (round_to_nearest(torch.randn(8, n), 4, 32, pad=True) for n in (96, 80))
    wide = round_to_nearest(torch.randn(8, 96), 8, 32)
    assert torch.equal(kleidiai(NAME, whole)(x), fake_quantize_per_token(x))
    for weight, columns in ((ragged, 80), (wide, 96)):
        part = x[:, :columns]
        assert torch.equal(kleidiai(NAME, weight)(part), per_block(NAME, weight)(part))
        assert not torch.equal(kleidiai(NAME, weight)(part), fake_quantize_per_token(part))


class Several(nn.Module):
    """Linear layers and tables: an x [S, K] for each layer and ids [S] for the tables → all products and rows."""

    def __init__(self, linears: list[IntegerWeight], tables: list[IntegerWeight]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(map(Linear, linears))
        self.tables = nn.ModuleList(map(Embedding, tables))

    def forward(self, ids: Tensor, *inputs: Tensor) -> list[Tensor]:
        products = [
            project(x, linear)[0] for x, linear in zip(inputs, self.linears, strict=True) if isinstance(linear, Linear)
        ]
        return [*products, *(table(ids) for table in self.tables)]


PTE_FORMS: list[tuple[int, int | None]] = [(4, 32), (4, 128), (4, None), (8, None)]


@pytest.mark.slow
@settings(max_examples=5)
@given(
    linears=st.lists(weights(PTE_FORMS), min_size=6, max_size=6),
    tables=st.tuples(weights(PTE_FORMS), weights(PTE_FORMS)),
)
def test_pte(
    linears: list[IntegerWeight], tables: tuple[IntegerWeight, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lowering costs seconds, so each example lowers several weights at once."""
    ids = torch.zeros(1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, weight.codes.shape[1], generator=generator) for weight in linears]
    program = torch.export.export(Several(linears, list(tables)).eval(), (ids, *inputs))
    path = tmp_path_factory.mktemp("pte") / "model.pte"
    with path.open("wb") as stream:
        lower(program, {}).write_to_file(stream)

    file = PteFile(path)
    stored = [linear.read and linear.read() for linear in file.linears()]
    looked_up = [embedding_integers(file, *call) for call in file.kernels() if "embedding" in call[0]]
    for one, weight in zip([*stored, *looked_up], [*linears, *tables], strict=True):
        assert one is not None
        assert_equal(one, weight)

    found = open_program(path).load_method("forward").call((ids, *inputs))
    for x, product, weight in zip(inputs, found, linears, strict=False):
        values, rounded = weight.dequantize(), fake_quantize_per_token(x)
        assert_close(product.numpy(), (rounded.double() @ values.double().T).float(), rounded.abs() @ values.abs().T)
    for row, weight in zip(found[len(linears) :], tables, strict=True):
        assert torch.equal(row[0], weight.dequantize()[0])
